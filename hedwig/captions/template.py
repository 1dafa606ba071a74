"""Captions that only say what can be measured in the pixels of the frames.

`TemplateCaptioner` needs no model: it measures light, sky, plants, ground, houses and paint on a coarse sample of
pixels and says the result in words of a closed vocabulary, at most 30 tokens of ViCLIP's tokenizer, the most telling
clauses first. It never sees a position and never says a place: a caption that named one would leak the answer. It
is a floor for the vision-language captioner, not a replacement.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["MAX_TOKENS", "VOCABULARY", "TemplateCaptioner"]

Floats = NDArray[np.float32]

MAX_TOKENS = 30  # ViCLIP's text tower has 32 positions, two of them for the start and the end

_MONTHS = (
    "january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november",
    "december",
)  # fmt: skip
_COMPASS = ("north", "northeast", "east", "southeast", "south", "southwest", "west", "northwest")
_GROUND = ("black", "gray", "white", "red", "brown", "yellow", "green", "blue")
_NUMBERS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")

_LIGHT, _CONTRAST, _WARMTH = ("dark", "plain", "bright"), ("flat", "hazy", "sharp"), ("cold", "neutral", "warm")
_WEATHER, _OPENING = ("cloudy", "hazy", "clear"), ("narrow", "wide", "open")
_AMOUNTS = ("no", "few", "some", "many")
_NOUNS = ("street", "ground", "trees", "sky", "lines", "tint", "walls", "light", "sun", "in", "frame")

VOCABULARY = frozenset(
    _MONTHS + _COMPASS + _GROUND + _NUMBERS + _LIGHT + _CONTRAST + _WARMTH + _WEATHER + _OPENING + _AMOUNTS + _NOUNS
)


def _word(values: Floats, limits: tuple[float, ...], words: tuple[str, ...]) -> list[str]:
    """One of `words` for each value (B,): the first below the first limit, the last above the last."""
    return [words[index] for index in np.searchsorted(np.asarray(limits), values, side="right")]


def captioner_options(slicing: Mapping[str, Any]) -> dict[str, bool]:
    """Constructor arguments of `TemplateCaptioner` for frames that were cut by `slicing` (the fields of `Slicing`)."""
    around = slicing["mode"] in ("wrap", "perspective") and slicing.get("headings_deg") is None
    return {"full_turn": around, "align_north": bool(slicing.get("align_north", False))}


class TemplateCaptioner:
    """Stage: writes `caption` and its length in tokens, `caption_num_tokens`, from `frames` alone.

    `heading`, `captured_at` and `projection` are used where the batch has them and they are known; nothing else is
    looked at. A perspective photograph does not go once around, so it gets no compass side.

    Args:
        full_turn: the V frames go once around, evenly spaced and clockwise, as `hedwig.panorama` cuts them by
            default; then the sun has a compass side where the heading is known, else the number of a frame.
        align_north: with `full_turn`: the left edge of the first frame looks north rather than away from `heading`.
        max_tokens: longest caption in tokens, without start and end.
        sample: pixels per side and frame that are looked at.

    Raises:
        ValueError: `max_tokens` or `sample` are too small to say or see anything.
    """

    reads = ("frames",)
    reads_if_there = ("heading", "captured_at", "projection")
    writes = ("caption", "caption_num_tokens")

    def __init__(
        self, *, full_turn: bool = True, align_north: bool = False, max_tokens: int = MAX_TOKENS, sample: int = 32
    ) -> None:
        if max_tokens < 4 or sample < 8:
            raise ValueError(f"max_tokens is {max_tokens} and sample {sample}; use at least 4 and 8.")
        from open_clip.tokenizer import SimpleTokenizer  # imports torch: seconds

        tokenizer = SimpleTokenizer()
        # The vocabulary is closed and no merge crosses a blank or a comma, so counting words counts the caption.
        self._num_tokens = {word: len(tokenizer.encode(word)) for word in VOCABULARY}
        self.max_tokens, self.sample = max_tokens, sample
        self.full_turn, self.align_north = full_turn, align_north

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Add `caption` (B,) object of str and `caption_num_tokens` (B,) int32.

        Raises:
            ValueError: `frames` is not (B, V, S, S, 3) uint8 with at least one frame.
        """
        frames = np.asarray(batch["frames"])
        if frames.ndim != 5 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape[1:]:
            raise ValueError(f"frames are {frames.shape} {frames.dtype}; expected (B, V, S, S, 3) uint8.")
        num = len(frames)
        heading = batch.get("heading", np.full(num, None, object))
        captured_at = batch.get("captured_at", np.full(num, None, object))
        around = batch.get("projection", np.full(num, None, object)) != "perspective"
        clauses = self._describe(frames)
        captions, counts = np.full(num, "", object), np.zeros(num, np.int32)
        for index in range(num):
            captions[index], counts[index] = self._join(
                [*clauses["first"][index],
                 *self._outside(clauses["sun"][index], frames.shape[1], heading[index] if around[index] else None,
                 captured_at[index]), *clauses["last"][index]]
            )  # fmt: skip
        return {**batch, "caption": captions, "caption_num_tokens": counts}

    def _describe(self, frames: NDArray[np.uint8]) -> dict[str, Any]:
        """Clauses per panorama: `first`, `last` (B lists), and `sun` (B,), the brightest frame or -1."""
        side = min(self.sample, frames.shape[2], frames.shape[3])
        rows = (np.arange(side) + 0.5) * frames.shape[2] / side
        columns = (np.arange(side) + 0.5) * frames.shape[3] / side
        pixels = frames[:, :, rows.astype(int)[:, None], columns.astype(int)].astype(np.float32)
        red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
        luma = 0.299 * red + 0.587 * green + 0.114 * blue
        middle, axes = side // 2, (1, 2, 3)

        brightness, spread = luma.mean(axis=axes), luma.std(axis=axes)
        tint = (red - blue).mean(axis=axes)
        upper = (slice(None), slice(None), slice(0, middle))
        lower = (slice(None), slice(None), slice(side - middle, None))
        smooth = np.abs(np.diff(luma[upper], axis=3, append=luma[upper][..., -1:])) < 10
        blueish = blue[upper] > np.maximum(red[upper] + 8, green[upper])
        sky = ((luma[upper] > 110) & smooth & ((blue[upper] >= red[upper] - 24) | (luma[upper] > 215))).mean(axis=axes)
        clear = (blueish & smooth).mean(axis=axes) / np.maximum(sky, 1e-3)
        plants = ((green > red + 6) & (green > blue + 6)).mean(axis=axes)
        edges = (np.abs(np.diff(luma, axis=3)) > 24).mean(axis=axes)

        ground = pixels[lower]
        ground = ground.reshape(len(frames), math.prod(ground.shape[1:4]), 3)
        paint = ground.astype(np.int16)
        yellow = ((paint[..., 0] > 190) & (paint[..., 1] > 130) & (paint[..., 2] < 90)).mean(axis=1)
        white = (paint.min(axis=2) > 205).mean(axis=1)
        colours = self._ground_colours(ground)

        first, last = [], []
        road = ["yellow lines" if y > 0.003 else "white lines" if 0.004 < w < 0.25 else "no lines"
                for y, w in zip(yellow, white, strict=True)]  # fmt: skip
        light = _word(brightness, (85.0, 150.0), _LIGHT)
        weather = _word(clear, (0.25, 0.6), _WEATHER)
        opening = _word(sky, (0.35, 0.7), _OPENING)
        trees = _word(plants, (0.03, 0.12, 0.25), _AMOUNTS)
        walls = _word(edges, (0.04, 0.10, 0.18), _AMOUNTS)
        warmth = _word(tint, (-6.0, 10.0), _WARMTH)
        contrast = _word(spread, (35.0, 60.0), _CONTRAST)
        for index in range(len(frames)):
            first.append([f"{light[index]} street", f"{colours[index]} ground", f"{trees[index]} trees",
                          f"{weather[index]} {opening[index]} sky", road[index]])  # fmt: skip
            last.append([f"{warmth[index]} tint", f"{walls[index]} walls", f"{contrast[index]} light"])
        brightest = np.sort(luma.reshape(*luma.shape[:2], side * side), axis=2)
        glare = brightest[..., -max(1, side * side // 50) :].mean(axis=2)
        glare = glare + 0.25 * luma.mean(axis=(2, 3))
        ahead = glare.max(axis=1) - np.median(glare, axis=1)
        return {"first": first, "last": last, "sun": np.where(ahead > 4, glare.argmax(axis=1), -1)}

    @staticmethod
    def _ground_colours(ground: Floats) -> list[str]:
        """The commonest colour name of the pixels (B, P, 3)."""
        red, green, blue = ground[..., 0], ground[..., 1], ground[..., 2]
        high, low = ground.max(axis=2), ground.min(axis=2)
        coloured = (high - low) > 0.16 * high + 8
        names = np.where(high < 60, 0, np.where(high < 190, 1, 2))
        warm = np.where(green < 0.62 * red, 3, np.where(high > 175, 5, 4))
        hue = np.where(green >= np.maximum(red, blue), 6, np.where(blue >= red, 7, warm))
        names = np.where(coloured & (high >= 40), hue, names)
        counts = np.stack([(names == index).sum(axis=1) for index in range(len(_GROUND))], axis=1)
        return [_GROUND[index] for index in counts.argmax(axis=1)]

    def _outside(self, sun: int, num_frames: int, heading: Any, captured_at: Any) -> list[str]:
        """The side of the sun (compass where the heading is known) and the month; unknown ones are left out."""
        clauses = []
        if sun >= 0 and num_frames > 1:
            known = isinstance(heading, int | float | np.number) and math.isfinite(heading)
            if known and self.full_turn:
                left_edge = 0.0 if self.align_north else float(heading) - 180
                bearing = left_edge + 360 * (sun + 0.5) / num_frames
                clauses.append(f"sun {_COMPASS[math.floor(bearing / 45 + 0.5) % 8]}")
            elif sun < len(_NUMBERS):
                clauses.append(f"sun in {_NUMBERS[sun]} frame")
        if isinstance(captured_at, str):
            try:
                month = datetime.date.fromisoformat(captured_at[:10]).month
            except ValueError:
                return clauses
            clauses.append(_MONTHS[month - 1])
        return clauses

    def _join(self, clauses: list[str]) -> tuple[str, int]:
        """As many whole clauses as fit, with their number of tokens; a comma is one token."""
        caption, total = "", 0
        for clause in clauses:
            cost = sum(self._num_tokens[word] for word in clause.split()) + (1 if caption else 0)
            if total + cost > self.max_tokens:
                break
            caption = f"{caption}, {clause}" if caption else clause
            total += cost
        return caption, total
