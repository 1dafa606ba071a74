"""The commands about data, as a user runs them: counts, files, reasons, and what comes next takes their output."""

from __future__ import annotations

import csv
import hashlib
import json
import logging

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from hedwig.cli import app
from hedwig.cli.console import console
from hedwig.panorama.stitch import cut_bearings
from hedwig.sources import check_listing, read_listing
from hedwig.synthetic import encode_jpeg, render_panorama


def hedwig(*arguments):
    """The command in this process: starting one for each costs 20 times what they do."""
    logger = logging.getLogger("hedwig")
    before = logger.handlers, logger.level, logger.propagate, console.quiet, console.json
    try:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])
    finally:
        logger.handlers, level, logger.propagate, console.quiet, console.json = before
        logger.setLevel(level)


def rows_of(path):
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def card_of(listing):
    assert listing.with_name(f"{listing.name}.card.html").exists()
    return json.loads(listing.with_name(f"{listing.name}.card.json").read_text())


def street(name, lat=48.0):
    row = {"pano_id": name, "lat": lat, "lon": 9.0, "heading": 0.0, "country": "DE", "captured_at": "2023-06-01"}
    return render_panorama(row, width=512)


@pytest.fixture(scope="module")
def bearings(tmp_path_factory):
    """Two places with eight pictures each, one with a gap, and a row without a heading."""
    folder = tmp_path_factory.mktemp("bearings")
    rows = []
    for place, keep in (("a", 8), ("b", 8), ("c", 5)):
        views = cut_bearings(street(place), 0.0, [45.0 * i for i in range(8)], frame_px=200)
        for index in range(keep):
            name = f"{place}_{45 * index:03d}.jpg"
            (folder / name).write_bytes(encode_jpeg(views[index], 92))
            rows.append(f"{place},48,9,{45 * index},{name},DE,Street View,terms")
    rows.append("d,48,9,,d.jpg,DE,,")
    header = "pano_id,lat,lon,heading,image_uri,country,source,licence\n"
    (folder / "panoramas.csv").write_text(header + "\n".join(rows) + "\n")
    return folder


def test_stitch_writes_panoramas_a_listing_and_the_reasons(bearings, tmp_path):
    out = tmp_path / "stitched"
    done = hedwig("stitch", bearings / "panoramas.csv", "--out", out, "--fov", 90, "--height", 256, "--json")
    assert done.exit_code == 3, done.stderr
    result = json.loads(done.stdout)
    assert (result["num_in"], result["num_out"], result["num_rejected"]) == (4, 2, 2)
    reasons = {row["pano_id"]: row["reason"] for row in rows_of(out / "rejected.csv")}
    assert reasons["d"].startswith("no heading")
    assert "a gap of 90.0 degrees between headings 180 and 0" in reasons["c"]
    rows = rows_of(out / "panoramas.csv")
    assert [row["pano_id"] for row in rows] == ["a", "b"]
    first = rows[0]
    assert (first["projection"], first["heading"], first["num_bearings"]) == ("equirectangular", "0.0", "8")
    assert (first["source"], first["licence"], first["image_uri"]) == ("Street View", "terms", "images/a.jpg")
    data = (out / "images" / "a.jpg").read_bytes()
    assert first["sha256"] == hashlib.sha256(data).hexdigest()
    card = card_of(out / "panoramas")
    assert (card["num_panoramas"], card["missing"]["sha256"], card["counts"]["licence"]) == (2, 0, {"terms": 2})
    found = np.asarray(Image.open(out / "images" / "a.jpg")).astype(int)
    band = slice(128 - 50, 128 + 50)
    assert np.abs(found - street("a"))[band].mean() < 5
    assert np.abs(found - np.roll(street("a"), 256, axis=1))[band].mean() > 8  # and not turned round
    # What comes next takes it.
    checked = check_listing(read_listing(str(out / "panoramas.csv")), image_root=str(out))
    assert checked.panoramas.num_rows == 2
    done = hedwig("slice", out / "panoramas.csv", "--out", tmp_path / "frames", "--mode", "perspective", "--fov", 60)
    assert done.exit_code == 0, done.stderr


def test_stitch_takes_a_folder_and_makes_strips(bearings, tmp_path):
    folder = tmp_path / "pictures"
    (folder / "b").mkdir(parents=True)
    for file in bearings.glob("a_*.jpg"):
        (folder / file.name).write_bytes(file.read_bytes())
    for file in bearings.glob("b_*.jpg"):
        (folder / "b" / file.name.removeprefix("b_")).write_bytes(file.read_bytes())
    out = tmp_path / "strips"
    done = hedwig("stitch", folder, "--out", out, "--projection", "strip", "--height", 128)
    assert done.exit_code == 0, done.stderr
    assert "2 of 2 stitched" in done.stdout
    assert "band_deg=84.5" in done.stdout
    rows = rows_of(out / "panoramas.csv")
    assert {row["projection"] for row in rows} == {"frame strip"}
    assert {row["split"] for row in rows} == {"query"}  # a folder knows no positions
    assert np.asarray(Image.open(out / "images" / "b.jpg")).min(axis=2).max(axis=1).min() > 0
    assert not (out / "rejected.csv").exists()
    done = hedwig("stitch", tmp_path / "strips" / "images", "--out", tmp_path / "x")
    assert done.exit_code == 2
    assert "PANO_HEADING.jpg" in done.stderr


def test_check_images_finds_bad_and_double_ones(tmp_path):
    good, other = street("a"), street("b", lat=-33.0)
    images = {
        "good": good, "other": other, "turned": np.roll(good, 170, axis=1),
        "grey": np.full((256, 512, 3), 228, np.uint8),
    }  # fmt: skip
    for name, image in images.items():
        (tmp_path / f"{name}.jpg").write_bytes(encode_jpeg(np.ascontiguousarray(image), 80))
    (tmp_path / "text.jpg").write_text("not an image")
    names = [*images, "text", "gone"]
    lines = [f"{name},48,9,{name}.jpg" for name in names] + ["far,95,9,good.jpg"]
    (tmp_path / "l.csv").write_text("pano_id,lat,lon,image_uri\n" + "\n".join(lines) + "\n")
    out = tmp_path / "checked"
    done = hedwig("check-images", tmp_path / "l.csv", "--out", out, "--json")
    assert done.exit_code == 3, done.stderr  # something was rejected
    result = json.loads(done.stdout)
    assert (result["num_in"], result["num_out"], result["num_rejected"], result["num_duplicates"]) == (7, 3, 4, 1)
    reasons = {row["pano_id"]: row["reason"] for row in rows_of(out / "rejected.csv")}
    assert reasons["grey"].startswith("blank or no imagery")
    assert reasons["text"].startswith("Not a JPEG")
    assert reasons["gone"].startswith("image not found")
    assert reasons["far"].startswith("lat out of range")
    quality = {row["pano_id"]: row for row in rows_of(out / "quality.csv")}
    assert list(quality) == names
    assert quality["turned"]["duplicate_of"] == "good"
    assert float(quality["good"]["sharpness"]) > 15
    assert quality["gone"]["sharpness"] == ""
    kept = check_listing(read_listing(str(out / "panoramas.csv")), image_root=str(out))
    assert kept.panoramas["pano_id"].to_pylist() == ["good", "other", "turned"]
    assert kept.panoramas["sha256"][0].as_py() == hashlib.sha256((tmp_path / "good.jpg").read_bytes()).hexdigest()
    assert card_of(out / "panoramas")["num_panoramas"] == 3
    (tmp_path / "fine.csv").write_text("pano_id,lat,lon,image_uri\ngood,48,9,good.jpg\n")
    assert hedwig("check-images", tmp_path / "fine.csv").exit_code == 0

    done = hedwig("check-images", tmp_path / "l.csv", "--out", out, "--drop-duplicates")
    assert "same" not in done.stdout
    assert "near duplicate: of 'good'" in done.stdout
    assert "2 of 7 kept, 1 near duplicates." in done.stdout


def test_listing_reads_a_folder_of_photographs(tmp_path):
    tags = Image.Exif()
    tags.get_ifd(0x8825).update({1: "N", 2: (48.0, 30.0, 0.0), 3: "E", 4: (9.0, 0.0, 0.0), 16: "T", 17: 45.0})
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (200, 100), "red").save(tmp_path / "photos" / "a.jpg", exif=tags.tobytes())
    Image.new("RGB", (120, 100), "blue").save(tmp_path / "photos" / "b.jpg")
    Image.new("RGB", (120, 100), "blue").save(tmp_path / "photos" / "copy of b.jpg")
    out = tmp_path / "panoramas.csv"
    done = hedwig(
        "listing", "folder", tmp_path / "photos", "--licence", "CC0", "--source", "me", "--out", out, "--json"
    )
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["num_in"], result["num_out"], result["num_located"]) == (3, 2, 1)
    assert result["reasons"] == {"duplicate pano_id": 1}
    row = rows_of(out)[0]
    assert (row["lat"], row["lon"], row["heading"], row["projection"]) == ("48.5", "9.0", "45.0", "equirectangular")
    assert (row["image_uri"], row["licence"], row["source"]) == ("photos/a.jpg", "CC0", "me")
    assert row["sha256"] == hashlib.sha256((tmp_path / "photos" / "a.jpg").read_bytes()).hexdigest()
    assert result["card"] == str(tmp_path / "panoramas.card.html")
    assert card_of(tmp_path / "panoramas")["counts"]["licence"] == {"CC0": 2}
    assert rows_of(tmp_path / "panoramas.rejected.csv")[0]["image_uri"].endswith("copy of b.jpg")

    parquet = tmp_path / "again.parquet"
    done = hedwig("listing", "csv", out, "--out", parquet)
    assert done.exit_code == 0, done.stderr
    assert "2 of 2 rows, 1 with a position" in done.stdout
    again = check_listing(read_listing(str(parquet)), image_root=str(tmp_path)).panoramas
    first = check_listing(read_listing(str(out)), image_root=str(tmp_path)).panoramas
    assert again.equals(first)


def test_listing_refuses_data_without_a_usable_row(tmp_path):
    (tmp_path / "train.csv").write_text("IMG_ID\nYYcmZ_mdbshez6STxSxmRQ_0.png\n")
    done = hedwig("listing", "g3", tmp_path / "train.csv", "--out", tmp_path / "l.csv")
    assert done.exit_code == 3
    assert "1 x no image_uri" in done.stdout
    assert rows_of(tmp_path / "l.rejected.csv")[0]["pano_id"] == "YYcmZ_mdbshez6STxSxmRQ"
    assert hedwig("listing", "g3", tmp_path / "train.csv", "--out", tmp_path / "l.txt").exit_code == 2
    assert hedwig("listing", "osv5m", tmp_path / "none.csv", "--out", tmp_path / "l.csv").exit_code == 2
    done = hedwig("listing", "kaggle", tmp_path / "train.csv", "--out", tmp_path / "l.csv")
    assert done.exit_code == 3
    assert "lacks the column(s) id, lat, lng; it has img_id" in done.stderr


def test_a_listing_counts_the_same_bytes_unless_told_not_to_read_them(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encode_jpeg(street("a"), 80))
    (tmp_path / "in.csv").write_text("pano_id,lat,lon,image_uri,author\na,48,9,a.jpg,Ann\nb,48,9,a.jpg,Ann\n")
    for flag, same in (("--sha256", 1), ("--no-sha256", 0)):
        assert hedwig("listing", "csv", tmp_path / "in.csv", "--out", tmp_path / "out.csv", flag).exit_code == 0
        card = card_of(tmp_path / "out")
        assert (card["duplicates"]["same_sha256"], card["counts"]["author"]) == (same, {"Ann": 2})


def test_what_is_read_is_never_written_over(bearings, tmp_path):
    (tmp_path / "data").mkdir()
    listing = tmp_path / "data" / "panoramas.csv"
    before = (bearings / "panoramas.csv").read_text()
    listing.write_text(before)
    for command in (
        ("stitch", listing, "--out", tmp_path / "data"),
        ("check-images", listing, "--out", tmp_path / "x" / ".." / "data", "--layout", "bearings"),
        ("listing", "csv", listing, "--out", listing),
    ):
        done = hedwig(*command)
        assert done.exit_code == 1, done.stdout
        assert "would be overwritten" in done.stderr
        assert listing.read_text() == before
    (tmp_path / "a.rejected.csv").write_text(before)
    assert hedwig("listing", "csv", tmp_path / "a.rejected.csv", "--out", tmp_path / "a.csv").exit_code == 1
    assert (tmp_path / "a.rejected.csv").read_text() == before
    (tmp_path / "images").mkdir()
    rows = [f"a,{45 * i},images/{'a' if i == 0 else i}.jpg,48,9" for i in range(8)]
    (tmp_path / "l.csv").write_text("pano_id,heading,image_uri,lat,lon\n" + "\n".join(rows) + "\n")
    done = hedwig("stitch", tmp_path / "l.csv", "--out", tmp_path)
    assert (done.exit_code, "images/a.jpg is one of the pictures" in done.stderr) == (1, True)


def test_stitch_takes_the_listings_field_of_view_and_refuses_another(tmp_path):
    lines = []
    for index, view in enumerate(cut_bearings(street("a"), 0.0, [45.0 * i for i in range(8)], fov_deg=60, frame_px=96)):
        (tmp_path / f"{index}.jpg").write_bytes(encode_jpeg(view, 92))
        lines.append(f"a,48,9,{45 * index},{index}.jpg,60")
    listing = tmp_path / "l.csv"
    listing.write_text("pano_id,lat,lon,heading,image_uri,fov_deg\n" + "\n".join(lines) + "\n")
    done = hedwig("stitch", listing, "--out", tmp_path / "out", "--height", 128)
    assert done.exit_code == 0, done.stderr
    row = rows_of(tmp_path / "out" / "panoramas.csv")[0]
    assert float(row["overlap_deg"]) == pytest.approx(15.0)
    assert row["fov_deg"] == ""  # a sphere has none
    done = hedwig("stitch", listing, "--out", tmp_path / "other", "--height", 128, "--fov", 90)
    assert done.exit_code == 3
    assert "fov mismatch" in rows_of(tmp_path / "other" / "rejected.csv")[0]["reason"]
    # Bearings keep their digests and their field of view through a check.
    done = hedwig("check-images", listing, "--layout", "bearings", "--out", tmp_path / "checked", "--min-sharpness", 0)
    assert done.exit_code == 0, done.stdout
    kept = rows_of(tmp_path / "checked" / "panoramas.csv")
    assert {row["fov_deg"] for row in kept} == {"60.0"}
    files = [(tmp_path / f"{index}.jpg").read_bytes() for index in range(8)]
    assert [row["sha256"] for row in kept] == [hashlib.sha256(data).hexdigest() for data in files]
