"""The caption stage: which captioner, what it is asked, and how what it cost is accounted for.

Template captions and local models answer inside the row flow. Services that are paid, slow or asked in bulk (batch API,
vLLM) first fill the run's `AnswerStore` in a pass of their own; the row flow then finds every answer there and asks
nothing. So all of them share one rule for exactly once, one clean-up and one account, and a run that is killed pays
for nothing twice. Rows without an answer are rejected rows, and each later run gives them another chance.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hedwig import storage
from hedwig.answers import AnswerStore, Kept
from hedwig.captions import KeptCaptioner, TemplateCaptioner, captioner_options
from hedwig.captions.dialogue import Dialogue, Shown, show, walk
from hedwig.captions.folders import model_folder, weights_digest
from hedwig.captions.openai import OpenAICaptioner
from hedwig.captions.prompts import prompt_digest
from hedwig.captions.spending import spending_of
from hedwig.models.fetched import resolve_weights
from hedwig.panorama import Slicing, content_hash
from hedwig.pipelines.chain import Chain, Step
from hedwig.pipelines.chances import another_chance, put_back_manifest
from hedwig.pipelines.checks import token_budget_of
from hedwig.pipelines.cluster import configure_data
from hedwig.pipelines.encode import cutting_steps, rows_stage, slicing_of
from hedwig.pipelines.rows import RowsTask, map_rows
from hedwig.pipelines.run import Run
from hedwig.schema import captions_schema
from hedwig.sources import read_image

__all__ = ["NoCaptions", "captions", "frames_to_show"]

logger = logging.getLogger(__name__)
Manifest = storage.Manifest
# What may change without making the captions others.
NOT_CONTENT = (
    "answers", "api_key_env", "base_url", "concurrency", "per_second", "timeout_s", "max_attempts", "accelerator",
    "poll_s", "usd_per_million_input", "usd_per_million_output", "device", "batch_requests",
    "batch_megabytes",
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
        slicing = slicing_of(run, run.experiment.encoder)
        cut = asdict(slicing)
        steps = [*cutting_steps(run, slicing), Step(TemplateCaptioner, captioner_options(cut))]
        config = {"captions": {"source": "template"}, "slicing": cut}
        return rows_stage(run, "caption", "captions", "panoramas", steps, captions_schema(), config, incremental=True)
    return _asked(run)


def frames_to_show(run: Run) -> Slicing:
    """The slicing section with the frame size that captioners are shown."""
    x = run.experiment
    return Slicing(**x.slicing.model_dump(), frame_px=x.captions.frame_px)


@dataclass(frozen=True)
class _Plan:
    """How the captions of a run are asked for.

    Attributes:
        content: the settings that make the captions what they are, for the fingerprint.
        inputs: what they depend on, as name -> digest.
        step: the stage that ends the row flow.
        fill: fills the answer store in a pass of its own, before the row flow; None where nothing has to.
        answers_about: gives question key -> what is kept about an image, by its content hash; None where nothing is.
    """

    content: dict[str, Any]
    inputs: dict[str, str]
    step: Step
    fill: Callable[[], None] | None = None
    answers_about: Callable[[str], dict[str, Kept]] | None = None


def _plan(run: Run) -> _Plan:
    x, section = run.experiment, run.experiment.captions
    slicing, (budget, tokenizer) = frames_to_show(run), token_budget_of(x)
    cut = hashlib.sha256(json.dumps(asdict(slicing), sort_keys=True).encode()).hexdigest()[:16]
    content = {k: v for k, v in section.model_dump(mode="json").items() if k not in NOT_CONTENT}
    content["token_budget"] = budget
    config = {
        "captions": content, "slicing": asdict(slicing), "tokenizer": tokenizer,
        "prompt_digest": prompt_digest(section.prompt, budget, tokenizer),
    }  # fmt: skip
    inputs = run.inputs("panoramas")
    answers = storage.resolve(section.answers or storage.join(x.output, "answers", "captions"))
    asking: dict[str, Any] = {
        "model": section.model, "revision": section.revision, "prompt": section.prompt, "token_budget": budget,
        "tokenizer": tokenizer, "max_frames": section.max_frames,
    }  # fmt: skip
    if section.source in ("transformers", "vllm"):
        folder = model_folder(resolve_weights(str(section.model)))
        inputs["model"] = weights_digest(folder)
        asking |= {"model": Path(str(section.model)).name, "revision": section.revision or inputs["model"]}
        if section.source == "vllm":
            kept = {
                **asking, "answers": answers, "slicing_digest": cut, "leaks": section.leaks, "route": section.route
            }  # fmt: skip
            return _by_vllm(run, kept, str(folder), config, inputs)
        from hedwig.captions.local import TransformersCaptioner

        local = {
            **asking, "model": str(folder), "label": asking["model"], "leaks": section.leaks,
            "frame_px": section.frame_px, "device": section.device, "num_threads": x.embed.num_threads,
        }  # fmt: skip
        return _Plan(config, inputs, Step(TransformersCaptioner, local))
    shown = {"max_frames": section.max_frames, "images": section.images}
    dialogue = Dialogue(**asking, images=section.images, detail=section.detail, slicing_digest=cut)
    endpoint = {
        **asking, **shown, "base_url": section.base_url, "answers": answers, "api_key_env": section.api_key_env,
        "detail": section.detail, "slicing_digest": cut, "timeout_s": section.timeout_s,
        "max_attempts": section.max_attempts,
    }  # fmt: skip
    by_batch = section.source == "openai-batch"
    live = {"leaks": section.leaks, "concurrency": section.concurrency, "per_second": section.per_second}
    store = AnswerStore(answers)
    return _Plan(
        config,
        inputs,
        Step(OpenAICaptioner, {**endpoint, **live, "ask": not by_batch}),
        (lambda: _fill_by_batch(run, slicing, endpoint)) if by_batch else None,
        lambda content_hash: walk(dialogue, store, content_hash, slicing.num_frames).kept,
    )


def _by_vllm(run: Run, kept: dict[str, Any], folder: str, config: dict[str, Any], inputs: dict[str, str]) -> _Plan:
    captioner = KeptCaptioner(**kept)

    def fill() -> None:
        from hedwig.pipelines.vllm import fill_by_vllm

        fill_by_vllm(run, cutting_steps(run, frames_to_show(run)), kept, model=folder)

    def answers_about(content_hash: str) -> dict[str, Kept]:
        key = captioner.key(content_hash)
        return {key: captioner.store.get(key)}

    return _Plan(config, inputs, Step(KeptCaptioner, kept), fill, answers_about)


def _asked(run: Run) -> Manifest:
    """Captions by a model that is asked."""
    plan, section = _plan(run), run.experiment.captions
    config = json.loads(json.dumps(plan.content))

    def details() -> dict[str, Any]:
        record = _account(run)
        if plan.answers_about is not None:
            prices = {k: getattr(section, k) for k in ("usd_per_million_input", "usd_per_million_output")}
            record["spending"] = spending_of(_hashes(run), plan.answers_about, **prices)
        return record

    task = RowsTask(
        kind="captions",
        source=run.folder("panoramas"),
        folder=run.folder("caption"),
        steps=[*cutting_steps(run, frames_to_show(run)), plan.step],
        schema=captions_schema(asked=True),
        config=config,
        inputs=plan.inputs,
        pool=run.experiment.embed,
        max_rejected=run.experiment.data.max_rejected,
        details=details,
        skip=("rejected/",),
    )

    def build() -> Manifest:
        if plan.fill is not None:
            plan.fill()
        return map_rows(task, run.rows_progress("caption"))

    put_back_manifest(task.folder)
    there = run.finished("caption", "captions", config, plan.inputs)
    if there is None or there.num_rejected == 0:
        return run.make("caption", "captions", config, plan.inputs, build)
    run.check_writable("caption")
    logger.info("caption   %d rows failed before and get another chance", there.num_rejected)
    if run.before_build is not None:
        run.before_build()
    started = time.monotonic()
    with another_chance(task.folder, there):
        manifest = build()
    if manifest.num_out == there.num_out:
        run.resumed.append("caption")
        return there
    run.made["caption"] = time.monotonic() - started
    return manifest


def _hashes(run: Run) -> list[str]:
    """Content hashes of all rows: of the table, and of the images that were rejected, as far as they can be read."""
    folder = run.folder("caption")
    hashes: list[str] = []
    if any(f.rsplit("/", 1)[-1].startswith("part-") for f in storage.list_files(folder, suffix=".parquet")):
        hashes += storage.read_table(folder, ["content_hash"])["content_hash"].to_pylist()
    rejected = storage.join(folder, "rejected")
    if not storage.list_files(rejected, suffix=".parquet"):
        return hashes
    uris = storage.read_table(rejected, ["pano_id", "image_uri"])["image_uri"].to_pylist()

    def hash_of(uri: str | None) -> str | None:
        try:
            return None if uri is None else content_hash(read_image(uri))
        except (OSError, ValueError):
            return None  # it could not be read when it was to be captioned either, so nobody was asked

    with ThreadPoolExecutor(8) as pool:
        return [*hashes, *(one for one in pool.map(hash_of, uris) if one is not None)]


def _account(run: Run) -> dict[str, Any]:
    """How many captions were trimmed, how many name places, and which names are the commonest."""
    if not storage.list_files(run.folder("caption"), suffix=".parquet"):
        return {"num_captions_trimmed": 0, "num_captions_with_place_names": 0, "place_names": {}}
    table = storage.read_table(run.folder("caption"), ["caption_leaks", "caption_trimmed"])
    named = [text for text in table["caption_leaks"].to_pylist() if text]
    names = Counter(name for text in named for name in text.split("; "))
    if named:
        logger.warning("caption   %d of %d captions name places: %s", len(named), len(table), names.most_common(3))
    num_trimmed = int(pc.sum(table["caption_trimmed"]).as_py() or 0)
    if num_trimmed:
        logger.info("caption   %d of %d captions were cut to captions.token_budget", num_trimmed, len(table))
    return {
        "num_captions_trimmed": num_trimmed,
        "num_captions_with_place_names": len(named),
        "place_names": dict(names.most_common(20)),
    }


class _Pictures:
    """Slices panoramas and gives their frames as JPEG files, for the batch API's request shards."""

    def __init__(self, steps: list[Step], max_frames: int, images: Literal["frames", "sheet"]) -> None:
        schema = pa.schema([("pano_id", pa.string()), ("content_hash", pa.string()), ("jpegs", pa.list_(pa.binary()))])
        shown = Step(_Jpegs, {"max_frames": max_frames, "images": images})
        self._chain = Chain([*steps, shown], schema)

    def __call__(self, table: pa.Table) -> pa.Table:
        done = self._chain(table)
        return done.filter(done["failure"].is_null()).drop_columns(["failure"])


class _Jpegs:
    """The files that a model is shown, as `show` makes them: of the chosen frames alone, or one sheet."""

    reads = ("frames",)
    writes = ("jpegs",)

    def __init__(self, *, max_frames: int, images: Literal["frames", "sheet"]) -> None:
        self._max_frames, self._images = max_frames, images

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        jpegs = np.empty(len(batch["frames"]), dtype=object)
        for row, frames in enumerate(batch["frames"]):
            jpegs[row] = list(show(frames, self._max_frames, self._images).files)
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
        fn_constructor_kwargs={
            "steps": cutting_steps(run, slicing),
            "max_frames": endpoint["max_frames"],
            "images": endpoint["images"],
        },
        batch_format="pyarrow",
        batch_size=pool.batch_size,
        num_cpus=pool.num_cpus,
        compute=ray.data.ActorPoolStrategy(size=pool.num_actors),
    )

    def rows() -> Iterator[tuple[str, str, Shown]]:
        for batch in pictures.iter_batches(batch_format="pyarrow", batch_size=32):
            for row in batch.to_pylist():
                yield row["pano_id"], row["content_hash"], Shown(slicing.num_frames, row["jpegs"])

    section, work = run.experiment.captions, storage.join(storage.resolve(run.experiment.output), ".batch")
    done = run_batch(
        rows(), folder=work, poll_s=section.poll_s, max_requests=section.batch_requests,
        max_bytes=section.batch_megabytes * 1_000_000, **endpoint,
    )  # fmt: skip
    logger.info("caption   batch API: %s", {k: done[k] for k in ("num_rows", "num_pending", "num_rounds", "cost_usd")})
