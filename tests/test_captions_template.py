"""The template captioner: every word follows a pixel, and no word can name a place."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest

from hedwig.captions import TemplateCaptioner
from hedwig.captions.template import VOCABULARY


@pytest.fixture(scope="module")
def captioner():
    return TemplateCaptioner()


def frames(sky=(120, 170, 235), ground=(120, 120, 120), *, views=8, side=64):
    pictures = np.empty((1, views, side, side, 3), np.uint8)
    pictures[:, :, : side // 2] = sky
    pictures[:, :, side // 2 :] = ground
    return pictures


def say(captioner, pictures, **columns):
    columns = {name: np.array([value], object) for name, value in columns.items()}
    return captioner({"frames": pictures, **columns})["caption"][0]


def test_brightness_and_contrast(captioner):
    assert "dark street" in say(captioner, frames((30, 30, 60), (20, 20, 20)))
    assert "bright street" in say(captioner, frames((240, 240, 250), (200, 200, 200)))
    assert "sharp light" in say(captioner, frames((250, 250, 255), (5, 5, 5)))
    assert "flat light" in say(captioner, frames((130, 130, 140), (120, 120, 120)))


@pytest.mark.parametrize(
    ("colour", "word"),
    [((20, 20, 20), "black"), ((120, 120, 120), "gray"), ((240, 240, 240), "white"), ((180, 60, 30), "red"),
     ((150, 110, 70), "brown"), ((220, 190, 110), "yellow"), ((60, 140, 50), "green"), ((60, 90, 180), "blue")],
)  # fmt: skip
def test_ground_colour(captioner, colour, word):
    assert f"{word} ground" in say(captioner, frames(ground=colour))


def test_sky_share_and_weather(captioner):
    assert "clear open sky" in say(captioner, frames((100, 160, 235)))
    assert "cloudy open sky" in say(captioner, frames((225, 225, 225)))
    walled = frames()
    walled[:, :4, :32] = (90, 60, 50)
    assert "clear wide sky" in say(captioner, walled)
    walled[:, :, :32] = (90, 60, 50)
    assert "narrow sky" in say(captioner, walled)


def test_plants_and_edges(captioner):
    assert "no trees" in say(captioner, frames())
    assert "many trees" in say(captioner, frames(ground=(50, 130, 40)))
    assert "no walls" in say(captioner, frames())
    barred = frames()
    barred[:, :, 10:40, ::4] = (10, 10, 10)
    barred[:, :, 10:40, 1::4] = (10, 10, 10)
    assert "many walls" in say(captioner, barred)


def test_tint(captioner):
    assert "warm tint" in say(captioner, frames((220, 200, 170), (160, 120, 80)))
    assert "cold tint" in say(captioner, frames((120, 160, 230), (100, 110, 130)))
    assert "neutral tint" in say(captioner, frames((120, 120, 120)))


def test_lines(captioner):
    painted = frames()
    assert "no lines" in say(captioner, painted)
    painted[:, :, 50:53] = (244, 190, 32)
    assert "yellow lines" in say(captioner, painted)
    painted[:, :, 50:53] = (240, 240, 236)
    assert "white lines" in say(captioner, painted)


def test_the_sun_is_the_brightest_frame_and_turns_with_the_heading(captioner):
    lit = frames((110, 150, 200))
    lit[:, 2, 5:20, 20:40] = 255
    assert "sun in third frame" in say(captioner, lit)
    # The left edge of the first frame looks away from the heading: the third is centred on heading - 67.5.
    assert "sun southwest" in say(captioner, lit, heading=292.5)
    assert "sun east" in say(captioner, lit, heading=157.5)
    assert "sun in third frame" in say(captioner, lit, heading=float("nan"))
    assert "sun" not in say(captioner, frames())
    assert "sun in third frame" in say(TemplateCaptioner(full_turn=False), lit, heading=157.5)
    north = TemplateCaptioner(align_north=True)
    assert say(north, lit, heading=10.0) == say(north, lit, heading=300.0)
    assert "sun southeast" in say(north, lit, heading=10.0)


def test_the_month_is_said_without_a_hemisphere(captioner):
    assert "july" in say(captioner, frames(), captured_at="2021-07-14")
    assert say(captioner, frames(), captured_at=None) == say(captioner, frames()) == say(
        captioner, frames(), captured_at="unknown"
    )  # fmt: skip
    assert not {"summer", "winter", "spring", "autumn"} & VOCABULARY


def test_at_most_thirty_tokens_counted_by_the_real_tokenizer(captioner):
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer, random = SimpleTokenizer(), np.random.default_rng(0)
    pictures = random.integers(0, 256, (40, 8, 16, 16, 3)).astype(np.uint8) // random.integers(1, 5, (40, 8, 1, 1, 3))
    pictures = pictures.astype(np.uint8)
    made = captioner({"frames": pictures, "heading": random.uniform(0, 360, 40),
                      "captured_at": np.array([f"2020-{1 + i % 12:02d}-03" for i in range(40)], object)})  # fmt: skip
    for caption, count in zip(made["caption"], made["caption_num_tokens"], strict=True):
        assert len(tokenizer.encode(caption)) == count <= 30
        assert set(re.findall(r"[a-z]+", caption)) <= VOCABULARY
        assert caption.count(",") >= 5
    assert len(set(made["caption"])) > 5
    assert made["caption_num_tokens"].dtype == np.int32
    short = TemplateCaptioner(max_tokens=8)({"frames": pictures})
    assert short["caption_num_tokens"].max() <= 8
    assert all(long.startswith(brief) for long, brief in zip(made["caption"], short["caption"], strict=True))


def test_no_place_can_be_named():
    geography = pytest.importorskip("hedwig.geocells.geography")
    places = geography.Geography.default().places().nlargest(2000, "population")
    names = {str(name).lower() for name in places["name"]} | {str(code).lower() for code in places["country"]}
    assert len(names) > 1500
    # two-letter words such as "in" and "no" are also country codes; they carry nothing here
    assert not {name for name in names if len(name) > 2} & VOCABULARY


def test_positions_and_names_are_not_read(captioner):
    pictures = np.random.default_rng(1).integers(0, 256, (3, 8, 24, 24, 3)).astype(np.uint8)
    plain = captioner({"frames": pictures})
    told = captioner({"frames": pictures, "lat": np.array([1.0, 2, 3]), "lon": np.array([4.0, 5, 6]),
                      "pano_id": np.array(["a", "b", "c"]), "country": np.array(["FR", "JP", "US"])})  # fmt: skip
    assert list(plain["caption"]) == list(told["caption"])
    assert "lat" not in captioner.reads
    one = captioner({"frames": pictures[1:2]})
    assert one["caption"][0] == plain["caption"][1]  # no row depends on its batch


def test_wrong_frames_are_refused(captioner):
    with pytest.raises(ValueError, match="expected \\(B, V, S, S, 3\\) uint8"):
        captioner({"frames": np.zeros((2, 8, 64, 64, 3), np.float32)})
    with pytest.raises(ValueError, match="max_tokens is 1"):
        TemplateCaptioner(max_tokens=1)
    assert len(captioner({"frames": np.zeros((0, 8, 16, 16, 3), np.uint8)})["caption"]) == 0
    assert captioner({"frames": np.zeros((1, 1, 9, 9, 3), np.uint8)})["caption"][0].startswith("dark street")


def test_captioning_is_fast(captioner):
    pictures = np.random.default_rng(2).integers(0, 256, (16, 8, 224, 224, 3)).astype(np.uint8)
    start = time.process_time()
    captioner({"frames": pictures})
    assert (time.process_time() - start) / 16 < 0.009  # 3 ms is the aim on an idle core
