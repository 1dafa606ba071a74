import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml
from PIL import Image

from hedwig import storage
from hedwig.vectors import read_vectors


def hedwig(*arguments, cwd=None):
    command = [sys.executable, "-c", "from hedwig.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd, env=dict(os.environ))


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(5):
        tint = rng.integers(40, 200, 3)
        pixels = np.clip(tint + rng.normal(0, 20, (128, 256, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.jpg", quality=90)
    (folder / "broken.jpg").write_bytes((folder / "0.jpg").read_bytes()[:900])
    (folder / "text.jpg").write_text("not an image")
    return folder


def test_help_loads_neither_torch_nor_ray_and_is_quick():
    code = "import sys, hedwig.cli; print([m for m in ('torch', 'ray', 'numpy', 'pyarrow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
    began = time.process_time(), time.monotonic()
    done = hedwig("--help")
    assert done.returncode == 0
    for command in ("run", "demo", "embed", "caption", "geocells", "train", "index", "evaluate", "predict", "serve"):
        assert command in done.stdout
    assert time.monotonic() - began[1] < 30  # loading torch and ray alone takes longer than this on a slow machine


def test_version_and_wrong_usage():
    assert hedwig("--version").stdout.startswith("hedwig 0.")
    done = hedwig("embed", "listing.csv")
    assert done.returncode == 2
    assert "needs --model NAME and --out DIR" in done.stderr
    assert hedwig("nonsense").returncode == 2


def test_config_show_and_schema(pytestconfig):
    demo = pytestconfig.rootpath / "experiments" / "demo.yaml"
    shown = yaml.safe_load(hedwig("config", "show", demo, "training.epochs=7").stdout)
    assert shown["training"]["epochs"] == 7
    assert shown["retrieve"]["num_cells"] == 20
    schema = json.loads(hedwig("config", "schema").stdout)
    assert "slicing" in schema["properties"]
    done = hedwig("config", "show", demo, "training.epoch=7")
    assert done.returncode == 2
    assert "Did you mean 'epochs'?" in done.stderr


def test_doctor_prints_a_line_per_check():
    done = hedwig("doctor", "--json")
    checks = json.loads(done.stdout)
    assert checks["ray"]["ok"]
    assert checks["python"]["ok"]
    assert set(checks) >= {"memory", "disk", "torch", "gpu", "writable"}
    assert done.returncode == (0 if all(c["ok"] for c in checks.values()) else 1)


def test_slice_writes_frames_and_keeps_reasons(images, tmp_path):
    out = tmp_path / "frames"
    done = hedwig(
        "slice", images / "0.jpg", images / "broken.jpg", "--out", out, "--frames", "4", "--frame-px", "32", "--json"
    )
    assert done.returncode == 3
    result = json.loads(done.stdout)
    assert (result["num_in"], result["num_out"], result["num_rejected"]) == (2, 1, 1)
    assert Image.open(out / "0.jpg").size == (4 * 32, 32)
    assert "broken.jpg" in next(iter(json.loads((out / "rejected.json").read_text())))


def test_embed_a_listing_accounts_for_every_row_and_resumes(images, tmp_path):
    listing = tmp_path / "listing.csv"
    rows = [f"p{i},{10 + i},{20 + i},images/{i}.jpg" for i in range(5)]
    rows += [
        "broken,1,2,images/broken.jpg",
        "text,1,2,images/text.jpg",
        "gone,1,2,images/gone.jpg",
        "far,99,2,images/0.jpg",
    ]
    listing.write_text("pano_id,lat,lon,image_uri\n" + "\n".join(rows) + "\n")
    out = tmp_path / "table"
    done = hedwig("embed", listing, "--model", "viclip-tiny", "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["num_in"], manifest["num_out"], manifest["num_rejected"]) == (9, 5, 4)
    table = storage.read_table(str(out))
    assert table["pano_id"].to_pylist() == [f"p{i}" for i in range(5)]
    vectors = read_vectors(table, "image_embedding")
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    rejected = storage.read_table(str(out / "rejected"))
    reasons = dict(zip(rejected["pano_id"].to_pylist(), rejected["reason"].to_pylist(), strict=True))
    assert set(reasons) == {"broken", "text", "gone", "far"}
    assert reasons["far"].startswith("lat out of range: 99")
    assert reasons["gone"].startswith("image not found")
    again = hedwig("embed", listing, "--model", "viclip-tiny", "--out", out)
    assert again.returncode == 0
    assert "5 of 9 panoramas, 4 rejected" in again.stdout


@pytest.mark.slow  # two whole jobs; what is taken over and what is not, is tested without the command
def test_embed_makes_anew_what_has_changed_although_the_listing_has_not(images, tmp_path):
    listing, out = tmp_path / "listing.csv", tmp_path / "table"
    rows = [f"p{i},{10 + i},{20 + i},images/{i}.jpg" for i in range(5)]
    listing.write_text("\n".join(["pano_id,lat,lon,image_uri", *rows, ""]))
    first = hedwig("embed", listing, "--model", "viclip-tiny", "--out", out, "--json")
    assert json.loads(first.stdout)["num_reused"] == 0
    before = read_vectors(storage.read_table(str(out)), "image_embedding")
    shutil.copy(images / "3.jpg", images / "2.jpg")
    changed = hedwig("embed", listing, "--model", "viclip-tiny", "--out", out, "--check-images", "--json")
    assert json.loads(changed.stdout)["num_reused"] == 4
    after = read_vectors(storage.read_table(str(out)), "image_embedding")
    np.testing.assert_array_equal(after[[0, 1, 3, 4]], before[[0, 1, 3, 4]])
    np.testing.assert_allclose(after[2], before[3], atol=1e-5)


def test_embed_names_a_misspelt_model(tmp_path, images):
    listing = tmp_path / "l.csv"
    listing.write_text(f"lat,lon,image_uri\n1,2,{images}/0.jpg\n")
    done = hedwig("embed", listing, "--model", "viclip-tini", "--out", tmp_path / "o")
    assert done.returncode == 1
    assert "did you mean 'viclip-tiny'?" in done.stderr
    done = hedwig("embed", listing, "embed.batchsize=2", "--model", "viclip-tiny", "--out", tmp_path / "o")
    assert done.returncode == 2
    assert "Did you mean 'batch_size'?" in done.stderr


def test_dry_run_says_how_much_and_writes_nothing(images, tmp_path, pytestconfig):
    listing = tmp_path / "listing.csv"
    listing.write_text(
        "lat,lon,image_uri\n" + "".join(f"{i},2,{images}/{i}.jpg\n" for i in range(1, 5)) + "95,1,x.jpg\n"
    )
    real = pytestconfig.rootpath / "experiments" / "real.yaml"
    arguments = ["run", real, f"data.panoramas={listing}", f"output={tmp_path}/run", "--dry-run", "--json"]
    done = hedwig(*arguments)
    assert done.returncode == 0, done.stderr
    outlook = json.loads(done.stdout)
    assert outlook["panoramas"] == "4 of 5 rows, 1 rejected"
    assert outlook["frames"].startswith("32 of")
    assert not (tmp_path / "run").exists()


def test_too_many_rejected_rows_exit_3_with_the_reasons(tmp_path, pytestconfig):
    listing = tmp_path / "listing.csv"
    listing.write_text("lat,lon,image_uri\n95,1,x.jpg\n96,1,y.jpg\n1,1,z.jpg\n")
    real = pytestconfig.rootpath / "experiments" / "real.yaml"
    done = hedwig("run", real, f"data.panoramas={listing}", f"output={tmp_path}/run")
    assert done.returncode == 3
    assert "3 of 3 rows were rejected" in done.stderr
    assert "2 x lat out of range" in done.stderr
