"""Captions by vLLM on Ray: `ray.data.llm` asks, and every answer goes into the run's `AnswerStore`.

The flow multiplies nothing and writes no table: it only fills the store, row by row, so a run that is killed goes on
with the images that have no answer yet. Two-step captions are two passes, the second without pictures. vLLM is the
extra ``captions`` and needs a GPU.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from hedwig import storage
from hedwig.captions import KeptCaptioner
from hedwig.captions.result import Answer
from hedwig.captions.vllm import chat_format, condense_request, engine_settings, vllm_request
from hedwig.pipelines.chain import Chain, Step
from hedwig.pipelines.cluster import configure_data
from hedwig.pipelines.run import Run

__all__ = ["fill_by_vllm"]

logger = logging.getLogger(__name__)
TO_ASK = pa.schema([("content_hash", pa.string()), ("frames_flat", pa.binary())])


class Unanswered:
    """Slices panoramas and keeps the frames of those that have no answer yet.

    Args:
        steps: that read and cut.
        kept: arguments of `KeptCaptioner`.
    """

    def __init__(self, steps: list[Step], kept: Mapping[str, Any]) -> None:
        self._chain = Chain([*steps, Step(_Flat)], TO_ASK)
        self._kept = KeptCaptioner(**kept)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Rows (content_hash, frames as bytes) to ask about; an image that occurs twice is asked about once."""
        done = self._chain(table)
        rows = [row for row in done.to_pylist() if row["failure"] is None]
        seen: set[str] = set()
        asked = []
        for row in rows:
            name = row["content_hash"]
            if name not in seen and self._kept.store.get(self._kept.key(name)).answer is None:
                seen.add(name)
                asked.append({"content_hash": name, "frames_flat": row["frames_flat"]})
        return pa.Table.from_pylist(asked, schema=TO_ASK)


class _Flat:
    reads = ("frames",)
    writes = ("frames_flat",)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        flat = np.empty(len(batch["frames"]), dtype=object)
        flat[:] = [frames.tobytes() for frames in batch["frames"]]
        return {**batch, "frames_flat": flat}


def fill_by_vllm(run: Run, steps: list[Step], kept: Mapping[str, Any]) -> None:
    """Ask vLLM about every image without an answer.

    Args:
        run: the run whose panoramas are to be captioned.
        steps: that read and cut an image.
        kept: arguments of the `KeptCaptioner` that will read the answers.

    Raises:
        ImportError: vLLM is not installed.
    """
    try:
        importlib.import_module("vllm")
    except ImportError as error:
        raise ImportError(
            "captions.source=vllm needs vLLM on the GPU nodes: pip install 'hedwig[captions]'. Without a GPU use "
            "captions.source=openai with an endpoint, transformers, or template."
        ) from error
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    section, pool = run.experiment.captions, run.experiment.embed
    model, route = str(section.model), section.route
    num_frames, side = run.experiment.slicing.num_frames, section.frame_px
    chat = chat_format(model) if route == "prompt" else ""
    shape = (num_frames, side, side, 3)
    ask: dict[str, Any] = {"route": route, "prompt": section.prompt, "max_frames": section.max_frames, "frame_px": side}
    chats: dict[str, Any] = {"chat": chat} if chat else {}
    two_step = section.prompt == "two-step"
    settings = engine_settings(
        model, route=route, num_frames=num_frames, max_frames=section.max_frames, frame_px=side,
        revision=section.revision, concurrency=pool.num_actors, accelerator_type=section.accelerator,
    )  # fmt: skip

    def first(row: dict[str, Any]) -> dict[str, Any]:
        frames = np.frombuffer(row["frames_flat"], dtype=np.uint8).reshape(shape)
        return {**vllm_request(frames, **ask, **chats), "content_hash": row["content_hash"]}

    def said(row: dict[str, Any]) -> dict[str, Any]:
        return {"content_hash": row["content_hash"], **_said(row)}

    def second(row: dict[str, Any]) -> dict[str, Any]:
        budget: dict[str, Any] = {"token_budget": section.token_budget, "tokenizer": kept["tokenizer"]}
        request = condense_request(row["text"], route=route, **budget, **chats)
        return {**request, "content_hash": row["content_hash"], "before": row}

    def said_again(row: dict[str, Any]) -> dict[str, Any]:
        return {"content_hash": row["content_hash"], **_joined(row["before"], _said(row))}

    configure_data()
    folder = run.folder("panoramas")
    parts = storage.list_files(folder, suffix=".parquet")
    rows = ray.data.read_parquet(
        [storage.filesystem(f)[1] for f in parts], filesystem=storage.filesystem(folder)[0]
    ).map_batches(
        Unanswered,
        fn_constructor_kwargs={"steps": steps, "kept": dict(kept)},
        batch_format="pyarrow",
        batch_size=pool.batch_size,
        num_cpus=pool.num_cpus,
        compute=ray.data.ActorPoolStrategy(size=pool.num_actors),
    )
    engine = vLLMEngineProcessorConfig(**settings)
    rows = build_processor(engine, preprocess=first, postprocess=said)(rows)
    if two_step:
        rows = build_processor(engine, preprocess=second, postprocess=said_again)(rows)
    captioner, count = KeptCaptioner(**kept), 0
    for row in rows.iter_rows():
        captioner.keep(row["content_hash"], _answer(row))
        count += 1
    logger.info("caption   vLLM was asked about %d images", count)


def _said(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the engine returned, as plain columns."""
    return {
        "text": str(row.get("generated_text") or ""),
        "detail": "",
        "prompt_tokens": int(row.get("num_input_tokens") or 0),
        "completion_tokens": int(row.get("num_generated_tokens") or 0),
        "failure": str(row.get("__inference_error__") or ""),
    }


def _joined(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Both steps' answer: the second's text, the first's as detail, the tokens of both."""
    tokens = {name: before[name] + after[name] for name in ("prompt_tokens", "completion_tokens")}
    failure = before["failure"] or after["failure"]
    return {"text": after["text"], "detail": before["text"], **tokens, "failure": failure}


def _answer(row: Mapping[str, Any]) -> Answer:
    failure = f"the model failed: {row['failure'][:300]}" if row["failure"] else None
    names = ("text", "detail", "prompt_tokens", "completion_tokens")
    return Answer(**{name: row[name] for name in names}, failure=failure)
