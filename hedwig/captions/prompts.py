"""What a vision-language captioner is asked, and how its answer is made to fit a text tower.

The paper prints none of its prompts. What it gives is kept: the two kinds, basic and verbose; one example caption
(its Figure 2), whose form the basic prompt asks for; and the two-step strategy of its section on panorama generation,
"to produce a detailed caption and then condense it to 77 tokens or fewer". No prompt ever holds a position or a name,
and each forbids to guess one: a caption is evidence read off the pixels. A language model cannot count tokens, so it
is asked for words, and `fit` counts with the tower's own tokenizer and cuts at a border of sense.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "MOST_TOKENS",
    "PROMPT_VERSION",
    "TOKEN_BUDGETS",
    "Fitted",
    "PromptName",
    "TokenizerName",
    "choose_frames",
    "clean",
    "condense",
    "contact_sheet",
    "describe",
    "fit",
    "jpeg",
    "most_tokens",
    "prompt_digest",
    "shown_frames",
    "wording_digest",
]

PromptName = Literal["basic", "verbose", "two-step"]
TokenizerName = Literal["viclip", "clip"]

PROMPT_VERSION = 2  # raise when a wording or `fit` changes: cached answers of older wordings are then asked anew
TOKEN_BUDGETS: dict[str, int] = {"viclip": 30, "clip": 75}  # contexts of 32 and 77, less start and end
# Of an answer, in the model's own tokens; condensing and shortening: see `most_tokens`.
MOST_TOKENS: dict[str, int] = {"basic": 160, "verbose": 320, "two-step": 900}
WORDS_PER_TOKEN = 2 / 3  # English prose in CLIP's byte pairs, commas counted: 30 tokens hold about 20 words

# The form of the paper's Figure 2: "A cemetery located in a rural area, with cloudy weather, an eastward view, no
# visible traffic, and some grass and trees." The compass side is left out: it is metadata, not seen.
_BASIC = (
    "Describe the place in one plain sentence of at most 20 words: what kind of place it is, the weather, the road and "
    "the traffic, the buildings, the plants. Put what tells most about the region first."
)
_VERBOSE = (
    "Describe in 40 to 60 words what could tell the region: road surface, lane lines and poles; which side the "
    "traffic drives on; roofs, walls and fences; plants and soil; the script of signs and plates; the light and the "
    "weather. Put what tells most first."
)
_DETAILED = (
    "Write a detailed caption of everything visible that could tell the region: road surface, lane lines, kerbs, "
    "bollards and utility poles; which side the traffic drives on, vehicles and plates; roofs, walls, windows and "
    "fences; plants, soil and relief; the script, language and colours of signs, quoting short texts exactly; the "
    "season, the light and the weather. Go from frame to frame, then sum up."
)
_ASKED: dict[str, str] = {"basic": _BASIC, "verbose": _VERBOSE, "two-step": _DETAILED}
_RULES = (
    "Say only what can be seen. Never name or guess a country, region or city, nor a nationality. "
    "Answer with the text alone: no heading, no list, no quotation marks around it."
)
_CONDENSE = (
    "Condense this caption of a street panorama to at most {words} words, as one line of short clauses. Keep the "
    "visible clues that tell regions apart, the strongest first: road markings, side of driving, poles, signs and "
    "their script, roofs, plants, soil. Drop what every street has. Add nothing and never name a place, a country or "
    "a nationality. Answer with the line alone.\n\nCaption: {detailed}"
)

# A thought without its end was cut off, and one without its begin was begun by the model's chat template.
_SPECIAL = re.compile(
    r"\A(?:(?!<think>).)*</think>|<think>.*?(?:</think>|\Z)|<\|[^<>|]*\|>|</?s>|<end_of_utterance>|```\w*", re.DOTALL
)
_MARKUP = re.compile(r"\*\*|__|`")
_ITEM = re.compile(r"^\s*(?:#+|[-*•]|\d{1,2}[.)])\s+")
_PREAMBLE = re.compile(
    r"^(?:(?:sure|certainly|of course|okay|ok)\b[^:.!\n]{0,40}[.!:,]\s*)?"
    r"(?:(?:here(?:'s|’s| is| are)|this is|below is)\b[^:.\n]{0,80}:\s*)?"
    r"(?:(?:final |short |condensed |detailed |basic |verbose )*(?:caption|description|answer|summary)\s*:\s*)?",
    re.IGNORECASE,
)
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "«": "»"}
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")
_CLAUSE_END = re.compile(r"[,;:](?=\s)|\s[–—-](?=\s)")
_DANGLING = re.compile(
    r"(?:[\s,;:–—-]+(?:a|an|and|are|as|at|by|for|from|in|is|no|of|on|or|some|the|to|which|while|with))*[\s,;:–—-]*$"
)


@dataclass(frozen=True)
class Fitted:
    """A caption that fits.

    Attributes:
        text: the cleaned caption; empty when nothing was said.
        num_tokens: its tokens, without start and end.
        trimmed: something was cut off.
    """

    text: str
    num_tokens: int
    trimmed: bool


def describe(name: PromptName, num_frames: int, *, sheet: bool = False) -> str:
    """The instruction that goes with the frames; for "two-step" that of the detailed first step.

    The paper names the kinds and prints no wording; these are ours, see the module's text.

    Args:
        name: kind of caption.
        num_frames: frames that the model is shown.
        sheet: they come as one picture, as `contact_sheet` lays them out.

    Raises:
        ValueError: unknown name, or no frame.
    """
    if name not in _ASKED:
        raise ValueError(f"There is no prompt {name!r}; use one of {', '.join(get_args(PromptName))}.")
    if num_frames < 1:
        raise ValueError(f"A prompt needs at least one frame to speak of; num_frames is {num_frames}.")
    if num_frames == 1:
        shown = "The picture shows a street scene."
    else:
        where = "The picture holds" if sheet else "These are"
        order = ", left to right and then top to bottom" if sheet else " in order"
        shown = f"{where} {num_frames} frames of one street panorama{order}, all taken from the same spot."
    return f"{shown} {_ASKED[name]} {_RULES}"


def condense(detailed: str, token_budget: int | None, tokenizer: TokenizerName) -> str:
    """The instruction of the second step, text only: keep the clues of `detailed` in fewer words.

    Without a budget it asks for what the tokenizer's context holds, as the paper does.

    Raises:
        ValueError: a budget or tokenizer that `fit` would refuse too.
    """
    budget = _check(token_budget, tokenizer)
    return _CONDENSE.format(words=max(4, int(budget * WORDS_PER_TOKEN)), detailed=clean(detailed))


def most_tokens(
    prompt: PromptName, token_budget: int | None, tokenizer: TokenizerName, *, reading: bool = False
) -> int:
    """The longest answer a model may give, in its own tokens.

    Args:
        prompt: what is asked about the frames.
        token_budget: of the caption.
        tokenizer: whose tokens the budget counts.
        reading: the question is about a text: to condense or shorten it.
    """
    return max(64, 3 * _check(token_budget, tokenizer)) if reading else MOST_TOKENS[prompt]


def wording_digest(
    name: PromptName, token_budget: int | None, tokenizer: TokenizerName, version: int = PROMPT_VERSION
) -> str:
    """Twelve hex digits of the sha256 of all that determines what a model is asked, for keys of answers.

    The budget and the tokenizer are in it for "two-step" alone: the others are asked without them and cut afterwards.
    """
    _check(token_budget, tokenizer)
    wording = [describe(name, 1), describe(name, 2), describe(name, 2, sheet=True), str(MOST_TOKENS[name])]
    if name == "two-step":
        wording.append(condense("", token_budget, tokenizer))
    return _digest([version, name, wording])


def prompt_digest(
    name: PromptName, token_budget: int | None, tokenizer: TokenizerName, version: int = PROMPT_VERSION
) -> str:
    """Twelve hex digits of the sha256 of all that determines the wording and the cut, for fingerprints."""
    return _digest([wording_digest(name, token_budget, tokenizer, version), token_budget, tokenizer])


def _digest(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, ensure_ascii=True).encode()).hexdigest()[:12]


def clean(text: str) -> str:
    """A model's answer as one line: no thinking, markup, special tokens, preamble ("Here is ...:") or outer quotes."""
    text = _SPECIAL.sub(" ", text)
    joined, in_list = "", False
    for line in _MARKUP.sub("", text).splitlines():
        words, is_item = _ITEM.subn("", line)
        words = " ".join(words.split())
        if words:
            listed = (is_item or in_list) and joined[-1:] not in (*".!?:;,%", "")
            joined = f"{joined}, {words}" if listed else f"{joined} {words}".strip()
            in_list = bool(is_item)
    before = None
    while joined != before:  # a quoted caption may hold a preamble, and the other way round
        before = joined
        joined = _PREAMBLE.sub("", joined, count=1).strip()
        if len(joined) > 1 and _QUOTES.get(joined[0]) == joined[-1] and joined[0] not in joined[1:-1]:
            joined = joined[1:-1].strip()
    return joined


def fit(text: str, token_budget: int | None, tokenizer: TokenizerName) -> Fitted:
    """`clean` the text and, where it is too long, cut it at the end of a sentence, else of a clause, else of a word.

    A border counts only when it keeps at least half of what would fit; "and", "with" and their like are not left at
    the end. Tokens are CLIP's byte pairs, which ViCLIP shares.

    Args:
        text: what the model said.
        token_budget: most tokens, without start and end; None: the text is cleaned and not cut.
        tokenizer: whose context the budget is measured against: at most 30 for "viclip", 75 for "clip".

    Raises:
        ValueError: unknown tokenizer, or a budget that its context does not have.
    """
    _check(token_budget, tokenizer)
    from hedwig.models.viclip import count_tokens  # imports torch

    text = clean(text)
    total = count_tokens(text)
    if token_budget is None or total <= token_budget:
        return Fitted(text, total, trimmed=False)
    ends = [match.end() for match in re.finditer(r"\S+", text)]
    kept = bisect_right(ends, token_budget, key=lambda end: count_tokens(text[:end]))
    if kept == 0:  # a script without blanks: any character may end it
        ends = list(range(1, len(text) + 1))
        kept = bisect_right(ends, token_budget, key=lambda end: count_tokens(text[:end]))
    longest = text[: ends[kept - 1]] if kept else ""
    half = len(longest) / 2
    sentences = [match.end() for match in _SENTENCE_END.finditer(longest)]
    clauses = [match.start() for match in _CLAUSE_END.finditer(text, 0, len(longest) + 1)]
    cut = longest
    for borders in (sentences, clauses):
        if borders and borders[-1] >= half:
            cut = longest[: borders[-1]]
            break
    cut = cut if cut.endswith((".", "!", "?")) else _DANGLING.sub("", cut)
    return Fitted(cut, count_tokens(cut), trimmed=True)


def _check(token_budget: int | None, tokenizer: str) -> int:
    """The budget, or what the tokenizer's context holds where there is none."""
    if tokenizer not in TOKEN_BUDGETS:
        raise ValueError(f"There is no tokenizer {tokenizer!r}; use one of {', '.join(TOKEN_BUDGETS)}.")
    most = TOKEN_BUDGETS[tokenizer]
    if token_budget is not None and not 1 <= token_budget <= most:
        raise ValueError(
            f"token_budget is {token_budget}; {tokenizer} reads 1 to {most} tokens beside start and end. None cuts "
            "nothing, and leaves it to the text encoder."
        )
    return most if token_budget is None else token_budget


def choose_frames(num_frames: int, max_frames: int | None) -> list[int]:
    """Indices of at most `max_frames` of `num_frames`, evenly spaced around the circle from the first."""
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"max_frames is {max_frames}; show at least 1 frame, or None for all.")
    keep = num_frames if max_frames is None else min(num_frames, max_frames)
    return [index * num_frames // keep for index in range(keep)]


def shown_frames(frames: NDArray[np.uint8], max_frames: int | None, frame_px: int) -> list[Any]:
    """The chosen frames of (V, S, S, 3) uint8 as PIL images of at most `frame_px` a side."""
    from PIL import Image

    images = []
    for index in choose_frames(len(frames), max_frames):
        image = Image.fromarray(frames[index])
        if max(image.size) > frame_px:
            image = image.resize((frame_px, frame_px), Image.Resampling.BICUBIC)
        images.append(image)
    return images


def contact_sheet(frames: NDArray[np.uint8], max_px: int) -> NDArray[np.uint8]:
    """All frames on one sheet, left to right and top to bottom, about twice as wide as high.

    Args:
        frames: (V, S, S, 3) uint8 RGB.
        max_px: longest side of the sheet; frames are made smaller for it, never larger.

    Returns:
        (H, W, 3) uint8 RGB; places without a frame are black.

    Raises:
        ValueError: other frames, or fewer pixels than frames in a row.
    """
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
        raise ValueError(f"frames are {frames.shape} {frames.dtype}; expected (V, S, S, 3) uint8 with V at least 1.")
    from PIL import Image

    num, height, width = frames.shape[:3]
    # Few empty places first, then the shape nearest to 2:1; wider rather than higher on a tie.
    columns = min(
        range(1, num + 1), key=lambda c: (-(-num // c) * c - num > 1, abs(math.log(c / -(-num // c) / 2)), -c)
    )
    rows = -(-num // columns)
    scale = min(1.0, max_px / (columns * width), max_px / (rows * height))
    cell_h, cell_w = int(height * scale), int(width * scale)
    if min(cell_h, cell_w) < 1:
        raise ValueError(f"max_px is {max_px}: too few for {columns} frames in a row; use 256 or more.")
    sheet = np.zeros((rows * cell_h, columns * cell_w, 3), np.uint8)
    for index, frame in enumerate(frames):
        y, x = (index // columns) * cell_h, (index % columns) * cell_w
        small = Image.fromarray(frame).resize((cell_w, cell_h), Image.Resampling.LANCZOS, reducing_gap=3.0)
        sheet[y : y + cell_h, x : x + cell_w] = np.asarray(small)
    return sheet


def jpeg(image: NDArray[np.uint8], quality: int) -> bytes:
    """The image (H, W, 3) uint8 RGB as a JPEG file with halved chroma; the same bytes for the same pixels."""
    if not 1 <= quality <= 100:
        raise ValueError(f"quality is {quality}; JPEG has 1 to 100.")
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(file, "JPEG", quality=quality, subsampling=2)
    return file.getvalue()
