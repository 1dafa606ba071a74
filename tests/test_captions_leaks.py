"""Place names in captions: found where they are a guess, left alone where they are another word or a sign's text."""

from __future__ import annotations

import pickle
import time

import pytest

from hedwig.captions.leaks import LeakFilter
from hedwig.captions.template import VOCABULARY


@pytest.fixture(scope="module")
def names():
    return LeakFilter("report")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A quiet street in Paris, France, lined with plane trees.", ["Paris", "France"]),
        ("This looks like rural Wisconsin or Iowa.", ["Wisconsin", "Iowa"]),
        ("Probably Abidjan or São Paulo, maybe Sao Paulo.", ["Abidjan", "São Paulo", "Sao Paulo"]),
        ("A road in the United States near New York's suburbs.", ["United States", "New York"]),
        ("Somewhere in South Korea, or North Macedonia.", ["South Korea", "North Macedonia"]),
        ("A typical West Virginia valley.", ["West Virginia"]),
        ("Typical of Southeast Asia and the UK.", ["Southeast Asia", "UK"]),
        ("A typical French village with an Italian villa.", ["French", "Italian"]),
        ("Paris-style balconies; Paris again.", ["Paris"]),
        ("Houses near Ouagadougou.", ["Ouagadougou"]),
        ("A town in Bath, England.", ["Bath", "England"]),
        ("Somewhere near Nice.", ["Nice"]),
        ("Perhaps Beijing, Turkey, or Georgia.", ["Beijing", "Turkey", "Georgia"]),
    ],
)
def test_names_of_places_are_found(names, text, found):
    assert names.find(text) == found


@pytest.mark.parametrize(
    "text",
    [
        "A cemetery located in a rural area, with cloudy weather, an eastward view, no visible traffic.",
        "Nice houses. Reading signs is hard. Mobile homes. Orange roofs. Split rails. Bath stone. Male drivers.",
        "A Toyota pickup and a Lincoln pass Victoria's parked van.",
        "Northern light over the Central square; West side, Old Town, City hall, the River.",
        "Free parking. Store fronts. Sale signs. Bush and grass. Gulf station. Archway over the road.",
        "Norway spruce, Japanese maple, Bermuda grass, English ivy and a Jersey barrier.",
        'A sign reads "Lyon 5 km" and another ‘Texas’; a shop is called "Paris".',
        "Thai characters on a board, a sign in French and English, Arabic script, Chinese lettering.",
        "PARIS is in capitals, paris in lower case.",
        "The Parisienne bakery, Indianapolisville, and Omanesque walls.",
        "It's the shops' roofs and the houses' doors.",
        "",
    ],
)
def test_other_words_are_left_alone(names, text):
    assert names.find(text) == []


def test_the_template_captioner_never_leaks(names):
    assert names.find(" ".join(sorted(VOCABULARY))) == []


def test_report_and_reject_leave_the_text(names):
    text = "A street in Paris."
    assert names.apply(text) == (text, ["Paris"])
    assert LeakFilter("reject").apply(text) == (text, ["Paris"])


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("A quiet street in Paris, France, with trees.", "A quiet street in a place, with trees."),
        ("It lies in the United States.", "It lies in a place."),
        ("Paris has trees. Germany has too.", "A place has trees. A place has too."),
        ("An Italian villa and a French window frame.", "A local villa and a French window frame."),
        ("Spanish roofs, a German car.", "Local roofs, a local car."),
        ('Near Lyon a sign says "Lyon 5 km".', 'Near a place a sign says "Lyon 5 km".'),
        ("Plain words.", "Plain words."),
    ],
)
def test_mask_keeps_the_sentence(text, masked):
    mask = LeakFilter("mask")
    assert mask.apply(text)[0] == masked
    assert mask.find(masked) == []


def test_settings():
    assert LeakFilter(adjectives=False).find("A French village in France") == ["France"]
    assert LeakFilter(min_population=5_000_000).find("in Aachen or Shanghai") == ["Shanghai"]
    assert LeakFilter().find("in Aachen or Shanghai") == ["Aachen", "Shanghai"]
    with pytest.raises(ValueError, match="report, mask, reject"):
        LeakFilter("drop")


def test_travels_to_a_worker(names):
    again = pickle.loads(pickle.dumps(names))
    assert again.find("in Paris") == ["Paris"]


def test_ten_thousand_captions_a_second(names):
    captions = [
        "A wide street with Red roofs and Toyota cars near a sign, tall trees and no traffic, Northern light.",
        "A quiet street in Paris, France, with a café, plane trees, grey roofs and a sign reading \"Lyon 5 km\".",
    ] * 500  # fmt: skip
    seconds = []
    for _ in range(3):  # the machine is shared: the best of three
        start = time.process_time()
        for caption in captions:
            names.apply(caption)
        seconds.append(time.process_time() - start)
    assert len(captions) / min(seconds) > 10_000
