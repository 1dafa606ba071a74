"""Captions on their way into a text tower: CLIP's byte-pair ids, and long captions cut into chunks that fit.

The vocabulary is the one open_clip ships (the same file as ViCLIP's). A context of 32 holds 30 tokens of a caption,
so what the paper calls a detailed caption loses most of itself. `chunk_caption` is our way around it, not the
paper's: pieces that fit, cut where a reader would pause. It does not average anything; that is the encoder's part.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["chunk_caption", "count_tokens", "tokenise"]

# Where to cut, the best place first: after sentences, after clauses, between words.
BORDERS = (
    re.compile(r"(?<=[.!?…])\s+|(?<=[。！？])\s*|\n+"),
    re.compile(r"(?<=[,;:)—–])\s+|(?<=[，；：、])\s*"),
    re.compile(r"\s+"),
)


@lru_cache(maxsize=1)
def _tokeniser() -> Any:
    from open_clip.tokenizer import SimpleTokenizer  # seconds to import, and only text needs it

    return SimpleTokenizer()


def tokenise(texts: Sequence[str], context_length: int = 32) -> tuple[Tensor, Tensor]:
    """CLIP's byte-pair ids of captions: start, tokens, end (49407), zeros.

    Args:
        texts: B captions.
        context_length: L; a longer caption loses its tail and ends with the end token all the same.

    Returns:
        ids (B, L) int64, and whether each was cut, (B,) bool.
    """
    if isinstance(texts, str):
        raise TypeError("tokenise takes a list of captions, got one str; wrap it in a list.")
    tokeniser = _tokeniser()
    ids = torch.zeros(len(texts), context_length, dtype=torch.int64)
    truncated = torch.zeros(len(texts), dtype=torch.bool)
    for row, text in enumerate(texts):
        tokens = [tokeniser.sot_token_id, *tokeniser.encode(text), tokeniser.eot_token_id]
        if len(tokens) > context_length:
            tokens = [*tokens[: context_length - 1], tokeniser.eot_token_id]
            truncated[row] = True
        ids[row, : len(tokens)] = torch.tensor(tokens)
    return ids, truncated


def count_tokens(text: str) -> int:
    """Byte-pair tokens of a caption, without start and end: at most 30 survive ViCLIP's context of 32."""
    return len(_tokeniser().encode(text))


def chunk_caption(text: str, fits: Callable[[str], bool]) -> list[str]:
    """The caption in chunks that fit, in order: as many whole sentences in each as it holds.

    A sentence that alone does not fit is cut after clauses, else between words, and a word in its middle.

    Args:
        text: a caption.
        fits: whether a text goes into the context whole.

    Returns:
        At least one chunk; the caption itself if it fits.
    """
    return [text] if fits(text) else _packed(_units(text.strip(), fits, 0), fits)


def _units(text: str, fits: Callable[[str], bool], level: int) -> list[str]:
    if fits(text) or len(text) < 2:
        return [text]
    if level == len(BORDERS):
        half = len(text) // 2
        return [*_units(text[:half], fits, level), *_units(text[half:], fits, level)]
    parts = (_units(part, fits, level + 1) for part in BORDERS[level].split(text) if part)
    return [unit for part in parts for unit in (_packed(part, fits) if len(part) > 1 else part)]


def _packed(units: Iterable[str], fits: Callable[[str], bool]) -> list[str]:
    """Neighbouring units joined as long as they fit."""
    chunks: list[str] = []
    for unit in units:
        joined = f"{chunks[-1]} {unit}" if chunks else unit
        if chunks and fits(joined):
            chunks[-1] = joined
        else:
            chunks.append(unit)
    return chunks
