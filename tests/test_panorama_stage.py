"""The stage: rows stay rows, a bad one says why, and threads change nothing."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from hedwig.panorama import PanoramaSlicer, Slicing, content_hash, decode_image, slice_panorama


def encoded(seed, height=64, width=256, **options):
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def batch_of(items, projections, headings=None, **columns):
    image_bytes = np.empty(len(items), dtype=object)
    image_bytes[:] = items
    headings = [np.nan] * len(items) if headings is None else headings
    return {
        "image_bytes": image_bytes,
        "projection": np.array(projections, dtype=object),
        "heading": np.array(headings, dtype=object),
        **columns,
    }


def test_frames_are_those_of_slice_panorama_and_columns_pass_through():
    items = [encoded(seed) for seed in range(5)]
    slicing = Slicing(mode="wrap", frame_px=32, num_frames=4, align_north=True)
    batch = batch_of(items, ["equirectangular"] * 5, [0.0, 90.0, None, np.nan, 359.0], pano_id=np.arange(5))
    result = PanoramaSlicer(slicing=slicing, num_threads=3)(batch)
    assert result["frames"].shape == (5, 4, 32, 32, 3)
    assert result["frames"].dtype == np.uint8
    for row, heading in enumerate([0.0, 90.0, np.nan, np.nan, 359.0]):
        expected = slice_panorama(decode_image(items[row]), slicing, projection="equirectangular", heading=heading)
        assert np.array_equal(result["frames"][row], expected)
    assert result["content_hash"].tolist() == [content_hash(item) for item in items]
    assert result["failure"].tolist() == [None] * 5
    assert result["pano_id"] is batch["pano_id"]
    assert set(PanoramaSlicer.writes) <= set(result)
    assert "frames" not in batch


def test_a_bad_row_says_why_and_the_others_are_done():
    good = encoded(0)
    items = [good, b"", b"<html>", good[: len(good) // 2], None, good, good]
    projections = ["equirectangular"] * 5 + ["cubemap", "bearings"]
    result = PanoramaSlicer(slicing=Slicing(frame_px=16))(batch_of(items, projections))
    words = [None, "empty", "Not a JPEG", "cut short", "must be bytes", "cubemap", "needs a list of images"]
    for failure, word in zip(result["failure"], words, strict=True):
        assert (failure is None) if word is None else (word in failure)
    assert result["frames"][0].any()
    assert not result["frames"][1:].any()


@pytest.mark.parametrize("container", [list, tuple, lambda items: np.array(items, dtype=object)])
def test_bearings_come_as_a_list_of_files_with_their_headings(container):
    files, bearings = [encoded(seed, 64, 64) for seed in range(3)], [200.0, 10.0, 90.0]
    items = np.empty(1, dtype=object)
    items[0] = container(files)
    batch = batch_of(items, ["bearings"], bearing_deg=np.array([bearings], dtype=object))
    slicing = Slicing(mode="bearings", num_frames=3, frame_px=64)
    result = PanoramaSlicer(slicing=slicing)(batch)
    assert result["failure"].tolist() == [None]
    images = [decode_image(files[index]) for index in (1, 2, 0)]
    assert np.abs(result["frames"][0].astype(int) - np.stack(images)).max() <= 1
    assert result["content_hash"][0] == content_hash(files)
    without = {name: column for name, column in batch.items() if name != "bearing_deg"}
    assert "bearing_deg" in PanoramaSlicer(slicing=slicing)(without)["failure"][0]


def test_position_in_exif_changes_the_hash_but_not_the_frames():
    exif = Image.Exif()
    exif.get_ifd(0x8825).update({1: "S", 2: (33.0, 55.0, 0.0), 3: "W", 4: (18.0, 25.0, 0.0)})
    rows = PanoramaSlicer(slicing=Slicing(frame_px=32))(
        batch_of([encoded(3), encoded(3, exif=exif)], ["equirectangular"] * 2)
    )
    assert np.array_equal(rows["frames"][0], rows["frames"][1])
    assert rows["content_hash"][0] != rows["content_hash"][1]


def test_half_size_is_passed_to_the_decoder():
    item = encoded(1, 128, 512)
    slicing = Slicing(frame_px=16, half_size=True)
    result = PanoramaSlicer(slicing=slicing)(batch_of([item], ["equirectangular"]))
    half = decode_image(item, half_size=True)
    assert half.shape == (64, 256, 3)
    assert np.array_equal(result["frames"][0], slice_panorama(half, slicing, projection="equirectangular"))


def test_an_empty_batch_and_a_wrong_number_of_threads():
    result = PanoramaSlicer(slicing=Slicing(frame_px=16))(batch_of([], []))
    assert result["frames"].shape == (0, 8, 16, 16, 3)
    with pytest.raises(ValueError, match="num_threads is 0"):
        PanoramaSlicer(slicing=Slicing(), num_threads=0)
