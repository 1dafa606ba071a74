"""Synthesis on Ray: every caption accounted for, only training rows ask, and what comes out says that it was made."""

from __future__ import annotations

import hashlib
import io
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
from hedwig.panorama import Slicing
from hedwig.pipelines.asked import read_asked
from hedwig.pipelines.synthesis import FrontView, synthesize
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
    assert result["split_unknown"] == 2
    assert "2 of 5 rows that ask name no split" in done.stderr
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
    digests = {name: hashlib.sha256((out / "images" / name).read_bytes()).hexdigest() for name in files}
    assert dict(zip(made["image_uri"].str.removeprefix("images/"), made["sha256"], strict=True)) == digests
    assert json.loads((out / "panoramas.card.json").read_text())["missing"]["sha256"] == 0
    # The listing is one like anybody's, and its rows are known as made.
    checked = check_listing(read_listing(str(out / "panoramas.csv")), image_root=str(out))
    assert checked.rejected.num_rows == 0
    assert all(is_synthesised(source) for source in checked.panoramas["source"].to_pylist())
    assert set(checked.panoramas["made_from"].to_pylist()) >= {"a", "b/../../etc"}
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
    later = str(tmp_path / "later.jpg")
    common = {"split": "train", "projection": "equirectangular", "caption": "the sea", "heading": 77.0}
    photo = {**common, "pano_id": "q", "image_uri": later, "projection": "perspective"}
    rows = [{**common, "pano_id": "p", "image_uri": uri}, photo]
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
    # What failed may succeed now, and is tried again.
    Image.new("RGB", (90, 60)).save(later)
    again = synthesize(
        str(tmp_path / "captions"), str(tmp_path / "out"), generator=options(checkpoint, controlnet=controlnet)
    )
    assert (again.num_out, again.num_rejected) == (2, 0)
    made = pd.read_csv(tmp_path / "out" / "panoramas.csv").sort_values("made_from").iloc[0]
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


def test_a_folder_with_somebody_elses_images_is_left_alone(checkpoint, tmp_path):
    listing, out = tmp_path / "captions.csv", tmp_path / "acquired"
    listing.write_text(LISTING)
    (out / "images").mkdir(parents=True)
    (out / "images" / "paid.jpg").write_bytes(b"paid")
    (out / "panoramas.csv").write_text("pano_id\n")
    with pytest.raises(ValueError, match=r"holds images, panoramas\.csv, and not from a synthesis"):
        synthesize(str(listing), str(out), generator=options(checkpoint))
    assert (out / "images" / "paid.jpg").read_bytes() == b"paid"
    assert sorted(path.name for path in out.iterdir()) == ["images", "panoramas.csv"]


def test_rows_without_a_split_are_counted(tmp_path, caplog):
    path = tmp_path / "c.csv"
    path.write_text("pano_id,caption\nx,sea\ny,red\n")
    assert read_asked(str(path)).split_unknown == 2
    assert "2 of 2 rows that ask name no split" in caplog.text
    caplog.clear()
    path.write_text("pano_id,caption,split\nx,sea,train\n")
    assert read_asked(str(path)).split_unknown == 0
    assert caplog.text == ""


def test_the_view_of_a_photograph_is_its_middle_square(tmp_path):
    """Left, middle and right third of another colour; the view shows the middle, whether it is said or seen."""

    def png(width, height):
        image = np.zeros((height, width, 3), np.uint8)
        for part in range(3):
            image[:, part * width // 3 : (part + 1) * width // 3, part] = 255
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        return buffer.getvalue()

    path = tmp_path / "c.csv"
    path.write_text(
        "pano_id,caption,split,projection,image_uri\na,sea,train,perspective,a\nb,sea,train,,b\nc,sea,train,,c\n"
        "d,sea,train,perspective,d\ne,sea,train,bearings,e\n"
    )
    asked = read_asked(str(path)).table
    assert asked["projection_known"].to_pylist() == [True, False, False, True, True]
    images = np.empty(5, dtype=object)
    images[:] = [png(180, 60), png(180, 60), png(120, 60), png(120, 60), png(120, 60)]
    batch = {name: np.array(asked[name].to_pylist(), dtype=object) for name in ("projection", "projection_known")}
    view = Slicing(mode="perspective", num_frames=1, frame_px=64, fov_deg=90.0, headings_deg=(0.0,))
    made = FrontView(view=view)({"image_bytes": images, **batch})
    assert made["frames"].shape == (5, 1, 64, 64, 3)
    assert [None if reason is None else reason.split(":")[0] for reason in made["failure"]] == [
        None, None, None, None, "Separate bearings have no view in front",
    ]  # fmt: skip
    for row in (0, 1):
        assert made["frames"][row, 0, :, 4:-4].reshape(-1, 3).min(axis=0).tolist() == [0, 255, 0]
    # Twice as wide as high and unsaid, it is a sphere: 90 degrees in front are 3/4 of the middle third on the horizon.
    assert (made["frames"][2, 0, 32, :, 1] == 255).all()
    assert made["frames"][3, 0, 32, 2].tolist() == [255, 0, 0]  # the middle 60 px show 10 px of either side
