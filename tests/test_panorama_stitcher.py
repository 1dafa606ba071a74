"""The stage: a row of bearings becomes a panorama that the slicer takes; other rows pass, bad ones say why."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from hedwig.panorama import PanoramaSlicer, Slicing, decode_image
from hedwig.panorama.stitch import cut_bearings
from hedwig.panorama.stitcher import ViewStitcher


def jpeg(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def smooth(width=256):
    turn = np.arange(width) / width * 2 * np.pi
    row = np.stack([128 + 100 * np.sin(turn), 128 + 100 * np.cos(turn), 128 + 60 * np.sin(2 * turn)], axis=-1)
    return np.repeat(row[None], width // 2, axis=0).astype(np.uint8)


def test_bearings_become_a_panorama_and_other_rows_stay():
    bearings = [0.0, 90.0, 180.0, 270.0]
    files = [jpeg(view) for view in cut_bearings(smooth(), 0.0, bearings, frame_px=96, fov_deg=100)]
    plain = jpeg(smooth())
    items, degrees = np.empty(3, dtype=object), np.empty(3, dtype=object)
    items[:] = [files, plain, files[:3]]
    degrees[:] = [bearings, None, bearings[:3]]
    batch = {
        "image_bytes": items,
        "projection": np.array(["bearings", "equirectangular", "bearings"], dtype=object),
        "heading": np.array([135.0, None, 90.0], dtype=object),
        "bearing_deg": degrees,
        "pano_id": np.array(["a", "b", "c"], dtype=object),
    }
    stage = ViewStitcher(fov_deg=100, height_px=128, heading_deg=0.0)
    made = stage(batch)
    assert set(stage.writes) <= set(made)
    assert made["failure"][0] is None
    assert made["failure"][1] is None
    assert "gap of 80.0 degrees between headings 180 and 0" in made["failure"][2]
    assert made["projection"].tolist()[:2] == ["equirectangular", "equirectangular"]
    assert made["heading"][0] == 0
    assert np.isnan(made["heading"][1])
    assert made["image_bytes"][1] is plain
    assert batch["image_bytes"][0] is files  # the batch that came in is untouched
    assert decode_image(made["image_bytes"][0]).shape == (128, 256, 3)
    assert 0 < made["band_deg"][0] < 100
    assert np.isnan(made["band_deg"][1])

    slicing = Slicing(mode="perspective", num_frames=4, frame_px=64, fov_deg=60)
    two = {name: column[:2] for name, column in made.items() if name != "failure"}
    frames = PanoramaSlicer(slicing=slicing)(two)["frames"]
    assert np.abs(frames[0].astype(int) - frames[1]).max() <= 8  # JPEG twice


def test_the_field_of_view_is_the_rows_and_another_one_is_refused():
    bearings = [0.0, 90.0, 180.0, 270.0]
    views = {
        fov: [jpeg(v) for v in cut_bearings(smooth(), 0.0, bearings, frame_px=96, fov_deg=fov)] for fov in (90, 110)
    }
    items, degrees = np.empty(3, dtype=object), np.empty(3, dtype=object)
    items[:], degrees[:] = [views[110], views[90], views[90]], [bearings] * 3
    batch = {
        "image_bytes": items,
        "projection": np.full(3, "bearings", dtype=object),
        "heading": np.zeros(3),
        "bearing_deg": degrees,
        "fov_deg": np.array([110.0, 90.0, np.nan]),
    }
    made = ViewStitcher(height_px=64)(batch)
    assert made["failure"].tolist() == [None, None, None]
    assert made["overlap_deg"] == pytest.approx([20.0, 0.0, 0.0], abs=1e-6)
    asked = ViewStitcher(height_px=64, fov_deg=110)(batch)
    assert [reason and reason.split(";")[0] for reason in asked["failure"]] == [
        None, "fov mismatch: fov_deg is 110, and the row says 90", None,
    ]  # fmt: skip
