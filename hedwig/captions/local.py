"""Captions by a vision-language model on this machine, run by transformers from a folder.

`TransformersCaptioner` takes what transformers has native classes for (InternVL3 in its ``-hf`` form, Qwen2.5-VL,
Qwen3-VL, SmolVLM2, LLaVA-OneVision ...): weights as safetensors, no code from the folder, nothing from the network.
Each frame is one tile, labelled "Frame1: ", as InternVL's video models were trained; their tiling of large pictures
would turn one frame of 640 px into five tiles. Decoding is greedy. InternVideo2.5's own code does not run under this
transformers; `hedwig.captions.vllm` makes the requests for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from hedwig.captions.folders import model_folder, weights_digest
from hedwig.captions.leaks import LeakFilter, LeakMode
from hedwig.captions.prompts import PromptName, TokenizerName, clean, condense, describe, most_tokens, shown_frames
from hedwig.captions.result import CAPTION_COLUMNS, Answer, caption_columns

__all__ = ["TransformersCaptioner"]

Frames = NDArray[np.uint8]

# What stops each family's image processor from cutting a picture into tiles.
_ONE_TILE: dict[str, Any] = {"crop_to_patches": False, "do_image_splitting": False}


class TransformersCaptioner:
    """Stage: writes `CAPTION_COLUMNS` from `frames`; a row that gets no caption has a `failure`.

    The same frames give the same words for the same batch on the same machine. With another `batch_size` a product
    may round differently, and two nearly equally likely words may then change places.

    Args:
        model: folder with config.json, the processor's files and safetensors.
        label: how the model is called in `caption_model`; the folder's name by default.
        revision: which version it is, for `caption_model`; by default `weights_digest` of the folder.
        prompt: kind of caption.
        token_budget: most tokens of the caption; None cuts nothing.
        tokenizer: whose tokens.
        leaks: what happens to place names; "off" does not look for them.
        max_frames: most frames shown, chosen evenly; None shows all.
        frame_px: frames larger than this are made smaller before the model's own processor sees them.
        max_new_tokens: longest answer of a step, in the model's own tokens; None: `most_tokens` of the prompt.
        batch_size: rows that go through the model at once.
        device: "auto" takes CUDA where there is one.
        dtype: "auto" is bfloat16 on CUDA and float32 elsewhere.
        num_threads: torch's threads in this process; None leaves them as they are.

    Raises:
        FileNotFoundError: the folder is not there, or holds no model of that form.
        ValueError: a setting out of range, or an architecture that transformers has no class for.
    """

    reads = ("frames",)
    reads_if_there = ("content_hash",)  # not looked at, and a column of the captions table
    writes = CAPTION_COLUMNS

    def __init__(
        self,
        *,
        model: str,
        label: str | None = None,
        revision: str | None = None,
        prompt: PromptName = "basic",
        token_budget: int | None = 30,
        tokenizer: TokenizerName = "viclip",
        leaks: LeakMode | Literal["off"] = "report",
        max_frames: int | None = None,
        frame_px: int = 448,
        max_new_tokens: int | None = None,
        batch_size: int = 4,
        device: str = "auto",
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        num_threads: int | None = None,
    ) -> None:
        for name, value in (("frame_px", frame_px), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        describe(prompt, 1)  # a bad name or budget is refused before gigabytes are read
        condense("", token_budget, tokenizer)
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        folder = model_folder(model)
        self.prompt, self.token_budget, self.tokenizer = prompt, token_budget, tokenizer
        self.max_frames, self.frame_px, self.batch_size = max_frames, frame_px, batch_size
        self._most_looking, self._most_reading = (
            max_new_tokens or most_tokens(prompt, token_budget, tokenizer, reading=reading) for reading in (False, True)
        )
        self.leaks = None if leaks == "off" else LeakFilter(leaks)
        self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        self._dtype = (
            (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
            if dtype == "auto"
            else getattr(torch, dtype)
        )
        self.caption_model = f"transformers:{label or folder.name}@{revision or weights_digest(folder)}"
        self._load(folder)

    def _load(self, folder: Path) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor  # seconds to import

        try:
            self._processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            network: Any = AutoModelForImageTextToText.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=self._dtype
            )
        except (ValueError, KeyError, OSError) as error:
            raise ValueError(
                f"transformers has no image-and-text model of its own for {str(folder)!r}: {error} Use a model in "
                "native form (for InternVL a repository whose name ends in -hf), or caption through vLLM."
            ) from error
        if not hasattr(self._processor, "image_processor") or not hasattr(self._processor, "tokenizer"):
            raise ValueError(
                f"{str(folder)!r} has no processor for images and text; is preprocessor_config.json there?"
            )
        self._network = network.to(self.device).eval()
        own = self._processor.tokenizer
        own.padding_side = "left"  # answers of a batch start at one column
        if own.pad_token_id is None:
            own.pad_token = own.eos_token
        ends = network.generation_config.eos_token_id
        ends = own.eos_token_id if ends is None else ends
        self._ends = frozenset(ends if isinstance(ends, list | tuple) else [ends])
        self._one_tile = {name: to for name, to in _ONE_TILE.items() if hasattr(self._processor.image_processor, name)}
        # Some templates end a picture's line themselves.
        probe = self._render([{"type": "image"}, {"type": "text", "text": "§"}])
        self._break = "" if probe.partition("§")[0].endswith("\n") else "\n"

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Add `CAPTION_COLUMNS`, see `hedwig.captions.result.caption_columns`, and `failure` if a row has one.

        Raises:
            ValueError: `frames` is not (B, V, S, S, 3) uint8 with at least one frame.
        """
        frames = np.asarray(batch["frames"])
        if frames.ndim != 5 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape[1:]:
            raise ValueError(f"frames are {frames.shape} {frames.dtype}; expected (B, V, S, S, 3) uint8.")
        answers: list[Answer] = []
        for start in range(0, len(frames), self.batch_size):
            answers += self._answer(frames[start : start + self.batch_size])
        columns = caption_columns(
            answers,
            model=self.caption_model,
            token_budget=self.token_budget,
            tokenizer=self.tokenizer,
            leaks=self.leaks,
        )
        if not any(columns["failure"]):
            del columns["failure"]
        return {**batch, **columns}

    def _answer(self, frames: Frames) -> list[Answer]:
        """Answers to (B, V, S, S, 3); rows that fail together are tried alone."""
        try:
            return self._caption(frames)
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:  # out of memory is a RuntimeError
            if len(frames) == 1:
                return [Answer(failure=f"the model failed: {type(error).__name__}: {str(error)[:300]}")]
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return [answer for row in range(len(frames)) for answer in self._answer(frames[row : row + 1])]

    def _caption(self, frames: Frames) -> list[Answer]:
        """The first step on the frames and, for "two-step", the second on its text."""
        shown = [shown_frames(panorama, self.max_frames, self.frame_px) for panorama in frames]
        num = len(shown[0])
        parts: list[dict[str, str]] = []
        for index in range(num):
            parts += [{"type": "text", "text": f"Frame{index + 1}: "}, {"type": "image"}]
            if self._break:
                parts.append({"type": "text", "text": self._break})
        prompt = self._render([*parts, {"type": "text", "text": describe(self.prompt, num)}])
        first = self._generate([prompt] * len(shown), shown, self._most_looking)
        if self.prompt != "two-step":
            return [Answer(text, "", read, written) for text, read, written in first]
        details = [clean(text) for text, _, _ in first]
        asked = [
            self._render([{"type": "text", "text": condense(detail, self.token_budget, self.tokenizer)}])
            for detail in details
        ]
        second = self._generate(asked, None, self._most_reading)
        return [
            Answer(text, detail, read + read_before, written + written_before)
            for detail, (_, read_before, written_before), (text, read, written) in zip(
                details, first, second, strict=True
            )
        ]

    def _render(self, content: Sequence[Mapping[str, str]]) -> str:
        """The model's chat format around one user message, up to where its answer begins."""
        text: str = self._processor.apply_chat_template(
            [{"role": "user", "content": list(content)}], tokenize=False, add_generation_prompt=True
        )
        return text

    def _generate(self, prompts: list[str], images: list[list[Any]] | None, most: int) -> list[tuple[str, int, int]]:
        """Greedy answers, and for each the tokens read and written."""
        own = self._processor.tokenizer
        arguments: dict[str, Any] = {"text": prompts, "padding": True, "return_tensors": "pt"}
        if own.bos_token is not None and prompts[0].startswith(own.bos_token):
            arguments["add_special_tokens"] = False  # the template has put it there
        if images is not None:
            arguments |= {"images": images, **self._one_tile}
        inputs = self._processor(**arguments).to(self.device, self._dtype)
        with torch.inference_mode():
            output = self._network.generate(
                **inputs,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                max_new_tokens=most,
                pad_token_id=own.pad_token_id,
            )
        read = inputs["attention_mask"].sum(dim=1).tolist()
        new = output[:, inputs["input_ids"].shape[1] :].tolist()
        ended = [next((at for at, token in enumerate(row) if token in self._ends), len(row)) for row in new]
        texts = own.batch_decode([row[:end] for row, end in zip(new, ended, strict=True)], skip_special_tokens=True)
        written = [min(end + 1, len(row)) for row, end in zip(new, ended, strict=True)]
        return list(zip(texts, read, written, strict=True))
