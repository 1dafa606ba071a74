"""Stitching undoes slicing: pixels, geometry, seams and gaps; against a per-pixel twin, too."""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from hedwig.panorama import Slicing, slice_panorama, stitch
from hedwig.panorama.stitch import cut_bearings, stitch_views
from hedwig.synthetic import render_panorama

BEARINGS = tuple(45.0 * index + 10 for index in range(8))


def sphere(width=1024):
    """A smooth, textured panorama whose centre column has heading 0, as a function on the sphere: no seam anywhere."""
    height = width // 2
    elevation = np.pi / 2 - (np.arange(height) + 0.5) / height * np.pi
    turn = ((np.arange(width) + 0.5) / width - 0.5) * 2 * np.pi
    turn, elevation = np.meshgrid(turn, elevation)
    x, y, z = np.cos(elevation) * np.sin(turn), np.cos(elevation) * np.cos(turn), np.sin(elevation)
    red = 128 + 60 * np.sin(7 * x + 3 * z) + 40 * np.sin(23 * y - 9 * z + 1) * np.cos(17 * x)
    green = 128 + 80 * np.sin(11 * y + 5 * x) * np.cos(13 * z)
    blue = 128 + 70 * np.cos(19 * z + 6 * x * y) + 20 * np.sin(40 * x)
    return np.stack([red, green, blue], axis=-1).clip(0, 255).astype(np.uint8)


def psnr(left, right, mask=None):
    error = (left.astype(np.float64) - right) ** 2
    return 10 * math.log10(255**2 / (error if mask is None else error[mask]).mean())


@pytest.mark.parametrize(("fov", "at_least_db", "share"), [(90, 60, 0.49), (60, 55, 0.32)])
def test_eight_bearings_of_a_known_panorama_give_it_back(fov, at_least_db, share):
    image = sphere()
    views = cut_bearings(image, 30.0, BEARINGS, fov_deg=fov, frame_px=512)
    panorama = stitch_views(list(views), BEARINGS, fov_deg=fov, height_px=512, heading_deg=30.0)
    assert panorama.image.shape == (512, 1024, 3)
    assert psnr(panorama.image, image, panorama.mask) > at_least_db
    assert not panorama.image[~panorama.mask].any()
    assert panorama.mask.mean() == pytest.approx(share, abs=0.01)
    assert panorama.overlap_deg == pytest.approx(fov - 45)
    # Half way between two views 45 degrees apart the upper edge lies at atan(tan(fov / 2) cos 22.5).
    lowest_edge = math.degrees(math.atan(math.tan(math.radians(fov / 2)) * math.cos(math.radians(22.5))))
    assert panorama.band_deg == pytest.approx(2 * lowest_edge, abs=2.1)
    assert panorama.band_deg <= 2 * lowest_edge
    rows = np.abs(90 - (np.arange(512) + 0.5) / 512 * 180) < panorama.band_deg / 2
    assert panorama.mask[rows].all()
    assert np.array_equal(panorama.coverage == 1, panorama.mask.all(axis=1))


@pytest.mark.parametrize(("fov", "at_least_db"), [(90, 40), (60, 40)])
def test_a_rendered_street_comes_back(fov, at_least_db):
    row = {"pano_id": "a", "lat": 48.0, "lon": 9.0, "heading": 0.0, "country": "DE", "captured_at": "2023-06-01"}
    image = render_panorama(row, width=1024)
    views = cut_bearings(image, 0.0, BEARINGS, fov_deg=fov, frame_px=512)
    panorama = stitch_views(list(views), BEARINGS, fov_deg=fov)
    assert psnr(panorama.image, image, panorama.mask) > at_least_db


def test_views_of_the_stitched_are_views_of_the_original():
    image = sphere()
    views = cut_bearings(image, 0.0, BEARINGS, fov_deg=90, frame_px=512)
    panorama = stitch_views(list(views), BEARINGS)
    slicing = Slicing(mode="perspective", frame_px=224, fov_deg=60, headings_deg=(3.0, 32.5, 179.0, 271.0, 355.0))
    expected = slice_panorama(image, slicing, projection="equirectangular")
    found = slice_panorama(panorama.image, slicing, projection="equirectangular")
    assert np.abs(found.astype(int) - expected).max() <= 2
    assert psnr(found, expected) > 55


def test_the_centre_column_turns_the_panorama_and_no_column_is_special():
    views = cut_bearings(sphere(512), 0.0, BEARINGS, frame_px=256)
    north = stitch_views(list(views), BEARINGS, height_px=256, heading_deg=0.0)
    east = stitch_views(list(views), BEARINGS, height_px=256, heading_deg=90.0)
    assert (north.heading_deg, east.heading_deg) == (0.0, 90.0)
    # Column 256 of 512 has heading 0 in the first; in the second heading 0 lies a quarter turn to the left.
    turned = np.roll(north.image, -128, axis=1).astype(int)
    assert np.abs(turned - east.image).max() <= 1
    assert np.array_equal(np.roll(north.mask, -128, axis=1), east.mask)


def test_order_of_the_images_and_full_turns_do_not_matter():
    views = list(cut_bearings(sphere(512), 0.0, BEARINGS, frame_px=128))
    expected = stitch_views(views, BEARINGS, height_px=128)
    shuffled = [5, 2, 7, 0, 1, 6, 3, 4]
    found = stitch_views(
        [views[i] for i in shuffled], [BEARINGS[i] + 360 * (i % 3 - 1) for i in shuffled], height_px=128
    )
    assert np.array_equal(found.image, expected.image)


def test_tilted_views_add_the_sky():
    image = sphere(512)
    level = cut_bearings(image, 0.0, BEARINGS, frame_px=256)
    raised = cut_bearings(image, 0.0, BEARINGS, frame_px=256, pitch_deg=50)
    panorama = stitch_views([*level, *raised], [*BEARINGS, *BEARINGS], pitch_deg=[0.0] * 8 + [50.0] * 8, height_px=256)
    assert panorama.mask[:128].all()  # up to the zenith
    assert psnr(panorama.image, image, panorama.mask) > 45
    assert panorama.coverage[-1] == 0


def test_a_strip_is_a_cylinder_without_black():
    image = sphere()
    views = cut_bearings(image, 0.0, BEARINGS, frame_px=512)
    strip = stitch_views(list(views), BEARINGS, projection="strip", height_px=400)
    assert strip.mask.all()
    height, width, _ = strip.image.shape
    half = math.tan(math.radians(strip.band_deg / 2))
    assert width == round(2 * math.pi * height / (2 * half))  # square pixels at the horizon
    # The pixel in the direction (heading 77 degrees, elevation 20 degrees) shows what the panorama shows there.
    for heading, elevation in ((77.0, 20.0), (-179.0, -33.0)):
        row = int((0.5 - math.tan(math.radians(elevation)) / half / 2) * height)
        column = int((heading / 360 + 0.5) * width)
        there = image[int((0.5 - elevation / 180) * 512), int((heading / 360 + 0.5) * 1024)]
        assert np.abs(strip.image[row, column].astype(int) - there).max() <= 12


def test_exposure_steps_are_blended_over_the_feather_and_nowhere_else():
    views = [np.full((128, 128, 3), 100 + 20 * (index % 2), np.uint8) for index in range(8)]
    bearings = [45.0 * index for index in range(8)]

    def horizon(feather):
        return stitch_views(views, bearings, height_px=180, feather_deg=feather).image[90, :, 0].astype(int)

    narrow, wide = horizon(2.0), horizon(20.0)
    assert set(np.unique(narrow)[[0, -1]]) == {100, 120}
    assert np.abs(np.diff(np.append(wide, wide[0]))).max() <= 2  # the seam at 360 degrees like any other
    assert ((narrow > 101) & (narrow < 119)).sum() < ((wide > 101) & (wide < 119)).sum() / 4


def naive(images, bearings, fov, height_px, feather):
    """Pixel by pixel, with nearest samples: the definition."""
    size, half = images[0].shape[0], math.tan(math.radians(fov / 2))
    result = np.zeros((height_px, 2 * height_px, 3))
    for row in range(height_px):
        up = math.sin(math.pi / 2 - (row + 0.5) / height_px * math.pi)
        level = math.cos(math.pi / 2 - (row + 0.5) / height_px * math.pi)
        for column in range(2 * height_px):
            found = []
            for image, bearing in zip(images, bearings, strict=True):
                turn = ((column + 0.5) / (2 * height_px) - 0.5) * 2 * math.pi - math.radians(bearing)
                forward = level * math.cos(turn)
                if forward <= 1e-6:
                    continue
                x, y = level * math.sin(turn) / forward, -up / forward
                edge = math.degrees(math.atan(half) - max(math.atan(abs(x)), math.atan(abs(y))))
                if edge >= 0:
                    place = [min(size - 1, int((v / half + 1) / 2 * size)) for v in (y, x)]
                    found.append((edge, image[place[0], place[1]]))
            if found:
                best = max(edge for edge, _ in found)
                weights = [max(0, 1 - (best - edge) / feather) * min(1, max(1e-4, edge / feather)) for edge, _ in found]
                pixel = sum(w * colour.astype(float) for w, (_, colour) in zip(weights, found, strict=True))
                result[row, column] = pixel / sum(weights)
    return result


def test_it_is_the_definition_and_much_faster():
    bearings = [0.0, 100.0, 180.0, 265.0]
    smooth = sphere(256)
    views = list(cut_bearings(smooth, 0.0, bearings, fov_deg=110, frame_px=160))
    started = time.perf_counter()
    expected = naive(views, bearings, 110, 64, 10.0)
    naive_s = time.perf_counter() - started
    fast_s = math.inf
    for _ in range(3):
        started = time.perf_counter()
        panorama = stitch_views(views, bearings, fov_deg=110, height_px=64)
        fast_s = min(fast_s, time.perf_counter() - started)
    assert np.array_equal(panorama.mask, expected.any(axis=2))
    error = np.abs(panorama.image - expected)[panorama.mask]
    assert error.mean() < 3  # nearest samples against bicubic ones
    assert naive_s > 10 * fast_s


def test_a_gap_is_named_in_degrees():
    views = list(cut_bearings(sphere(256), 0.0, BEARINGS, frame_px=64))
    with pytest.raises(ValueError, match=r"a gap of 15\.0 degrees between headings 10 and 55.*30 degrees"):
        stitch_views(views, BEARINGS, fov_deg=30)
    with pytest.raises(ValueError, match=r"gap of 45\.0 degrees between headings 325 and 100"):
        stitch_views(views[2:], BEARINGS[2:], fov_deg=90)
    with pytest.raises(ValueError, match="gap of 270"):
        stitch_views(views[:1], BEARINGS[:1], fov_deg=90)
    four = stitch_views(views[::2], BEARINGS[::2], fov_deg=90, height_px=64)  # they touch
    assert four.overlap_deg == pytest.approx(0, abs=1e-6)
    assert four.mask[30:34].all()


def test_other_faults_say_what_to_do():
    views = list(cut_bearings(sphere(256), 0.0, BEARINGS, frame_px=64))
    with pytest.raises(ValueError, match="mixed sizes, 64x64 and 96x64; resize"):
        stitch_views([*views[:-1], np.zeros((64, 96, 3), np.uint8)], BEARINGS)
    with pytest.raises(ValueError, match="8 images and 7 headings"):
        stitch_views(views, BEARINGS[:-1])
    with pytest.raises(ValueError, match="fov_deg is"):
        stitch_views(views, BEARINGS, fov_deg=200)
    with pytest.raises(ValueError, match="choose one of equirectangular, strip"):
        stitch_views(views, BEARINGS, projection="cubemap")
    with pytest.raises(ValueError, match=r"must be a \(H, W, 3\) uint8 array, got float64"):
        stitch_views([view / 255 for view in views], BEARINGS)
    with pytest.raises(ValueError, match="finite"):
        stitch_views(views, [math.nan, *BEARINGS[1:]])


def test_large_photographs_are_shrunk_before_they_are_sampled():
    """A fine chequerboard must become grey, not moire."""
    board = np.indices((800, 800)).sum(axis=0) % 2 * 255
    views = [np.repeat(board[..., None], 3, axis=2).astype(np.uint8)] * 8
    panorama = stitch_views(views, BEARINGS, height_px=128)
    assert np.abs(panorama.image[56:72].astype(int) - 127).max() <= 4


def test_the_map_is_made_once_by_all_threads_of_the_columns_that_each_view_shows(monkeypatch):
    views = list(cut_bearings(sphere(256), 0.0, BEARINGS, frame_px=64))
    calls = []

    def counted(rig, index, headings, elevation, inside=stitch._inside):
        found = inside(rig, index, headings, elevation)
        if len(elevation) == 300:
            calls.append(index)
            time.sleep(0.01)  # so that the others come while it is made
        return found

    monkeypatch.setattr(stitch, "_inside", counted)
    stitch._map.cache_clear()
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: stitch_views(views, BEARINGS, height_px=300), range(4)))
    assert sorted(calls) == sorted(list(range(8)) * math.ceil(600 / stitch._BLOCK_PX))
    assert all(np.array_equal(one.image, made[0].image) for one in made)
    rig, _ = stitch._checked_rig(views, BEARINGS, 90.0, 0.0)
    headings, elevation = np.arange(600) * 0.6, np.linspace(1.5, -1.5, 300)
    columns, x, y, distance = stitch._seen_columns(rig, 2, headings, elevation)
    assert x.shape == y.shape == distance.shape == (300, len(columns))
    assert 145 < len(columns) <= 151  # 90 of 360 degrees
    everywhere = stitch._inside(rig, 2, headings, elevation)[2]
    assert columns.tolist() == np.flatnonzero((everywhere >= 0).any(axis=0)).tolist()
    with pytest.raises(ValueError, match="height_px is 8192; it must be a whole number from 16 to 4096"):
        stitch_views(views, BEARINGS, height_px=8192)
