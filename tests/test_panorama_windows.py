"""Where frames lie: read back from frames of an image whose colours are its columns."""

from __future__ import annotations

import numpy as np
import pytest

from hedwig.panorama import Slicing, frame_windows, slice_panorama

SIDE = 32


def columns(height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8: red and green are cosine and sine of the column's share of a turn."""
    turn = 2 * np.pi * (np.arange(width) + 0.5) / width
    row = np.stack([127.5 + 120 * np.cos(turn), 127.5 + 120 * np.sin(turn), np.zeros(width)], axis=1)
    return np.broadcast_to(np.rint(row).astype(np.uint8), (height, width, 3)).copy()


def share_seen(frame: np.ndarray, column: float) -> float:
    """Which share of the image's width a frame shows at a share of its own width."""
    position = column * SIDE - 0.5
    left = int(np.floor(position))
    middle = frame[SIDE // 2].astype(float)
    red, green, _ = middle[left] * (1 - position + left) + middle[left + 1] * (position - left)
    return float(np.arctan2(green - 127.5, red - 127.5) / (2 * np.pi) % 1)


def apart(a: float, b: float) -> float:
    return abs((a - b + 0.5) % 1 - 0.5)


CASES = [
    ({"mode": "wrap"}, "equirectangular", (256, 512), np.nan),
    ({"mode": "wrap", "num_frames": 5}, "equirectangular", (256, 512), np.nan),
    ({"mode": "wrap", "align_north": True}, "equirectangular", (256, 512), 70.0),
    ({"mode": "wrap", "num_frames": 3, "headings_deg": (0.0, 90.0, 200.0)}, "equirectangular", (256, 512), np.nan),
    (
        {"mode": "wrap", "num_frames": 2, "headings_deg": (0.0, 90.0), "align_north": True},
        "equirectangular",
        (256, 512),
        -30.0,
    ),
    ({"mode": "wrap"}, "frame strip", (64, 512), np.nan),
    ({"mode": "paper"}, "equirectangular", (256, 512), np.nan),
    ({"mode": "paper", "stride_px": 333, "num_frames": 4}, "equirectangular", (256, 512), np.nan),
    ({"mode": "paper", "align_north": True}, "equirectangular", (256, 512), 100.0),
    ({"mode": "perspective", "num_frames": 4}, "equirectangular", (256, 512), np.nan),
    (
        {"mode": "perspective", "num_frames": 4, "fov_deg": 60.0, "align_north": True},
        "equirectangular",
        (256, 512),
        33.0,
    ),
    ({"mode": "wrap", "num_frames": 4}, "perspective", (128, 300), np.nan),
]


@pytest.mark.parametrize(("options", "projection", "shape", "heading"), CASES)
def test_windows_are_where_the_frames_were_cut(options, projection, shape, heading):
    slicing = Slicing(frame_px=SIDE, **options)
    frames = slice_panorama(columns(*shape), slicing, projection=projection, heading=heading)
    windows = frame_windows([shape], slicing, projection=projection, heading=heading)
    assert len(windows) == len(frames) == slicing.num_frames
    for frame, window in zip(frames, windows, strict=True):
        assert 0 <= window.x0 < 1
        assert window.x0 < window.x1
        assert apart(share_seen(frame, 0.5), (window.x0 + window.x1) / 2) < 0.01
        if options["mode"] != "perspective":  # whose columns are not evenly spaced
            for at in (0.25, 0.75):
                assert apart(share_seen(frame, at), window.x0 + at * (window.x1 - window.x0)) < 0.012
        if projection == "perspective":
            assert window.heading_deg is window.fov_deg is None
            continue
        known = 0.0 if np.isnan(heading) else heading
        if window.heading_deg is not None:
            assert 0 <= window.heading_deg < 360
            assert apart((window.heading_deg - known) / 360 + 0.5, (window.x0 + window.x1) / 2) < 1e-9
            assert window.fov_deg == pytest.approx(360 * (window.x1 - window.x0))
        assert (window.heading_deg is None) == (projection == "frame strip" and options["mode"] == "paper")


def test_a_north_aligned_frame_looks_north():
    slicing = Slicing(mode="wrap", num_frames=2, headings_deg=(0.0, 90.0), align_north=True)
    windows = frame_windows([(256, 512)], slicing, projection="equirectangular", heading=200.0)
    assert [min(w.heading_deg, 360 - w.heading_deg) for w in windows] == pytest.approx([0, 90], abs=0.5)


def test_photographs_lie_side_by_side_by_heading():
    shapes = [(100, 300), (50, 50), (100, 100)]  # at one height of 50: widths 150, 50, 50
    slicing = Slicing(mode="bearings", num_frames=3)
    windows = frame_windows(shapes, slicing, projection="bearings", bearings_deg=[370, 200, -90])
    assert [w.heading_deg for w in windows] == [10, 200, 270]
    assert [(w.x0 * 250, w.x1 * 250) for w in windows] == [(50, 100), (150, 200), (200, 250)]
    wrapped = frame_windows(shapes, Slicing(num_frames=5), projection="bearings", bearings_deg=[370, 200, -90])
    assert [w.x0 for w in wrapped] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert all(w.x1 - w.x0 == pytest.approx(50 / 250) for w in wrapped)
