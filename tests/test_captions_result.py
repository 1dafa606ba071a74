"""From answers to columns: the same cleaning, filter, budget and failures for every captioner."""

from __future__ import annotations

import numpy as np
import pytest

from hedwig.captions.leaks import LeakFilter
from hedwig.captions.result import CAPTION_COLUMNS, Answer, caption_columns, finish
from hedwig.models.viclip import count_tokens


def columns(answers, mode="report"):
    leaks = None if mode == "off" else LeakFilter(mode)
    return caption_columns(answers, model="m@1", token_budget=30, tokenizer="viclip", leaks=leaks)


def test_columns_and_their_types():
    out = columns([Answer('"A road in Paris, France."', "detail", 900, 12), Answer(failure="no answer")])
    assert tuple(out) == (*CAPTION_COLUMNS, "failure")
    assert out["caption"].tolist() == ["A road in Paris, France.", ""]
    assert out["caption_num_tokens"].tolist() == [count_tokens("A road in Paris, France."), 0]
    assert out["caption_detail"].tolist() == ["detail", ""]
    assert out["caption_model"].tolist() == ["m@1", "m@1"]
    assert out["caption_prompt_tokens"].tolist() == [900, 0]
    assert out["caption_completion_tokens"].tolist() == [12, 0]
    assert out["caption_leaks"].tolist() == ["Paris; France", ""]
    assert out["failure"].tolist() == [None, "no answer"]
    assert out["caption_trimmed"].tolist() == [False, False]
    for name in ("caption_num_tokens", "caption_prompt_tokens", "caption_completion_tokens"):
        assert out[name].dtype == np.int32


def test_what_was_cut_is_marked_and_without_a_budget_nothing_is():
    long = [Answer("low houses, " * 40)]
    assert columns(long)["caption_trimmed"].tolist() == [True]
    whole = caption_columns(long, model="m", token_budget=None, tokenizer="viclip", leaks=None)
    assert whole["caption_trimmed"].tolist() == [False]
    assert whole["caption_num_tokens"].tolist() > [100]


def test_modes():
    answer = [Answer("A road in Paris, France.")]
    assert columns(answer, "off")["caption_leaks"].tolist() == [""]
    masked = columns(answer, "mask")
    assert masked["caption"].tolist() == ["A road in a place."]
    assert masked["caption_leaks"].tolist() == ["Paris; France"]
    assert masked["failure"].tolist() == [None]
    assert columns(answer, "reject")["failure"].tolist() == ["the caption names a place: Paris, France"]
    assert columns([Answer("A road.")], "reject")["failure"].tolist() == [None]


@pytest.mark.parametrize("text", ["", "  \n", "Here is the caption:", "<|im_end|>"])
def test_nothing_said_is_a_failure(text):
    assert columns([Answer(text)])["failure"].tolist() == ["the captioner answered nothing"]


def test_a_name_that_was_cut_off_is_no_reason_to_reject():
    text = "A wide asphalt road with white lines, " + "low houses and " * 12 + "Paris"
    kept = finish(text, token_budget=30, tokenizer="viclip", leaks=LeakFilter("reject"))
    assert kept.trimmed
    assert kept.leaks == ()
    assert kept.failure is None
    assert finish(text, token_budget=30, tokenizer="viclip", leaks=LeakFilter("mask")).num_tokens <= 30


def test_no_rows_at_all():
    assert {name: len(values) for name, values in columns([]).items()} == dict.fromkeys(
        (*CAPTION_COLUMNS, "failure"), 0
    )
