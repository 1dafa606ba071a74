"""Resampling: exact sizes and phases whatever the scale, and a seam that cannot be seen."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from hedwig.panorama.resample import around, perspective_views, resize, resize_around


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("frame_px", [16, 112, 224, 336])
def test_resize_fills_its_result_at_every_height(frame_px):
    for height in range(20, 900, 13):
        assert resize(np.zeros((height, 9, 3), dtype=np.uint8), frame_px, 9).shape == (frame_px, 9, 3)


@pytest.mark.parametrize(("source", "target"), [((64, 64), (22, 22)), ((50, 70), (90, 31)), ((33, 33), (33, 33))])
def test_resize_is_pillow_bicubic(source, target):
    image = noise(*source)
    reference = np.asarray(Image.fromarray(image).resize(target[::-1], Image.Resampling.BICUBIC))
    assert np.abs(resize(image, *target).astype(int) - reference).max() <= 1


def test_resize_with_a_scale_shows_the_beginning_of_more():
    image = noise(64, 301)
    horizontal = 22 / 64.3
    result = resize(image, 22, 60, (22 / 64, horizontal))
    reference = Image.fromarray(image).resize((60, 22), Image.Resampling.BICUBIC, box=(0, 0, 60 / horizontal, 64))
    assert result.shape == (22, 60, 3)
    assert np.abs(result.astype(int) - np.asarray(reference)).max() <= 1


def test_around_is_modular_indexing():
    strip = noise(3, 10)
    for start, width in ((0, 10), (4, 3), (7, 8), (-3, 5), (25, 34), (9, 1)):
        assert np.array_equal(around(strip, start, width), strip[:, np.arange(start, start + width) % 10])


@pytest.mark.parametrize(("width", "turn"), [(96, 33), (101, 40), (64, 150)])
def test_resize_around_has_no_seam(width, turn):
    strip = noise(48, width)
    result = resize_around(strip, 17, turn, turn + 12)
    thrice = np.concatenate([strip] * 3, axis=1)
    box = (width, 0, width + (turn + 12) * width / turn, 48)
    reference = Image.fromarray(thrice).resize((turn + 12, 17), Image.Resampling.BICUBIC, box=box)
    assert np.abs(result.astype(int) - np.asarray(reference)).max() <= 1
    assert np.array_equal(result[:, :3], result[:, turn : turn + 3])


@pytest.mark.parametrize("height", [120, 128])
def test_a_uniform_sphere_gives_uniform_views(height):
    views = perspective_views(np.full((height, 256, 3), 77, dtype=np.uint8), (0.0, 180.0, -180.0), 40, 100.0, 10.0)
    assert (views == 77).all()
    assert views.shape == (3, 40, 40, 3)


def test_views_across_the_seam_equal_views_elsewhere():
    image = np.asarray(Image.fromarray(noise(16, 32)).resize((512, 256), Image.Resampling.BICUBIC)).copy()
    seam = perspective_views(image, (180.0, 0.0), 64, 90.0, 0.0)
    rolled = perspective_views(np.roll(image, 256, axis=1), (0.0, 180.0), 64, 90.0, 0.0)
    assert np.abs(seam.astype(int) - rolled).max() <= 1
