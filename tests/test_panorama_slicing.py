"""Slicing: the frames that a slow Pillow reference gives, all around, in the right order and direction."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
from PIL import Image

from hedwig.panorama import Slicing, decode_image, select_frames, slice_panorama, stitch_bearings, upsampling


def scenery(height, width, seed=0):
    """Smoothed noise over a gradient that closes on itself: detail at several scales, no seam."""
    rng = np.random.default_rng(seed)
    spectrum = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]) + 1 / width
    layers = [
        np.fft.irfft2(np.fft.rfft2(rng.normal(size=(height, width))) / spectrum**1.2, s=(height, width))
        for _ in range(3)
    ]
    image = np.stack([128 + 45 * layer / layer.std() for layer in layers], axis=-1)
    return np.clip(image, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def strip():
    return scenery(640, 2560)


@pytest.fixture(scope="module")
def sphere():
    return scenery(1024, 2048, seed=1)


def bicubic(pixels, frame_px=224, box=None):
    """The slow reference: one crop, one Pillow resize."""
    return np.asarray(Image.fromarray(pixels).resize((frame_px, frame_px), Image.Resampling.BICUBIC, box=box))


def difference(frames, reference):
    return np.abs(frames.astype(int) - np.asarray(reference).astype(int))


def inner(frames):
    """Without the 3 columns at either side, which on the fast path see their neighbours instead of an edge."""
    return frames[:, :, 3:-3]


# Selecting


def test_official_sampler():
    assert select_frames(11, 8, "middle").tolist() == [0, 1, 2, 4, 5, 6, 8, 9]
    assert select_frames(31, 8, "middle").tolist() == [1, 4, 8, 12, 16, 20, 24, 28]
    assert select_frames(3, 8, "middle").tolist() == [0, 1, 2, 2, 2, 2, 2, 2]


def test_official_demo_never_sees_the_last_frames():
    assert select_frames(10, 8, "first").tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert select_frames(17, 8, "first").tolist() == [0, 2, 4, 6, 8, 10, 12, 14]
    assert select_frames(2, 4, "first").tolist() == [0, 1, 1, 1]


def test_uniform_selection_spans_everything():
    assert select_frames(10, 8, "uniform").tolist() == [0, 1, 3, 4, 5, 6, 8, 9]
    assert select_frames(8, 8, "uniform").tolist() == list(range(8))
    assert select_frames(2, 4, "uniform").tolist() == [0, 0, 1, 1]
    assert select_frames(9, 1, "uniform").tolist() == [0]


@pytest.mark.parametrize("how", ["uniform", "middle", "first"])
def test_selection_is_ascending_and_within_range(how):
    for num_in in range(1, 40):
        for num_out in range(1, 12):
            chosen = select_frames(num_in, num_out, how)
            assert len(chosen) == num_out
            assert chosen.min() >= 0
            assert chosen.max() < num_in
            assert (np.diff(chosen) >= 0).all()


def test_selection_refuses_nonsense():
    with pytest.raises(ValueError, match="Cannot select 8 of 0"):
        select_frames(0, 8, "uniform")
    with pytest.raises(ValueError, match="choose one of uniform, middle, first"):
        select_frames(9, 8, "best")


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"mode": "spiral"}, "slicing.mode is 'spiral'; choose one of paper, wrap"),
        ({"select": "last"}, "slicing.select"),
        ({"num_frames": 0}, "slicing.num_frames is 0; it must be a whole number from 1"),
        ({"frame_px": 224.5}, "slicing.frame_px"),
        ({"stride_px": True}, "slicing.stride_px"),
        ({"fov_deg": 180.0}, "slicing.fov_deg is 180.0; it must lie in 1 to 160"),
        ({"pitch_deg": math.nan}, "slicing.pitch_deg"),
        ({"band_deg": 0}, "slicing.band_deg"),
        ({"headings_deg": ()}, "slicing.headings_deg"),
        ({"headings_deg": (0.0, math.nan)}, "slicing.headings_deg"),
        ({"mode": "paper", "headings_deg": (0.0,)}, "no meaning in mode 'paper'"),
    ],
)
def test_knobs_are_checked(knobs, words):
    with pytest.raises(ValueError, match=words):
        Slicing(**knobs)


def test_slicing_can_be_compared_and_hashed():
    assert Slicing(headings_deg=[0, 90]) == Slicing(headings_deg=(0.0, 90.0))
    assert len({Slicing(), Slicing(), Slicing(mode="paper")}) == 2


# paper


@pytest.mark.parametrize(("width", "num_found"), [(2439, 9), (2440, 10), (2639, 10), (2640, 11)])
def test_number_of_paper_frames(width, num_found):
    image = np.zeros((640, width, 3), dtype=np.uint8)
    image[:, 640 + 200 * (num_found - 1) - 100 :] = 255  # the right half of the last window's stride, and the rest
    frames = slice_panorama(image, Slicing(mode="paper", num_frames=num_found), projection="frame strip")
    assert [bool(frame.max() > 0) for frame in frames] == [False] * (num_found - 1) + [True]
    expected = num_found * [0]
    expected[-1] = 100 / 640 * 255
    assert frames.mean(axis=(1, 2, 3)) == pytest.approx(expected, abs=1.0)


def test_paper_frames_equal_the_reference(strip):
    frames = slice_panorama(strip, Slicing(mode="paper", num_frames=10), projection="frame strip")
    reference = [bicubic(strip[:, start : start + 640]) for start in range(0, 1801, 200)]
    delta = difference(frames, reference)
    assert frames.shape == (10, 224, 224, 3)
    assert frames.flags.c_contiguous
    assert inner(delta).max() <= 1
    assert inner(delta).mean() <= 0.02
    assert delta.mean() <= 0.05


def test_paper_frames_crop_by_crop_when_the_step_is_no_whole_pixel(strip):
    slicing = Slicing(mode="paper", stride_px=150, num_frames=13)  # 52.5 output px
    delta = difference(
        slice_panorama(strip, slicing, projection="frame strip"),
        [bicubic(strip[:, start : start + 640]) for start in range(0, 1801, 150)],
    )
    assert delta.max() <= 1
    assert delta.mean() <= 0.02


@pytest.mark.parametrize(("select", "windows"), [("uniform", [0, 1, 3, 4, 5, 6, 8, 9]), ("first", range(8))])
def test_paper_selection_picks_the_windows(strip, select, windows):
    every = slice_panorama(strip, Slicing(mode="paper", num_frames=10), projection="frame strip")
    eight = slice_panorama(strip, Slicing(mode="paper", select=select), projection="frame strip")
    assert np.array_equal(eight, every[list(windows)])


@pytest.mark.parametrize("height", [300, 427, 1280])
def test_paper_scales_any_strip_to_its_height(height):
    image = scenery(height, height * 4)
    frames = slice_panorama(image, Slicing(mode="paper", num_frames=10), projection="frame strip")
    factor = height / 640
    reference = [
        bicubic(image, box=(start * factor, 0, min((start + 640) * factor, height * 4), height))
        for start in range(0, 1801, 200)
    ]
    assert inner(difference(frames, reference)).mean() <= 0.3  # a width that is no multiple is rounded once
    assert difference(frames, reference).max() <= 12


def test_band_is_the_middle_640_rows(sphere):
    for mode in ("paper", "wrap"):
        assert np.array_equal(
            slice_panorama(sphere, Slicing(mode=mode), projection="equirectangular"),
            slice_panorama(sphere[192:832], Slicing(mode=mode), projection="frame strip"),
        )


def test_real_panoramas_equal_the_reference(shared):
    with open(shared / "data" / "mapillary_sample" / "labels.csv", newline="") as lines:
        files = [row["file"] for row in csv.DictReader(lines) if row["is_pano"] == "True"]
    assert len(files) == 9
    for file in files[:4]:
        image = decode_image((shared / "data" / "mapillary_sample" / file).read_bytes())
        delta = difference(
            slice_panorama(image, Slicing(mode="paper"), projection="equirectangular"),
            [bicubic(image[192:832, start : start + 640]) for start in range(0, 1401, 200)],
        )
        assert inner(delta).max() <= 1
        assert inner(delta).mean() <= 0.02


# wrap


@pytest.mark.parametrize(("num_frames", "width"), [(8, 2048), (8, 2560), (10, 2048), (4, 1500)])
def test_wrapped_frames_equal_the_reference(num_frames, width):
    image = scenery(640, width)
    frames = slice_panorama(image, Slicing(num_frames=num_frames), projection="frame strip")
    turn = num_frames * round(width * 0.35 / num_frames)  # whole output px per turn
    assert abs(turn / (width * 0.35) - 1) < 0.006
    thrice, span = np.concatenate([image] * 3, axis=1), 224 * width / turn
    starts = [width * (1 + index / num_frames) for index in range(num_frames)]
    delta = difference(frames, [bicubic(thrice, box=(start, 0, start + span, 640)) for start in starts])
    assert delta.max() <= 1  # the border columns too: both see the true neighbours
    assert delta.mean() <= 0.02


@pytest.mark.parametrize("mode", ["wrap", "perspective"])
def test_turning_the_panorama_by_one_step_permutes_the_frames(sphere, mode):
    slicing = Slicing(mode=mode)
    frames = slice_panorama(sphere, slicing, projection="equirectangular")
    turned = slice_panorama(np.roll(sphere, -256, axis=1), slicing, projection="equirectangular")
    assert difference(frames[1:], frames[:-1]).mean() > 5
    delta = difference(turned, np.roll(frames, -1, axis=0))
    assert delta.max() <= (0 if mode == "wrap" else 1)


def test_few_and_narrow_frames_fall_back_to_single_crops():
    image = scenery(200, 300)  # 2 frames: 168 px a turn at height 112, step 84
    for num_frames in (1, 2, 3, 7):
        frames = slice_panorama(image, Slicing(num_frames=num_frames, frame_px=31), projection="frame strip")
        thrice = np.concatenate([image] * 3, axis=1)
        starts = [round(index * 300 / num_frames) for index in range(num_frames)]
        reference = [bicubic(thrice[:, start : start + 200], 31) for start in starts]
        assert frames.shape == (num_frames, 31, 31, 3)
        assert inner(difference(frames, reference)).mean() < 4


def test_given_headings_centre_the_frames(sphere):
    slicing = Slicing(headings_deg=(0.0, 90.0, -90.0, 450.0), num_frames=4)
    frames = slice_panorama(sphere, slicing, projection="equirectangular")
    thrice = np.concatenate([sphere[192:832]] * 3, axis=1)
    centres = [2048 + 1024 + offset for offset in (0, 512, -512, 512)]
    reference = [bicubic(thrice[:, centre - 320 : centre + 320]) for centre in centres]
    assert difference(frames, reference).max() <= 1


@pytest.mark.parametrize("mode", ["wrap", "paper", "perspective"])
def test_frames_aligned_north_do_not_depend_on_the_way_the_camera_faced(sphere, mode):
    slicing = Slicing(mode=mode, align_north=True)
    ahead = slice_panorama(sphere, slicing, projection="equirectangular", heading=0.0)
    # The camera turns right by 45 degrees: what was in the centre moves 256 columns to the left.
    turned = slice_panorama(np.roll(sphere, -256, axis=1), slicing, projection="equirectangular", heading=45.0)
    assert difference(ahead, turned).max() <= 1
    unknown = slice_panorama(sphere, slicing, projection="equirectangular", heading=math.nan)
    plain = slice_panorama(sphere, Slicing(mode=mode), projection="equirectangular", heading=45.0)
    assert np.array_equal(unknown, plain)
    assert difference(ahead, plain).mean() > 5


def test_first_aligned_frame_starts_at_north():
    image = np.zeros((640, 2048, 3), dtype=np.uint8)
    east = 1024 + 90 / 360 * 2048  # the column of the image that looks north when its centre looks west
    image[:, int(east) :] = 255
    frame = slice_panorama(image, Slicing(align_north=True), projection="frame strip", heading=270.0)[0]
    assert frame[:, 3:170].min() > 250  # 512 px of white, then the other side
    assert frame[:, 185:].max() < 5


# perspective


def compass(height=1024, width=2048):
    """Red and green carry cosine and sine of the heading from the centre column, blue the elevation."""
    heading = ((np.arange(width) + 0.5) / width - 0.5) * 2 * np.pi
    elevation = (0.5 - (np.arange(height) + 0.5) / (width / 2)) + (height / width - 0.5)
    image = np.empty((height, width, 3))
    image[..., 0] = 127.5 + 120 * np.cos(heading)
    image[..., 1] = 127.5 + 120 * np.sin(heading)
    image[..., 2] = 127.5 + 240 * elevation[:, None]
    return np.rint(image).astype(np.uint8)


def read_compass(pixels):
    pixels = pixels.astype(float)
    heading = np.degrees(np.arctan2(pixels[..., 1] - 127.5, pixels[..., 0] - 127.5))
    return heading, (pixels[..., 2] - 127.5) / 240 * 180


def turn_between(a, b):
    return np.abs((np.asarray(a) - b + 180) % 360 - 180)


@pytest.mark.parametrize("pitch", [-25.0, 0.0, 30.0])
def test_views_look_where_they_should(pitch):
    headings = (0.0, 10.0, 90.0, 179.0, -135.0)
    slicing = Slicing(mode="perspective", headings_deg=headings, num_frames=5, fov_deg=70, pitch_deg=pitch)
    views = slice_panorama(compass(), slicing, projection="equirectangular")
    heading, elevation = read_compass(views[:, 110:114, 110:114].mean(axis=(1, 2)))
    assert turn_between(heading, headings).max() < 0.4
    assert np.abs(elevation - pitch).max() < 0.5


def test_view_geometry_pixel_by_pixel():
    """Slow twin: rotate each pixel's ray with a matrix and read where it points."""
    size, fov, pitch, turn = 64, 80.0, 20.0, 100.0
    slicing = Slicing(
        mode="perspective", headings_deg=(turn,), num_frames=1, frame_px=size, fov_deg=fov, pitch_deg=pitch
    )
    heading, elevation = read_compass(slice_panorama(compass(), slicing, projection="equirectangular")[0])
    p, t = math.radians(pitch), math.radians(turn)
    tilt = np.array([[1, 0, 0], [0, math.cos(p), math.sin(p)], [0, -math.sin(p), math.cos(p)]])
    spin = np.array([[math.cos(t), 0, math.sin(t)], [0, 1, 0], [-math.sin(t), 0, math.cos(t)]])
    for row in range(0, size, 7):
        for column in range(0, size, 7):
            reach = math.tan(math.radians(fov / 2)) * 2 / size
            ray = np.array([(column + 0.5 - size / 2) * reach, -(row + 0.5 - size / 2) * reach, 1.0])
            right, up, forward = spin @ tilt @ ray
            assert turn_between(heading[row, column], math.degrees(math.atan2(right, forward))) < 1.0
            assert abs(elevation[row, column] - math.degrees(math.atan2(up, math.hypot(right, forward)))) < 1.0


def test_straight_lines_stay_straight_in_views():
    """A wall 1 ahead with its top edge 0.5 above the eye: a curve on the panorama, a line in the view."""
    heading = ((np.arange(2048) + 0.5) / 2048 - 0.5) * 2 * np.pi
    edge = np.degrees(np.arctan(0.5 * np.cos(heading)))
    elevation = 90 - (np.arange(1024) + 0.5) / 1024 * 180
    image = np.where(elevation[:, None] < edge, 0, 255).astype(np.uint8)
    assert np.ptp(edge[700:1348]) > 10
    slicing = Slicing(mode="perspective", headings_deg=(0.0,), num_frames=1)
    view = slice_panorama(np.repeat(image[..., None], 3, axis=2), slicing, projection="equirectangular")[0]
    rows = view[..., 0].astype(float).sum(axis=0) / 255  # how much of each column is sky
    assert np.abs(rows - 56).max() < 0.6  # 112 - 112 * 0.5


def test_views_equal_supersampled_ones(shared):
    file = shared / "data" / "mapillary_sample" / "06129dab-7e25-4900-bc50-3afc5cafa321.jpg"
    image = decode_image(file.read_bytes())
    coarse = slice_panorama(image, Slicing(mode="perspective"), projection="equirectangular")
    fine = slice_panorama(image, Slicing(mode="perspective", frame_px=896), projection="equirectangular")
    assert difference(coarse, [bicubic(view) for view in fine]).mean() < 2.5


def test_even_views_cover_the_circle_clockwise_from_the_left_edge():
    views = slice_panorama(compass(), Slicing(mode="perspective"), projection="equirectangular")
    heading, elevation = read_compass(views[:, 110:114, 110:114].mean(axis=(1, 2)))
    assert turn_between(heading, -180 + 45 + 45 * np.arange(8)).max() < 0.4
    assert np.abs(elevation).max() < 0.5


def test_views_of_a_band_and_beyond_it(sphere):
    level = Slicing(mode="perspective")
    full = slice_panorama(sphere, level, projection="equirectangular")
    band = slice_panorama(sphere[192:832], level, projection="equirectangular")
    assert difference(full, band).mean() < 0.5
    with pytest.raises(ValueError, match=r"covers only ±56; use mode 'wrap' or the full sphere"):
        slice_panorama(sphere[192:832], Slicing(mode="perspective", pitch_deg=30), projection="equirectangular")
    with pytest.raises(ValueError, match="no known vertical field"):
        slice_panorama(sphere[192:832], level, projection="frame strip")
    with pytest.raises(ValueError, match="not equirectangular"):
        slice_panorama(sphere[:, :1500], level, projection="equirectangular")


def test_views_of_the_poles(sphere):
    for pitch in (90.0, -90.0):
        slicing = Slicing(mode="perspective", pitch_deg=pitch, frame_px=64)
        assert slice_panorama(sphere, slicing, projection="equirectangular").shape == (8, 64, 64, 3)


# One photograph, several photographs


@pytest.mark.parametrize("mode", ["paper", "wrap", "perspective", "bearings"])
def test_a_photograph_gives_crops_from_left_to_right(mode):
    photograph = scenery(300, 400)
    frames = slice_panorama(photograph, Slicing(mode=mode, num_frames=5), projection="perspective", heading=12.0)
    reference = [bicubic(photograph[:, start : start + 300]) for start in (0, 25, 50, 75, 100)]
    assert difference(frames, reference).max() <= 1


@pytest.mark.parametrize("shape", [(400, 400), (500, 300)])
def test_a_photograph_that_is_not_wide_gives_its_centre(shape):
    photograph = scenery(*shape)
    side = min(shape)
    top, left = (shape[0] - side) // 2, (shape[1] - side) // 2
    reference = bicubic(photograph[top : top + side, left : left + side])
    for select in ("uniform", "middle", "first"):
        frames = slice_panorama(photograph, Slicing(select=select), projection="perspective")
        assert frames.shape == (8, 224, 224, 3)
        assert difference(frames, [reference] * 8).max() <= 1


def test_too_few_crops_are_repeated_as_the_selection_says():
    photograph = scenery(300, 302)  # 3 distinct crops
    crops = [bicubic(photograph[:, start : start + 300]) for start in range(3)]
    for select, order in (("uniform", [0, 0, 1, 1, 1, 1, 2, 2]), ("middle", [0, 1, 2, 2, 2, 2, 2, 2])):
        frames = slice_panorama(photograph, Slicing(select=select), projection="perspective")
        assert np.array_equal(order, select_frames(3, 8, select))
        assert difference(frames, [crops[index] for index in order]).max() <= 1


def flat(value, height=64, width=64):
    return np.full((height, width, 3), value, dtype=np.uint8)


def test_bearings_are_stitched_clockwise_from_the_smallest():
    strip = stitch_bearings([flat(180), flat(90), flat(10), flat(200)], [180.0, 90.0, -350.0, 200.0])
    assert strip.shape == (64, 256, 3)
    assert strip[0, ::64, 0].tolist() == [10, 90, 180, 200]
    assert stitch_bearings([flat(1, 64, 64), flat(2, 128, 256)], [0.0, 90.0]).shape == (64, 64 + 128, 3)


def test_bearings_as_frames_and_as_a_strip():
    images, bearings = [flat(30), flat(20), flat(10), flat(40)], [270.0, 180.0, 90.0, 359.0]
    slicing = Slicing(mode="bearings", num_frames=4, frame_px=32)
    frames = slice_panorama(images, slicing, projection="bearings", bearings_deg=bearings)
    assert frames.mean(axis=(1, 2, 3)).tolist() == [10, 20, 30, 40]
    eight = slice_panorama(images, Slicing(mode="bearings", frame_px=32), projection="bearings", bearings_deg=bearings)
    assert eight.mean(axis=(1, 2, 3)).tolist() == [10, 10, 20, 20, 30, 30, 40, 40]
    photographs = [scenery(640, 640, seed) for seed in range(4)]
    for mode in ("paper", "wrap"):
        assert np.array_equal(
            slice_panorama(
                photographs, Slicing(mode=mode), projection="bearings", bearings_deg=[0.0, 90.0, 180.0, 270.0]
            ),
            slice_panorama(np.concatenate(photographs, axis=1), Slicing(mode=mode), projection="frame strip"),
        )


@pytest.mark.parametrize(
    ("image", "knobs", "words"),
    [
        (flat(1), {"projection": "cubemap"}, "projection is 'cubemap'; it must be one of equirectangular"),
        (flat(1).astype(float), {"projection": "perspective"}, r"got float64 \(64, 64, 3\)"),
        (flat(1)[..., 0], {"projection": "perspective"}, "must be one"),
        ([flat(1)], {"projection": "equirectangular"}, "got list"),
        (flat(1)[:, :0], {"projection": "perspective"}, "no pixels"),
        (flat(1), {"projection": "frame strip", "mode": "bearings"}, "needs a list of images"),
        (flat(1, 64, 60), {"projection": "frame strip", "mode": "paper"}, "narrower than one square frame"),
        (flat(1), {"projection": "bearings", "bearings_deg": [0.0]}, "a list of at least one image"),
        ([], {"projection": "bearings", "bearings_deg": []}, "a list of at least one image"),
        ([flat(1)], {"projection": "bearings"}, "as many headings .* got none"),
        ([flat(1)], {"projection": "bearings", "bearings_deg": [math.nan]}, "must all be finite"),
        ([flat(1)], {"projection": "bearings", "bearings_deg": [0.0], "mode": "perspective"}, "no common sphere"),
    ],
)
def test_what_cannot_be_sliced_says_why(image, knobs, words):
    mode = knobs.pop("mode", "wrap")
    with pytest.raises(ValueError, match=words):
        slice_panorama(image, Slicing(mode=mode), **knobs)


def test_read_only_and_mirrored_arrays_are_accepted(sphere):
    frozen = np.frombuffer(sphere.tobytes(), dtype=np.uint8).reshape(sphere.shape)
    expected = slice_panorama(sphere, Slicing(), projection="equirectangular")
    assert np.array_equal(slice_panorama(frozen, Slicing(), projection="equirectangular"), expected)
    mirrored = sphere[:, ::-1].copy()[:, ::-1]
    assert np.array_equal(slice_panorama(mirrored, Slicing(), projection="equirectangular"), expected)


def test_slicing_leaves_the_image_alone(sphere):
    before = sphere.copy()
    for mode in ("paper", "wrap", "perspective"):
        frames = slice_panorama(sphere, Slicing(mode=mode), projection="equirectangular")
        frames[:] = 0
        assert np.array_equal(sphere, before)


def test_upsampling():
    assert upsampling((1024, 2048, 3), Slicing()) == pytest.approx(224 / 640)
    assert upsampling((300, 1200), Slicing(mode="paper", frame_px=450), "frame strip") == pytest.approx(1.5)
    assert upsampling((600, 400), Slicing(mode="bearings"), "bearings") == pytest.approx(0.56)
    assert upsampling((1024, 2048), Slicing(mode="perspective")) == pytest.approx(math.pi * 224 / 2048)
