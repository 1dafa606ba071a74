"""From a model's answer to the columns of the captions table: one way for every captioner.

A captioner, wherever its model runs, ends in `Answer`s; `caption_columns` cleans them, looks for leaked place names,
trims to the token budget and lays out the columns `CAPTION_COLUMNS`. It decides what a failed row is: no answer, an
empty one, or one that names a place where the filter rejects. The detailed text of a two-step caption is kept as the
model gave it, since it is evidence and is never embedded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hedwig.captions.leaks import LeakFilter
from hedwig.captions.prompts import TokenizerName, clean, fit

__all__ = ["CAPTION_COLUMNS", "Answer", "Finished", "caption_columns", "finish"]

CAPTION_COLUMNS = (
    "caption",
    "caption_num_tokens",
    "caption_detail",
    "caption_model",
    "caption_prompt_tokens",
    "caption_completion_tokens",
    "caption_leaks",
    "caption_trimmed",
)


@dataclass(frozen=True)
class Answer:
    """What a model said about one panorama.

    Attributes:
        text: the last answer, of the second step where there are two.
        detail: the answer of the first of two steps, else empty.
        prompt_tokens: tokens read, summed over the steps, counted by the model's own tokenizer.
        completion_tokens: tokens written, summed over the steps.
        failure: why there is no answer, else None.
    """

    text: str = ""
    detail: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    failure: str | None = None


@dataclass(frozen=True)
class Finished:
    """A caption as it goes into the table.

    Attributes:
        caption: cleaned, masked where asked, and within the budget.
        num_tokens: its tokens, without start and end.
        trimmed: something was cut off.
        leaks: place names that were found, in order.
        failure: why the row is to be rejected, else None.
    """

    caption: str
    num_tokens: int
    trimmed: bool
    leaks: tuple[str, ...]
    failure: str | None


def finish(text: str, *, token_budget: int | None, tokenizer: TokenizerName, leaks: LeakFilter | None) -> Finished:
    """Clean, mask or look for place names (not at all without `leaks`), and trim unless `token_budget` is None."""
    names: list[str] = []
    if leaks is not None and leaks.mode == "mask":
        text, names = leaks.apply(clean(text))
    fitted = fit(text, token_budget, tokenizer)
    if leaks is not None and leaks.mode != "mask":
        names = leaks.find(fitted.text)
    failure = None
    if not fitted.text:
        failure = "the captioner answered nothing"
    elif names and leaks is not None and leaks.mode == "reject":
        failure = f"the caption names a place: {', '.join(names)}"
    return Finished(fitted.text, fitted.num_tokens, fitted.trimmed, tuple(names), failure)


def caption_columns(
    answers: Sequence[Answer],
    *,
    model: str,
    token_budget: int | None,
    tokenizer: TokenizerName,
    leaks: LeakFilter | None,
) -> dict[str, NDArray[Any]]:
    """The columns `CAPTION_COLUMNS` of B answers, and `failure`.

    Returns:
        caption, caption_detail, caption_model, caption_leaks: (B,) object of str, the last one names joined by "; ";
        caption_num_tokens, caption_prompt_tokens, caption_completion_tokens: (B,) int32;
        caption_trimmed: (B,) bool, whether the end was cut off; failure: (B,) object of None or a reason.
    """
    done = [
        Finished("", 0, trimmed=False, leaks=(), failure=answer.failure)
        if answer.failure is not None
        else finish(answer.text, token_budget=token_budget, tokenizer=tokenizer, leaks=leaks)
        for answer in answers
    ]
    return {
        "caption": _objects([one.caption for one in done]),
        "caption_num_tokens": np.array([one.num_tokens for one in done], np.int32),
        "caption_detail": _objects([answer.detail for answer in answers]),
        "caption_model": _objects([model] * len(done)),
        "caption_prompt_tokens": np.array([answer.prompt_tokens for answer in answers], np.int32),
        "caption_completion_tokens": np.array([answer.completion_tokens for answer in answers], np.int32),
        "caption_leaks": _objects(["; ".join(one.leaks) for one in done]),
        "caption_trimmed": np.array([one.trimmed for one in done], np.bool_),
        "failure": _objects([one.failure for one in done]),
    }


def _objects(values: Sequence[str | None]) -> NDArray[np.object_]:
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column
