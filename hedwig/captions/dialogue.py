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

from hedwig.answers import AnswerStore, Kept, answer_key
from hedwig.captions.prompts import (
    PromptName,
    TokenizerName,
    choose_frames,
    clean,
    condense,
    contact_sheet,
    describe,
    fit,
    jpeg,
    most_tokens,
)

__all__ = ["Completion", "Dialogue", "Pictures", "Question", "Said", "Shown", "Walk", "read_completion", "show", "walk"]

JPEG_QUALITY = 85
SHEET_PX = 1024  # eight frames are then 1024x512, about 100 KB


@dataclass(frozen=True)
class Shown:
    """What a model is shown of a panorama, ready to be sent.

    Attributes:
        num_frames: V of the panorama, of which some are shown.
        files: JPEG files, one per shown frame or one sheet of them.
    """

    num_frames: int
    files: Sequence[bytes]

    def __len__(self) -> int:
        """V, as of an array of frames."""
        return self.num_frames


Pictures = NDArray[np.uint8] | Shown


def show(frames: NDArray[np.uint8], max_frames: int, images: Literal["frames", "sheet"]) -> Shown:
    """The files that a model is shown of the frames (V, S, S, 3) uint8; only these are encoded."""
    chosen = frames[choose_frames(len(frames), max_frames)]
    if images == "sheet":
        chosen = contact_sheet(chosen, SHEET_PX)[None]
    return Shown(len(frames), [jpeg(frame, JPEG_QUALITY) for frame in chosen])


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
        token_budget: int | None,
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
        self._parts = (slicing_digest, model, revision, images, detail, JPEG_QUALITY, SHEET_PX)
        wording = [describe(prompt, max_frames, sheet=images == "sheet"), condense("", token_budget, tokenizer)]
        told = (prompt, token_budget, tokenizer, max_frames, wording, most_tokens(prompt, token_budget, tokenizer))
        self.digest = answer_key(*told, *self._parts)[:16]  # of all that is asked about any panorama

    def ask(
        self, content_hash: str, num_frames: int, pictures: Callable[[], Pictures]
    ) -> Generator[Question, str, Said]:
        """The questions about one panorama: send each answer's text in, get the next question or `Said` out.

        Args:
            content_hash: of the panorama's image.
            num_frames: how many frames there are.
            pictures: gives them, (V, S, S, 3) uint8 or as `show` made them; called only where an image is needed.
        """
        chosen = choose_frames(num_frames, self.max_frames)
        sheet = self.images == "sheet"
        instruction = describe(self.prompt, len(chosen), sheet=sheet)
        step = "detail" if self.prompt == "two-step" else self.prompt

        def looking() -> dict[str, Any]:
            most = most_tokens(self.prompt, self.token_budget, self.tokenizer)
            return self._body(self._message(pictures(), len(chosen), instruction), most)

        def question(step: str, instruction: str, body: Callable[[], dict[str, Any]]) -> Question:
            digest = answer_key(instruction)[:12]
            return Question(step, answer_key(content_hash, step, digest, chosen, *self._parts), digest, body)

        text = yield question(step, instruction, looking)
        detail = ""
        if step == "detail":
            detail = text
            text = yield question("condense", *self._reading(text))
        if self.token_budget is not None and fit(text, self.token_budget, self.tokenizer).trimmed:
            text = yield question("shorten", *self._reading(text))
        return Said(text, detail)

    def _reading(self, text: str) -> tuple[str, Callable[[], dict[str, Any]]]:
        """A question about a text: the instruction, and what makes its body."""
        instruction = condense(text, self.token_budget, self.tokenizer)
        most = most_tokens(self.prompt, self.token_budget, self.tokenizer, reading=True)
        return instruction, lambda: self._body(instruction, most)

    def _body(self, content: str | list[dict[str, Any]], max_tokens: int) -> dict[str, Any]:
        message = {"role": "user", "content": content}
        return {"model": self.model, "messages": [message], "temperature": 0, "max_tokens": max_tokens}

    def _message(self, pictures: Pictures, num_shown: int, instruction: str) -> list[dict[str, Any]]:
        """The parts of a message: labelled frames or one sheet, then the instruction."""
        shown = pictures if isinstance(pictures, Shown) else show(pictures, self.max_frames, self.images)
        files = shown.files
        if len(files) != (1 if self.images == "sheet" else num_shown):
            raise ValueError(f"{len(files)} files are to be shown as {num_shown} frames, images={self.images!r}.")
        parts: list[dict[str, Any]] = []
        for number, file in enumerate(files, 1):
            if len(files) > 1:
                parts.append({"type": "text", "text": f"Frame{number}:"})
            url = f"data:image/jpeg;base64,{base64.b64encode(file).decode()}"
            parts.append({"type": "image_url", "image_url": {"url": url, "detail": self.detail}})
        return [*parts, {"type": "text", "text": instruction}]


@dataclass(frozen=True)
class Walk:
    """How far a dialogue has come by the kept answers.

    Attributes:
        kept: question key -> what is kept of it, in order; the last one has no answer where there is an open question.
        question: the first question without an answer, None where all are answered.
        said: what came out, None while a question is open.
    """

    kept: dict[str, Kept]
    question: Question | None
    said: Said | None


def walk(
    dialogue: Dialogue,
    store: AnswerStore,
    content_hash: str,
    num_frames: int,
    pictures: Callable[[], Pictures] | None = None,
) -> Walk:
    """Go through a panorama's questions as far as the kept answers lead; asks nobody."""
    kept: dict[str, Kept] = {}
    talk = dialogue.ask(content_hash, num_frames, pictures or _no_pictures)
    try:
        question = next(talk)
        while True:
            found = kept[question.key] = store.get(question.key)
            if found.answer is None:
                return Walk(kept, question, None)
            question = talk.send(found.answer["text"])
    except StopIteration as end:
        return Walk(kept, None, end.value)


def _no_pictures() -> Pictures:
    raise RuntimeError("A question about pictures was asked again without its line; this is a bug, report it.")


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
    elif ended == "length" and "<think>" in text and "</think>" not in text:
        trouble = (
            "the answer ended in the middle of the model's thoughts (finish_reason length); switch its thinking off"
        )
    elif not clean(text):
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
