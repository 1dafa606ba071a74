"""Captions by vLLM on Ray: `ray.data.llm` asks, and every answer goes into the run's `AnswerStore`.

The flow multiplies nothing and writes no table: it only fills the store, row by row, so a run that is killed goes on
with the images that have no answer yet. Two-step captions are two passes, the second without pictures. vLLM is the
extra ``captions`` and needs a GPU.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from hedwig import storage
from hedwig.captions import KeptCaptioner
from hedwig.captions.prompts import PromptName, TokenizerName
from hedwig.captions.vllm import (
    Route,
    answer_of,
    chat_format,
    condense_request,
    engine_settings,
    joined,
    said,
    vllm_request,
)
from hedwig.pipelines.chain import Chain, Step
from hedwig.pipelines.checks import NO_VLLM
from hedwig.pipelines.cluster import configure_data
from hedwig.pipelines.run import Run

__all__ = ["Talk", "Unanswered", "fill_by_vllm"]

logger = logging.getLogger(__name__)
RowFunction = Callable[[dict[str, Any]], dict[str, Any]]
Processor = Callable[[dict[str, Any], RowFunction, RowFunction], Any]
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
        """Rows (content_hash, frames as bytes) to ask about; twins in a batch are asked about once."""
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


@dataclass(frozen=True)
class Talk:
    """What is asked about one row, and what is kept of the engine's row: plain functions for Ray's processor.

    Attributes:
        route: as in `hedwig.captions.vllm`.
        prompt: what is asked.
        max_frames: most frames shown.
        shape: (V, S, S, 3) of the frames.
        token_budget: of the second step.
        tokenizer: whose tokens.
        chat: on the route "prompt" the model's chat format.
    """

    route: Route
    prompt: PromptName
    max_frames: int
    shape: tuple[int, int, int, int]
    token_budget: int | None
    tokenizer: TokenizerName
    chat: str | None = None

    def first(self, row: dict[str, Any]) -> dict[str, Any]:
        """The request about the frames."""
        frames = np.frombuffer(row["frames_flat"], dtype=np.uint8).reshape(self.shape)
        asked: dict[str, Any] = {"prompt": self.prompt, "max_frames": self.max_frames, "frame_px": self.shape[1]}
        return {
            **vllm_request(frames, route=self.route, **asked, **self._chat()),
            "content_hash": row["content_hash"],
            "frames_flat": b"",  # the pictures are in the request by now
        }

    def said(self, row: dict[str, Any]) -> dict[str, Any]:
        """What the engine answered."""
        return {"content_hash": row["content_hash"], **said(row)}

    def second(self, row: dict[str, Any]) -> dict[str, Any]:
        """The request that condenses the first answer.

        What is needed of the row is copied: Ray puts what is returned into the very row, and a row that held itself
        would have no end. Rows that failed come by here too, without an answer, and are not asked about.
        """
        how: dict[str, Any] = {"route": self.route, "token_budget": self.token_budget, "tokenizer": self.tokenizer}
        before = {"text": row.get("text") or ""}
        before |= {name: int(row.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")}
        return {
            **condense_request(before["text"], **how, **self._chat()),
            "content_hash": row["content_hash"],
            "before": before,
        }

    def said_again(self, row: dict[str, Any]) -> dict[str, Any]:
        """What the engine answered to both."""
        return {"content_hash": row["content_hash"], **joined(row["before"], said(row))}

    def _chat(self) -> dict[str, Any]:
        return {} if self.chat is None else {"chat": self.chat}


def fill_by_vllm(
    run: Run, steps: list[Step], kept: Mapping[str, Any], *, model: str, processor: Processor | None = None
) -> None:
    """Ask vLLM about every image without an answer.

    An image that occurs in two batches of the flow is asked about twice, as nobody looks at all rows before.

    Args:
        run: the run whose panoramas are to be captioned.
        steps: that read and cut an image.
        kept: arguments of the `KeptCaptioner` that will read the answers.
        model: folder of the model, on every GPU node.
        processor: makes a step of the flow from engine settings, preprocess and postprocess; default: Ray's for vLLM.

    Raises:
        ImportError: vLLM is not installed.
        AnswersRefused: an answer could not be kept.
    """
    processor = processor or _vllm_processor()
    import ray

    section, pool, side = run.experiment.captions, run.experiment.embed, run.experiment.captions.frame_px
    num_frames, route = run.experiment.slicing.num_frames, section.route
    talk = Talk(
        route=route, prompt=section.prompt, max_frames=section.max_frames, shape=(num_frames, side, side, 3),
        token_budget=kept["token_budget"], tokenizer=kept["tokenizer"],
        chat=chat_format(model) if route == "prompt" else None,
    )  # fmt: skip
    settings = engine_settings(
        model, route=route, prompt=section.prompt, num_frames=num_frames, max_frames=section.max_frames, frame_px=side,
        concurrency=pool.num_actors, accelerator_type=section.accelerator,
    )  # fmt: skip
    captioner = KeptCaptioner(**kept)
    captioner.store.check()
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
    rows = processor(settings, talk.first, talk.said)(rows)
    if section.prompt == "two-step":
        rows = processor(settings, talk.second, talk.said_again)(rows)
    num_asked = num_failed = 0
    for row in rows.iter_rows():
        answer = answer_of(row)
        captioner.keep(row["content_hash"], answer)
        num_asked, num_failed = num_asked + 1, num_failed + (answer.failure is not None)
    logger.info("caption   vLLM was asked about %d images and failed on %d", num_asked, num_failed)


def _vllm_processor() -> Processor:
    try:
        importlib.import_module("vllm")
    except ImportError as error:
        raise ImportError(NO_VLLM) from error
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    def processor(settings: dict[str, Any], preprocess: RowFunction, postprocess: RowFunction) -> Any:
        return build_processor(vLLMEngineProcessorConfig(**settings), preprocess=preprocess, postprocess=postprocess)

    return processor
