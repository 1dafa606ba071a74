"""Captions whose answers are already kept: the last step of every flow that asked a model in a pass of its own.

It asks nobody. A row without a kept answer fails, and the reason is what the model's last answer was of no use for.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from hedwig.answers import AnswerStore, answer_key
from hedwig.captions.leaks import LeakFilter, LeakMode
from hedwig.captions.prompts import PromptName, TokenizerName, clean, wording_digest
from hedwig.captions.result import CAPTION_COLUMNS, Answer, caption_columns

__all__ = ["KeptCaptioner"]


class KeptCaptioner:
    """Reads answers from an `AnswerStore` and lays out the caption columns.

    Args:
        answers: folder of the store.
        model: whose answers.
        revision: of the model; the digest of its weights, unless it is named otherwise.
        route: how it was asked, see `hedwig.captions.vllm`.
        prompt: what it was asked.
        token_budget: most tokens of a caption; None cuts nothing.
        tokenizer: whose tokens.
        max_frames: how many frames it was shown at most.
        leaks: what to do about place names.
        slicing_digest: of the settings that cut the frames.
    """

    reads: tuple[str, ...] = ("content_hash",)
    writes: tuple[str, ...] = CAPTION_COLUMNS

    def __init__(
        self,
        *,
        answers: str,
        model: str,
        revision: str | None,
        route: str,
        prompt: PromptName,
        token_budget: int | None,
        tokenizer: TokenizerName,
        max_frames: int,
        leaks: LeakMode,
        slicing_digest: str,
    ) -> None:
        self.store, self._leaks = AnswerStore(answers), LeakFilter(leaks)
        self._budget, self._tokenizer, self._model = token_budget, tokenizer, f"vllm:{model}@{revision or '-'}"
        asked = wording_digest(prompt, token_budget, tokenizer)
        self._asked = (self._model, route, asked, max_frames, slicing_digest)

    def key(self, content_hash: str) -> str:
        """Under which the answer about an image is kept."""
        return answer_key("caption", content_hash, *self._asked)

    def keep(self, content_hash: str, answer: Answer) -> None:
        """Keep what a model said; one that failed is noted with its cost."""
        spent = {
            "num_requests": 1,
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
        }
        if answer.failure is not None or not clean(answer.text):
            trouble = answer.failure or "the answer is empty"
            self.store.put_trouble(self.key(content_hash), trouble, {**spent, "num_troubles": 1})
        else:
            self.store.put(self.key(content_hash), {"text": answer.text, "detail": answer.detail, **spent}, spent)

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Add `CAPTION_COLUMNS` and `failure`, (B,) each."""
        answers = []
        for content_hash in batch["content_hash"]:
            kept = self.store.get(self.key(str(content_hash)))
            if kept.answer is None:
                answers.append(Answer(failure=f"no caption: {kept.trouble or 'the model was not asked'}; run again"))
                continue
            known = {k: kept.answer[k] for k in ("text", "detail", "prompt_tokens", "completion_tokens")}
            answers.append(Answer(**known))
        columns = caption_columns(
            answers, model=self._model, token_budget=self._budget, tokenizer=self._tokenizer, leaks=self._leaks
        )
        return {**batch, **columns}
