"""What a captioner is asked, and how an answer is cleaned, trimmed and shown its pictures."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from PIL import Image

from hedwig.captions.prompts import (
    choose_frames,
    clean,
    condense,
    contact_sheet,
    describe,
    fit,
    jpeg,
    most_tokens,
    prompt_digest,
    shown_frames,
    wording_digest,
)
from hedwig.models.viclip import count_tokens

LONG = (
    "A wide two-lane asphalt road with double yellow lines passes under wooden utility poles. Low timber houses with "
    "grey shingle roofs, lawns and tall pine trees stand along it, and a green sign with white text points left."
)


@pytest.mark.parametrize("name", ["basic", "verbose", "two-step"])
def test_prompts_forbid_names_and_hold_no_position(name):
    text = describe(name, 8)
    assert "8 frames" in text
    assert "Never name or guess a country, region or city" in text
    assert not re.search(r"latitude|longitude|°|coordinates", text)
    assert describe(name, 1).startswith("The picture shows")
    assert "left to right and then top to bottom" in describe(name, 8, sheet=True)


def test_prompts_differ_and_bad_ones_are_refused():
    assert len({describe(name, 8) for name in ("basic", "verbose", "two-step")}) == 3
    with pytest.raises(ValueError, match="two-step"):
        describe("long", 8)
    with pytest.raises(ValueError, match="num_frames is 0"):
        describe("basic", 0)


@pytest.mark.parametrize(("budget", "tokenizer", "words"), [(30, "viclip", 20), (75, "clip", 50), (3, "clip", 4)])
def test_condense_asks_for_words_that_fit(budget, tokenizer, words):
    text = condense('Here is the caption: "Red soil. {braces}"', budget, tokenizer)
    assert f"at most {words} words" in text
    assert text.endswith("Caption: Red soil. {braces}")
    assert "never name a place" in text


def test_digest_follows_everything_that_decides_the_text():
    asked = [("basic", 30, "viclip"), ("verbose", 30, "viclip"), ("basic", 29, "viclip"), ("basic", 30, "clip")]
    digests = [prompt_digest(*one) for one in asked] + [prompt_digest("basic", 30, "viclip", version=0)]
    assert len(set(digests)) == 5
    assert prompt_digest("basic", 30, "viclip") == digests[0]
    assert re.fullmatch(r"[0-9a-f]{12}", digests[0])


def test_the_wording_knows_the_budget_only_where_the_model_is_told():
    assert wording_digest("basic", 30, "viclip") == wording_digest("basic", 75, "clip")
    assert wording_digest("basic", 30, "viclip") != wording_digest("verbose", 30, "viclip")
    assert wording_digest("two-step", 30, "viclip") != wording_digest("two-step", 75, "clip")
    assert (
        most_tokens("two-step", 30, "viclip") > most_tokens("verbose", 30, "viclip") > most_tokens("basic", 75, "clip")
    )
    assert most_tokens("basic", 75, "clip", reading=True) == 225


def test_without_a_budget_nothing_is_cut():
    fitted = fit(f"Caption: {LONG}", None, "viclip")
    assert (fitted.text, fitted.trimmed) == (LONG, False)
    assert fitted.num_tokens == count_tokens(LONG) > 30
    assert "at most 50 words" in condense("text", None, "clip")


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ('  "A wide\n street."  ', "A wide street."),
        ("Here is the caption:\n\n**A wide street**", "A wide street"),
        ("Sure! Here's a short caption: “A wide street.”", "A wide street."),
        ("Caption: 'A wide street'", "A wide street"),
        ("# Street\n- red roofs\n- blue sky.\n1. poles", "Street, red roofs, blue sky. poles"),
        ("<think>What could it be: a street?</think>A wide street<|im_end|>", "A wide street"),
        ("<think>What could it be: a street?", ""),
        ("It could be a street.</think>\n\nA wide street", "A wide street"),
        ('A sign says "STOP" near a wall', 'A sign says "STOP" near a wall'),
        ('"STOP" is on a sign that says "ALTO"', '"STOP" is on a sign that says "ALTO"'),
        ("Houses: low, red roofs", "Houses: low, red roofs"),
        ("", ""),
    ],
)
def test_clean_keeps_what_was_said_and_nothing_else(said, kept):
    assert clean(said) == kept
    assert clean(kept) == kept


def test_fit_leaves_a_short_caption_alone():
    fitted = fit("A cemetery located in a rural area.", 30, "viclip")
    assert (fitted.text, fitted.trimmed) == ("A cemetery located in a rural area.", False)
    assert fitted.num_tokens == count_tokens(fitted.text) == 8


def test_fit_cuts_at_a_sentence_then_a_clause_then_a_word():
    sentence = "A wide two-lane asphalt road with double yellow lines passes under wooden utility poles."
    assert fit(LONG, 30, "viclip").text == sentence
    clause = fit(LONG.replace(". Low", ", low"), 30, "viclip")
    assert clause.text == sentence[:-1] + ", low timber houses with grey shingle roofs"
    assert clause.trimmed
    words = fit("a road along houses with gardens and " * 10, 22, "viclip")
    assert (
        words.text
        == "a road along houses with gardens and a road along houses with gardens and a road along houses with gardens"
    )


@pytest.mark.parametrize("text", [LONG, LONG.replace(".", ","), "word " * 200, "街道" * 60, "x" * 500, "🏠" * 90])
@pytest.mark.parametrize(("budget", "tokenizer"), [(1, "clip"), (7, "viclip"), (30, "viclip"), (75, "clip")])
def test_fit_never_exceeds_the_budget_and_counts_right(text, budget, tokenizer):
    fitted = fit(text, budget, tokenizer)
    assert fitted.num_tokens == count_tokens(fitted.text) <= budget
    assert text.startswith(fitted.text)
    assert fitted.trimmed == (fitted.text != clean(text))


def test_fit_keeps_at_least_half_of_what_would_fit():
    text = "No. " + "low brick houses behind tall green hedges " * 8
    assert fit(text, 30, "viclip").num_tokens > 15


@pytest.mark.parametrize(("budget", "tokenizer"), [(31, "viclip"), (76, "clip"), (0, "clip"), (10, "bert")])
def test_budget_beyond_the_context_is_refused(budget, tokenizer):
    with pytest.raises(ValueError, match=r"30|75|bert"):
        fit("a", budget, tokenizer)


@pytest.mark.parametrize(
    ("num", "grid"), [(1, (1, 1)), (2, (1, 2)), (4, (1, 4)), (7, (2, 4)), (8, (2, 4)), (10, (2, 5)), (12, (2, 6))]
)
def test_contact_sheet_holds_every_frame_in_reading_order(num, grid):
    frames = np.stack([np.full((64, 64, 3), 20 * (index + 1), np.uint8) for index in range(num)])
    rows, columns = grid
    sheet = contact_sheet(frames, 32 * columns)
    assert sheet.shape == (32 * rows, 32 * columns, 3) if num > 1 else (32, 32, 3)
    for index in range(num):
        y, x = 32 * (index // columns) + 16, 32 * (index % columns) + 16
        assert sheet[y, x, 0] == 20 * (index + 1)
    assert contact_sheet(frames, 10_000).shape == (64 * rows, 64 * columns, 3), "frames are never enlarged"


def test_contact_sheet_refuses_other_shapes():
    with pytest.raises(ValueError, match="float64"):
        contact_sheet(np.zeros((2, 8, 8, 3)), 256)
    with pytest.raises(ValueError, match="max_px is 3"):
        contact_sheet(np.zeros((8, 64, 64, 3), np.uint8), 3)


def test_jpeg_is_a_repeatable_file_of_the_same_picture():
    ramp = np.broadcast_to(np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None], (48, 64, 3))
    file = jpeg(ramp, 90)
    assert file == jpeg(ramp, 90)
    with Image.open(io.BytesIO(file)) as image:
        assert (image.format, image.size) == ("JPEG", (64, 48))
        assert np.abs(np.asarray(image).astype(int) - ramp).max() <= 4
    assert len(jpeg(ramp, 30)) < len(file)
    with pytest.raises(ValueError, match="quality is 0"):
        jpeg(ramp, 0)


def test_frames_are_chosen_evenly_around_the_circle():
    assert choose_frames(8, None) == list(range(8))
    assert choose_frames(8, 4) == [0, 2, 4, 6]
    assert choose_frames(10, 4) == [0, 2, 5, 7]
    assert choose_frames(3, 8) == [0, 1, 2]
    frames = np.arange(8, dtype=np.uint8)[:, None, None, None] * np.ones((1, 64, 64, 3), np.uint8)
    shown = shown_frames(frames, 4, 32)
    assert [np.asarray(image)[16, 16, 0] for image in shown] == [0, 2, 4, 6]
    assert {image.size for image in shown} == {(32, 32)}
    assert shown_frames(frames, 1, 448)[0].size == (64, 64)
    with pytest.raises(ValueError, match="max_frames is 0"):
        choose_frames(8, 0)
