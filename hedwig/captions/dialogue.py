"""What a remote model is asked about one panorama, in which order, and how its answers are read.

One `Dialogue` serves both ways of asking: live, one request after the other, and by batch files, one round per step. It
is a generator of questions that takes the texts, so that neither way can ask anything else. A question's key is a
digest of all that determines its answer; the exact instruction is part of it, so a second step belongs to the very
text it condenses. Nothing here speaks to the network or reads a position.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hedwig.answers import answer_key
from hedwig.captions.prompts import PromptName, TokenizerName, condense, contact_sheet, describe, fit, jpeg
from hedwig.panorama import select_frames

__all__ = ["Completion", "Dialogue", "Pictures", "Question", "Said", "read_completion"]

JPEG_QUALITY = 85
SHEET_PX = 1024  # eight frames are then 1024x512, about 100 KB
MOST_TOKENS = {"basic": 160, "verbose": 320, "detail": 900}  # of an answer; condensing: three times the budget

Pictures = NDArray[np.uint8] | Sequence[bytes]


@dataclass(frozen=True)
class Question:
    """One request.

    Attributes:
        step: "basic", "verbose", "detail", "condense" or "shorten".
        key: under which its answer is kept.
        digest: of the instruction, 12 hex digits.
        body: makes the JSON body; pictures are encoded only then.
    """

    step: str
    key: str
    digest: str
    body: Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Said:
    """What came out: the caption, before it is fitted, and the detailed text of two steps, else empty."""

    text: str
    detail: str


@dataclass(frozen=True)
class Completion:
    """A chat completion as it was paid for.

    Attributes:
        text: the answer, None where it is of no use.
        trouble: why it is of no use, else None.
        spent: prompt_tokens, completion_tokens, num_requests (1).
        about: the model as the service calls it and the reason it ended, to be kept beside the text.
    """

    text: str | None
    trouble: str | None
    spent: dict[str, int]
    about: dict[str, str]

    @property
    def answer(self) -> dict[str, str]:
        """What is kept in the store."""
        return {"text": self.text or "", **self.about}


class Dialogue:
    """Questions about panoramas; the arguments are those of `hedwig.captions.openai.OpenAICaptioner`."""

    def __init__(
        self,
        *,
        model: str,
        revision: str | None,
        prompt: PromptName,
        token_budget: int,
        tokenizer: TokenizerName,
        max_frames: int,
        images: Literal["frames", "sheet"],
        detail: Literal["low", "high", "auto"],
        slicing_digest: str,
    ) -> None:
        if max_frames < 1:
            raise ValueError(f"max_frames is {max_frames}; at least one frame must be shown.")
        describe(prompt, 1)
        condense("", token_budget, tokenizer)
        self.model, self.prompt, self.token_budget, self.tokenizer = model, prompt, token_budget, tokenizer
        self.max_frames, self.images, self.detail = max_frames, images, detail
        self._parts = (slicing_digest, model, revision, images, detail, max_frames, JPEG_QUALITY, SHEET_PX)

    def ask(
        self, content_hash: str, num_frames: int, pictures: Callable[[], Pictures]
    ) -> Generator[Question, str, Said]:
        """The questions about one panorama: send each answer's text in, get the next question or `Said` out.

        Args:
            content_hash: of the panorama's image.
            num_frames: how many frames there are.
            pictures: gives them, (V, S, S, 3) uint8 or V JPEG files; called only where an image is needed.
        """
        chosen = select_frames(num_frames, min(num_frames, self.max_frames), "uniform")
        sheet = self.images == "sheet"
        instruction = describe(self.prompt, len(chosen), sheet=sheet)
        step = "detail" if self.prompt == "two-step" else self.prompt

        def looking() -> dict[str, Any]:
            return self._body(self._shown(pictures(), chosen, instruction), MOST_TOKENS[step])

        text = yield self._question(content_hash, step, instruction, looking)
        detail = ""
        if step == "detail":
            detail = text
            text = yield self._reading(content_hash, "condense", text)
        if fit(text, self.token_budget, self.tokenizer).trimmed:
            text = yield self._reading(content_hash, "shorten", text)
        return Said(text, detail)

    def _reading(self, content_hash: str, step: str, text: str) -> Question:
        """A question about a text."""
        instruction = condense(text, self.token_budget, self.tokenizer)

        def body() -> dict[str, Any]:
            return self._body(instruction, max(64, 3 * self.token_budget))

        return self._question(content_hash, step, instruction, body)

    def _question(self, content_hash: str, step: str, instruction: str, body: Callable[[], dict[str, Any]]) -> Question:
        digest = answer_key(instruction)[:12]
        return Question(step, answer_key(content_hash, step, digest, *self._parts), digest, body)

    def _body(self, content: str | list[dict[str, Any]], max_tokens: int) -> dict[str, Any]:
        message = {"role": "user", "content": content}
        return {"model": self.model, "messages": [message], "temperature": 0, "max_tokens": max_tokens}

    def _shown(self, pictures: Pictures, chosen: NDArray[np.intp], instruction: str) -> list[dict[str, Any]]:
        """The parts of a message: labelled frames or one sheet, then the instruction."""
        if isinstance(pictures, np.ndarray):
            frames = pictures[chosen]
            if self.images == "sheet":
                frames = contact_sheet(frames, SHEET_PX)[None]
            files = [jpeg(frame, JPEG_QUALITY) for frame in frames]
        elif self.images == "sheet":
            raise ValueError("A sheet is made of frames (V, S, S, 3), not of JPEG files; use images=frames.")
        else:
            files = [pictures[index] for index in chosen]
        parts: list[dict[str, Any]] = []
        for number, file in enumerate(files, 1):
            if len(files) > 1:
                parts.append({"type": "text", "text": f"Frame{number}:"})
            url = f"data:image/jpeg;base64,{base64.b64encode(file).decode()}"
            parts.append({"type": "image_url", "image_url": {"url": url, "detail": self.detail}})
        return [*parts, {"type": "text", "text": instruction}]


def read_completion(body: Any) -> Completion:
    """A chat completion, bytes or already JSON, usable or not.

    Raises:
        ValueError: it is none: no JSON object, or neither an answer nor a usage in it; then nothing was paid either.
    """
    found = json.loads(body) if isinstance(body, bytes) else body
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object, got {type(found).__name__}")
    usage = _mapping(found.get("usage"))
    choices = found.get("choices")
    choice = _mapping(choices[0]) if isinstance(choices, list) and choices else {}
    message = _mapping(choice.get("message"))
    ended = str(choice.get("finish_reason"))
    text = _text(message.get("content"))
    trouble = None
    if message.get("refusal"):
        trouble = f"the model refused: {str(message['refusal'])[:200]}"
    elif ended == "content_filter":
        trouble = "the service's content filter withheld the answer"
    elif not choice:
        trouble = "the answer holds no choices"
    elif not text.strip():
        trouble = f"the answer is empty (finish_reason {ended})"
    if trouble is not None and not usage:
        raise ValueError(f"{trouble}, and it states no usage")
    spent = {name: _count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens")}
    about = {"model": str(found.get("model", "")), "finish_reason": ended}
    return Completion(None if trouble else text, trouble, {**spent, "num_requests": 1}, about)


def _text(content: Any) -> str:
    """A message's content, which some services give as a list of parts; half characters become question marks."""
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content.encode("utf-8", "replace").decode() if isinstance(content, str) else ""


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(value: Any) -> int:
    return int(value) if isinstance(value, int | float) and value > 0 else 0
