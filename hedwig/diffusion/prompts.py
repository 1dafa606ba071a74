"""From a caption to what the denoiser reads: the template of the panorama model, cut to its tokenizer's own budget.

The words around a caption are those that SD-T2I-360PanoImage was tuned and published with. In them a pair of round
brackets multiplies the weight of what it holds by 1.1, as in the long-prompt weighting of Stable Diffusion's web
interfaces; a caption is taken literally. CLIP's text encoder has 77 positions, two of them for start and end: the
template is never cut, the caption is, at a word border, and how much is said. Nothing here writes or shortens captions
by meaning; the paper's two-step prompting does that before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Prompt", "PromptEncoder", "PromptTemplate", "weighted_parts"]

BRACKET_WEIGHT = 1.1
_SPECIAL = ("<|startoftext|>", "<|endoftext|>")


@dataclass(frozen=True)
class PromptTemplate:
    """The words before and after a caption, and what the picture should not show.

    Attributes:
        prefix: the words that the panorama model was tuned with; they must be kept.
        suffix: quality words; empty for none.
        negative: guidance leads away from this; empty for none.
    """

    prefix: str = "<360panorama>, "
    suffix: str = ", photorealistic, trend on artstation, ((best quality)), ((ultra high res))"
    negative: str = (
        "persons, complex texture, small objects, sheltered, blur, worst quality, low quality, zombie, logo, text, "
        "watermark, username, monochrome, complex lighting"
    )


class Prompt(NamedTuple):
    """A caption in its template, ready for the text encoder.

    Attributes:
        text: the words, without the brackets of the template.
        ids: tokens between start and end.
        weights: of these tokens.
        num_words_cut: words of the caption that did not fit.
    """

    text: str
    ids: tuple[int, ...]
    weights: tuple[float, ...]
    num_words_cut: int


def weighted_parts(text: str) -> list[tuple[str, float]]:
    """Split a text at its round brackets into parts and their weights, 1.1 to the power of the depth.

    Raises:
        ValueError: the brackets do not match.
    """
    parts: list[tuple[str, float]] = []
    depth, start = 0, 0
    for place, sign in enumerate(f"{text}\0"):
        if sign not in "()\0":
            continue
        if place > start:
            parts.append((text[start:place], BRACKET_WEIGHT**depth))
        depth, start = depth + {"(": 1, ")": -1, "\0": 0}[sign], place + 1
        if depth < 0:
            break
    if depth:
        raise ValueError(f"The brackets in {text!r} do not match; close each '(' with a ')'.")
    return parts


class PromptEncoder:
    """Cut captions to the budget and encode them.

    Args:
        tokenizer: the checkpoint's CLIP tokenizer.
        text_encoder: the checkpoint's CLIP text model.
        template: words around every caption.

    Raises:
        ValueError: the template leaves no room for a caption.
    """

    def __init__(self, tokenizer: Any, text_encoder: Any, template: PromptTemplate) -> None:
        self._tokenizer, self._text_encoder = tokenizer, text_encoder
        positions = int(text_encoder.config.max_position_embeddings)
        self.num_positions = min(int(tokenizer.model_max_length), positions)
        self._before, self._after = self._parts(template.prefix), self._parts(template.suffix)
        used = sum(len(ids) for _, ids, _ in (*self._before, *self._after))
        self.num_caption_tokens = self.num_positions - 2 - used
        if self.num_caption_tokens < 4:
            raise ValueError(
                f"The prefix and suffix of the prompt take {used} of {self.num_positions - 2} tokens and leave no room "
                "for a caption; shorten them."
            )
        self._negative = template.negative

    def _parts(self, text: str) -> list[tuple[str, list[int], float]]:
        return [(part, self._ids(part), weight) for part, weight in weighted_parts(text)]

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def fit(self, caption: str) -> Prompt:
        """The longest beginning of the caption, in whole words, that fits into the template.

        Raises:
            ValueError: the caption has no words, or its first is longer than the budget.
        """
        for mark in _SPECIAL:  # the tokenizer would take these for its own
            caption = caption.replace(mark, " ")
        words = caption.split()
        if not words:
            raise ValueError("no caption")
        low, high = 0, len(words)  # the number of tokens never falls when a word is added
        while low < high:
            middle = (low + high + 1) // 2
            fits = len(self._ids(" ".join(words[:middle]))) <= self.num_caption_tokens
            low, high = (middle, high) if fits else (low, middle - 1)
        if low == 0:
            raise ValueError(f"the first word takes more than {self.num_caption_tokens} tokens: {words[0][:40]!r}")
        kept = " ".join(words[:low])
        middle_part = (kept.rstrip(" ,;:-") if low < len(words) else kept) or kept
        parts = [*self._before, (middle_part, self._ids(middle_part), 1.0), *self._after]
        return Prompt(
            "".join(text for text, _, _ in parts),
            tuple(i for _, ids, _ in parts for i in ids),
            tuple(weight for _, ids, weight in parts for _ in ids),
            len(words) - low,
        )

    def encode(self, prompts: Sequence[Prompt]) -> Tensor:
        """(B, L, D): the text encoder's last states, L its number of positions, weighted by token.

        A weighted embedding is scaled back to its mean before, as long-prompt weighting does.
        """
        ids = torch.full((len(prompts), self.num_positions), int(self._tokenizer.pad_token_id))
        weights = torch.ones(len(prompts), self.num_positions)
        ids[:, 0] = int(self._tokenizer.bos_token_id)
        for row, prompt in enumerate(prompts):
            end = len(prompt.ids) + 1
            ids[row, 1:end] = torch.tensor(prompt.ids, dtype=torch.long)
            ids[row, end] = int(self._tokenizer.eos_token_id)
            weights[row, 1:end] = torch.tensor(prompt.weights)
        device = self._text_encoder.device
        states: Tensor = self._text_encoder(ids.to(device))[0]
        if bool((weights == 1).all()):
            return states
        plain = states.float()
        scaled = plain * weights.to(device)[..., None]
        before, after = plain.mean(dim=(1, 2), keepdim=True), scaled.mean(dim=(1, 2), keepdim=True)
        # A mean of nearly nothing has no direction to restore.
        steady = (before.abs() > 1e-4) & (after.abs() > 1e-4)
        factor = torch.where(steady, before / torch.where(steady, after, 1.0), 1.0)
        return (scaled * factor).to(states.dtype)

    def encode_text(self, text: str) -> Tensor:
        """(1, L, D) of a text outside the template, in which brackets weigh; what does not fit is cut off."""
        parts, room = self._parts(text), self.num_positions - 2
        ids = tuple(i for _, ids, _ in parts for i in ids)[:room]
        weights = tuple(weight for _, ids, weight in parts for _ in ids)[:room]
        return self.encode([Prompt("".join(part for part, _, _ in parts), ids, weights, 0)])

    def encode_negative(self) -> Tensor:
        """(1, L, D): the template's negative words."""
        return self.encode_text(self._negative)
