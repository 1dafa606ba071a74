"""Synthesis on Ray: every caption accounted for, only training rows ask, and what comes out says that it was made."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image
from tiny_diffusion import write_checkpoint, write_controlnet
from typer.testing import CliRunner

from hedwig import storage
from hedwig.cli import app
from hedwig.pipelines.asked import read_asked
from hedwig.pipelines.synthesis import synthesize
from hedwig.schema import SchemaError, captions_schema
from hedwig.sources import check_listing, read_listing
from hedwig.sources.synthesised import is_synthesised


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny-sd")


def options(checkpoint: Path, **changes) -> dict:
    return {"model": str(checkpoint), "num_steps": 2, "height_px": 64, "guidance": 1.0, "device": "cpu", **changes}


LISTING = """pano_id,latitude,lon,country,split,caption,source
a,10.5,20.25,KE,train,a quiet street,mapillary
b/../../etc,-1,2,,,"red houses, by the sea",mapillary
t,3,4,FR,test,the sea,mapillary
v,3,4,FR,val,the sea,mapillary
m,5,6,FR,train,the sea,synthesis:other
far,99,6,FR,train,the sea,mapillary
mute,5,6,FR,train,,mapillary
,,,,,LONG,
""".replace("LONG", "quiet street " * 50)


def test_a_listing_becomes_marked_panoramas(checkpoint, tmp_path, ray_session):
    listing, out = tmp_path / "captions.csv", tmp_path / "out"
    listing.write_text(LISTING)
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    arguments = [
        "synthesize", str(listing), "--model", str(checkpoint), "--out", str(out), "--steps", "2", "--height", "64",
        "--num-images-per-row", "2", "--format", "png", "--negative", "blur", "--max-rejected", "4", "--json",
    ]  # fmt: skip
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout[done.stdout.index("{") :])
    assert (result["num_in"], result["num_out"], result["num_rejected"]) == (10, 6, 4)
    assert result["reasons"] == {"position out of range": 2, "no caption": 2}
    assert result["left_out"] == {"split test": 1, "split val": 1, "made panorama": 1}
    assert result["num_captions_cut"] == 2
    made = pd.read_csv(out / "panoramas.csv")
    assert len(made) == 6
    assert set(made["split"]) == {"train"}
    assert set(made["source"]) == {"synthesis:tiny-sd"}
    assert made["licence"].str.contains("synthetic").all()
    assert made["heading"].isna().all()
    assert made["made_from"].value_counts()[["a", "b/../../etc"]].tolist() == [2, 2]
    first = made[made["made_from"] == "a"]
    assert first[["lat", "lon"]].to_numpy().tolist() == [[10.5, 20.25]] * 2
    assert first["seed"].nunique() == 2
    files = sorted(path.name for path in (out / "images").iterdir())
    assert sorted(f"images/{name}" for name in files) == sorted(made["image_uri"])
    assert {Image.open(out / "images" / name).size for name in files} == {(128, 64)}
    assert (out / "mine.txt").read_text() == "keep"
    # The listing is one like anybody's, and its rows are known as made.
    checked = check_listing(read_listing(str(out / "panoramas.csv")), image_root=str(out))
    assert checked.rejected.num_rows == 0
    assert all(is_synthesised(source) for source in checked.panoramas["source"].to_pylist())
    assert set(checked.panoramas["split"].to_pylist()) == {"train", "query"}  # the caption without a position
    # The same again has nothing to do.
    written = (out / "manifest.json").stat().st_mtime_ns
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert (out / "manifest.json").stat().st_mtime_ns == written
    bad = CliRunner().invoke(app, [*arguments[:3], str(tmp_path / "nowhere"), *arguments[4:]])
    assert bad.exit_code == 2
    assert "No checkpoint folder" in bad.output


@pytest.mark.slow  # each synthesis starts an actor that imports diffusers
def test_a_killed_run_goes_on_and_another_seed_begins_anew(checkpoint, tmp_path, ray_session):
    listing, out = tmp_path / "captions.csv", tmp_path / "out"
    listing.write_text(LISTING)
    settings = {"generator": options(checkpoint), "num_images_per_row": 2, "max_rejected": 4}
    assert synthesize(str(listing), str(out), **settings).num_out == 6
    times = {path.name: path.stat().st_mtime_ns for path in (out / "images").iterdir()}
    (out / "manifest.json").unlink()
    (out / "rows" / "manifest.json").unlink()
    again = synthesize(str(listing), str(out), **settings)  # tries only the rejected rows
    assert (again.num_out, again.num_rejected) == (6, 4)
    assert {path.name: path.stat().st_mtime_ns for path in (out / "images").iterdir()} == times
    other = synthesize(str(listing), str(out), **{**settings, "generator": options(checkpoint, seed=1)})
    assert other.num_out == 6
    assert not set(times) & {path.name for path in (out / "images").iterdir()}


@pytest.mark.slow
def test_a_view_and_a_caption_make_a_panorama(checkpoint, tmp_path, ray_session):
    rng = np.random.default_rng(0)
    uri = str(tmp_path / "p.jpg")
    Image.fromarray(rng.integers(0, 255, (64, 128, 3), dtype=np.uint8)).save(uri)
    common = {"split": "train", "projection": "equirectangular", "caption": "the sea", "heading": 77.0}
    rows = [{**common, "pano_id": "p", "image_uri": uri}, {**common, "pano_id": "q", "image_uri": "/nowhere.jpg"}]
    table = pa.Table.from_pylist(rows, schema=captions_schema())
    storage.write_table(str(tmp_path / "captions" / "part-0.parquet"), table)
    controlnet = str(write_controlnet(tmp_path / "sd-i2p"))
    manifest = synthesize(
        str(tmp_path / "captions"),
        str(tmp_path / "out"),
        generator=options(checkpoint, controlnet=controlnet),
        max_rejected=1,
    )
    assert (manifest.num_out, manifest.rejected_reasons) == (1, {"image not found": 1})
    made = pd.read_csv(tmp_path / "out" / "panoramas.csv").iloc[0]
    assert (made["heading"], made["source"]) == (77.0, "synthesis:tiny-sd+sd-i2p")
    assert Image.open(tmp_path / "out" / made["image_uri"]).size == (128, 64)


def test_who_may_ask(tmp_path):
    path = tmp_path / "c.csv"
    path.write_text(LISTING)
    asked = read_asked(str(path))
    assert asked.table["pano_id"].to_pylist()[:4] == ["a", "b/../../etc", "far", "mute"]
    assert asked.table["lat"].to_pylist()[:3] == [10.5, -1.0, None]
    faults = asked.table["fault"].to_pylist()
    assert faults[:2] == [None, None]
    assert faults[2].startswith("position out of range: lat=99")
    assert (faults[3], faults[4]) == ("no caption", None)
    path.write_text("pano_id,caption,split\nx,sea,train\nx,red,train\ny,blue,tarin\n")
    assert [f and f.split(":")[0] for f in read_asked(str(path)).table["fault"].to_pylist()] == [
        None, "duplicate pano_id", "unknown split",
    ]  # fmt: skip
    path.write_text("caption,split\nsea,test\nred,buffer\nblue,query\n")
    with pytest.raises(ValueError, match="None of the 3 rows"):
        read_asked(str(path))
    path.write_text("text\nsea\n")
    with pytest.raises(SchemaError, match="caption"):
        read_asked(str(path))
    with pytest.raises(FileNotFoundError, match="No captions"):
        read_asked(str(tmp_path / "nothing.csv"))
