"""The caption stage: which captioner, what it is asked, and how what it cost is accounted for.

Template captions and local models answer inside the row flow. Services that are paid, slow or asked in bulk (batch API,
vLLM) first fill the run's `AnswerStore` in a pass of their own; the row flow then finds every answer there and asks
nothing. So all of them share one rule for exactly once, one clean-up and one account, and a run that is killed pays
for nothing twice. Rows without an answer are rejected rows, and each later run gives them another chance.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hedwig import storage
from hedwig.captions import KeptCaptioner, TemplateCaptioner, captioner_options
from hedwig.captions.prompts import TokenizerName, prompt_digest
from hedwig.models.fetched import resolve_weights
from hedwig.panorama import PanoramaSlicer, Slicing
from hedwig.pipelines.chain import Chain, Step
from hedwig.pipelines.cluster import configure_data
from hedwig.pipelines.encode import rows_stage, slicing_of
from hedwig.pipelines.run import Run
from hedwig.schema import captions_schema
from hedwig.sources import ImageReader

__all__ = ["NoCaptions", "captions", "frames_to_show"]

logger = logging.getLogger(__name__)
Manifest = storage.Manifest
ASKING = ("openai", "openai-batch", "vllm", "transformers")
# What may change without making the captions others.
NOT_CONTENT = (
    "answers", "api_key_env", "base_url", "concurrency", "per_second", "timeout_s", "max_attempts", "accelerator",
    "poll_s", "usd_per_million_input", "usd_per_million_output", "device",
)  # fmt: skip


class NoCaptions:
    """Every caption empty: the head is fed the image alone, and the text embedding is zero."""

    reads: tuple[str, ...] = ("pano_id",)
    writes: tuple[str, ...] = ("caption", "caption_num_tokens")

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """(B,) rows with an empty caption."""
        size = len(batch["pano_id"])
        return {**batch, "caption": np.full(size, "", dtype=object), "caption_num_tokens": np.zeros(size, np.int32)}


def captions(run: Run) -> Manifest:
    """One caption per panorama."""
    section = run.experiment.captions
    if section.source == "none":
        config: dict[str, Any] = {"captions": {"source": "none"}}
        return rows_stage(run, "caption", "captions", "panoramas", [Step(NoCaptions)], captions_schema(), config)
    if section.source == "template":
        slicing = asdict(slicing_of(run, run.experiment.encoder))
        steps = [*_cut(run, Slicing(**slicing)), Step(TemplateCaptioner, captioner_options(slicing))]
        config = {"captions": {"source": "template"}, "slicing": slicing}
        return rows_stage(run, "caption", "captions", "panoramas", steps, captions_schema(), config)
    return _asked(run)


def _cut(run: Run, slicing: Slicing) -> list[Step]:
    threads = run.experiment.embed.num_threads
    return [
        Step(ImageReader, {"num_threads": max(4, threads)}),
        Step(PanoramaSlicer, {"slicing": slicing, "num_threads": threads}),
    ]


def frames_to_show(run: Run) -> Slicing:
    """The slicing section with the frame size that captioners are shown."""
    x = run.experiment
    return Slicing(**x.slicing.model_dump(), frame_px=x.captions.frame_px)


def _tokenizer(run: Run) -> TokenizerName:
    return "viclip" if run.experiment.encoder.name.startswith("viclip") else "clip"


def _asked(run: Run) -> Manifest:
    """Captions by a model that is asked."""
    x, section = run.experiment, run.experiment.captions
    slicing, tokenizer = frames_to_show(run), _tokenizer(run)
    cut = hashlib.sha256(json.dumps(asdict(slicing), sort_keys=True).encode()).hexdigest()[:16]
    content = {k: v for k, v in section.model_dump(mode="json").items() if k not in NOT_CONTENT}
    asked = prompt_digest(section.prompt, section.token_budget, tokenizer)
    config = {"captions": content, "slicing": asdict(slicing), "prompt_digest": asked, "tokenizer": tokenizer}
    answers = storage.resolve(section.answers or storage.join(x.output, "answers", "captions"))
    asking = {
        "model": section.model, "revision": section.revision, "prompt": section.prompt,
        "token_budget": section.token_budget, "tokenizer": tokenizer, "max_frames": section.max_frames,
    }  # fmt: skip
    endpoint = {
        **asking, "base_url": section.base_url, "answers": answers, "api_key_env": section.api_key_env,
        "images": section.images, "detail": section.detail, "slicing_digest": cut, "timeout_s": section.timeout_s,
        "max_attempts": section.max_attempts,
    }  # fmt: skip
    if section.source == "transformers":
        from hedwig.captions.local import TransformersCaptioner

        folder = resolve_weights(str(section.model))
        local = {
            **asking, "model": folder, "label": Path(str(section.model)).name, "leaks": section.leaks,
            "frame_px": section.frame_px, "device": section.device, "num_threads": x.embed.num_threads,
        }  # fmt: skip
        step = Step(TransformersCaptioner, local)
    elif section.source == "vllm":
        kept = {"answers": answers, "slicing_digest": cut, "leaks": section.leaks, **asking}
        step = Step(KeptCaptioner, kept)
    else:
        from hedwig.captions.openai import OpenAICaptioner

        live = {"leaks": section.leaks, "concurrency": section.concurrency, "per_second": section.per_second}
        step = Step(OpenAICaptioner, {**endpoint, **live})
    inputs = run.inputs("panoramas")
    before = _with_rejected(run, json.loads(json.dumps(config)), inputs)
    if before is not None or run.finished("caption", "captions", json.loads(json.dumps(config)), inputs) is None:
        if run.before_build is not None:
            run.before_build()
        if section.source == "openai-batch":
            _fill_by_batch(run, slicing, endpoint)
        elif section.source == "vllm":
            from hedwig.pipelines.vllm import fill_by_vllm

            fill_by_vllm(run, _cut(run, slicing), step.arguments)

    def details() -> dict[str, Any]:
        from hedwig.captions.spending import spending

        record = _leaks(run)
        if section.source == "transformers":
            return record
        prices = {k: getattr(section, k) for k in ("usd_per_million_input", "usd_per_million_output")}
        return {**record, "spending": spending(answers, **prices)}

    steps = [*_cut(run, slicing), step]
    manifest = rows_stage(
        run, "caption", "captions", "panoramas", steps, captions_schema(asked=True), config, details=details
    )
    if before is not None and manifest.num_out == before[0].num_out:
        # Nothing new: what was made of these captions stays up to date.
        storage.write_bytes(storage.join(run.folder("caption"), storage.MANIFEST), before[1])
        return before[0]
    return manifest


def _with_rejected(run: Run, config: dict[str, Any], inputs: dict[str, str]) -> tuple[Manifest, bytes] | None:
    """The finished manifest when it has rejected rows, which are to be tried again; it is then taken away."""
    there = run.finished("caption", "captions", config, inputs)
    if there is None or there.num_rejected == 0:
        return None
    logger.info("caption   %d rows failed before and get another chance", there.num_rejected)
    path = storage.join(run.folder("caption"), storage.MANIFEST)
    text = storage.read_bytes(path)
    storage.delete(path)
    return there, text


def _leaks(run: Run) -> dict[str, Any]:
    """How many captions name places, and which names are the commonest."""
    column = storage.read_table(run.folder("caption"), ["caption_leaks"])["caption_leaks"].to_pylist()
    named = [text for text in column if text]
    names = Counter(name for text in named for name in text.split("; "))
    if named:
        logger.warning("caption   %d of %d captions name places: %s", len(named), len(column), names.most_common(3))
    return {"num_captions_with_place_names": len(named), "place_names": dict(names.most_common(20))}


class _Pictures:
    """Slices panoramas and gives their frames as JPEG files, for the batch API's request shards."""

    def __init__(self, steps: list[Step]) -> None:
        schema = pa.schema([("pano_id", pa.string()), ("content_hash", pa.string()), ("jpegs", pa.list_(pa.binary()))])
        self._chain = Chain([*steps, Step(_Jpegs)], schema)

    def __call__(self, table: pa.Table) -> pa.Table:
        done = self._chain(table)
        return done.filter(done["failure"].is_null()).drop_columns(["failure"])


class _Jpegs:
    reads = ("frames",)
    writes = ("jpegs",)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        from PIL import Image

        jpegs = np.empty(len(batch["frames"]), dtype=object)
        for row, frames in enumerate(batch["frames"]):
            files = []
            for frame in frames:
                out = io.BytesIO()
                Image.fromarray(frame).save(out, "JPEG", quality=90)
                files.append(out.getvalue())
            jpegs[row] = files
        return {**batch, "jpegs": jpegs}


def _fill_by_batch(run: Run, slicing: Slicing, endpoint: dict[str, Any]) -> None:
    """Ask for all captions by the Batch API and wait for them."""
    import ray

    from hedwig.captions.batch import run_batch

    pool = run.experiment.embed
    folder = run.folder("panoramas")
    parts = storage.list_files(folder, suffix=".parquet")
    configure_data()
    pictures = ray.data.read_parquet(
        [storage.filesystem(f)[1] for f in parts], filesystem=storage.filesystem(folder)[0]
    ).map_batches(
        _Pictures,
        fn_constructor_kwargs={"steps": _cut(run, slicing)},
        batch_format="pyarrow",
        batch_size=pool.batch_size,
        num_cpus=pool.num_cpus,
        compute=ray.data.ActorPoolStrategy(size=pool.num_actors),
    )

    def rows() -> Iterator[tuple[str, str, list[bytes]]]:
        for batch in pictures.iter_batches(batch_format="pyarrow", batch_size=32):
            yield from zip(
                batch["pano_id"].to_pylist(), batch["content_hash"].to_pylist(), batch["jpegs"].to_pylist(), strict=True
            )

    work = storage.join(storage.resolve(run.experiment.output), ".batch")
    if storage.is_remote(work):
        raise ValueError("captions.source=openai-batch keeps its shards on a local disk; use a local output folder.")
    done = run_batch(rows(), folder=work, poll_s=run.experiment.captions.poll_s, **endpoint)
    logger.info("caption   batch API: %s", {k: done[k] for k in ("num_rows", "num_pending", "num_rounds", "cost_usd")})
