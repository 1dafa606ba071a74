"""Captions by OpenAI's Batch API: half the price, an answer within a day, and no connection held open meanwhile.

Source: the API's file and batch resources (``/files``, ``/batches``) as its public client and cookbook use them. Work
goes in rounds: one for the pictures, one for every step that reads the answer of another, and what failed or expired
goes into the next. A round's requests are streamed into shards on local disk, limited by count and by bytes; answers
are joined on ``custom_id``, never on order, and kept in the same `AnswerStore` under the same keys as live answers:
afterwards `OpenAICaptioner` finds them all and asks nothing. Every step is written down before the next one is taken,
so a killed job is started again with the same call. What may happen twice is an upload, which costs nothing: a batch
is looked up by its metadata before it is created again. Work left behind for another prompt or model is not handed in:
what was created of it is paid for, and is collected when it is there.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from typing import Any, Literal

from hedwig.captions.batch_job import BatchJob
from hedwig.captions.dialogue import Dialogue, Pictures, walk
from hedwig.captions.prompts import PromptName, TokenizerName
from hedwig.captions.spending import spending
from hedwig.web import Politeness

__all__ = ["run_batch"]

logger = logging.getLogger(__name__)


def run_batch(
    rows: Iterable[tuple[str, str, Pictures]],
    *,
    folder: str,
    answers: str,
    model: str,
    base_url: str,
    revision: str | None = None,
    api_key_env: str = "OPENAI_API_KEY",
    prompt: PromptName = "basic",
    token_budget: int | None = 30,
    tokenizer: TokenizerName = "viclip",
    max_frames: int = 8,
    images: Literal["frames", "sheet"] = "frames",
    detail: Literal["low", "high", "auto"] = "low",
    slicing_digest: str = "",
    timeout_s: float = 60.0,
    max_attempts: int = 6,
    max_requests: int = 50_000,
    max_bytes: int = 200_000_000,
    max_rounds: int = 8,
    max_open: int = 50,
    poll_s: float = 60.0,
    wait_s: float | None = None,
) -> dict[str, Any]:
    """Ask for all captions by batches, wait, and keep the answers; call it again to go on after a crash.

    Args:
        rows: pano_id, content_hash and frames ((V, S, S, 3) uint8, or `Shown` files), gone through once, as a stream.
        folder: local folder of the job's shards and of what is known about its batches.
        answers: folder of kept answers, as for `OpenAICaptioner`.
        model: see there, as for all up to `max_attempts`.
        base_url: see there.
        revision: see there.
        api_key_env: see there.
        prompt: see there.
        token_budget: see there.
        tokenizer: see there.
        max_frames: see there.
        images: see there.
        detail: see there.
        slicing_digest: see there.
        timeout_s: see there.
        max_attempts: see there.
        max_requests: most requests in one shard; the API takes 50,000.
        max_bytes: most bytes in one shard; the API takes 200 MB.
        max_rounds: after which what is missing is left to the next call.
        max_open: most batches under way at a time; a tier's limit of enqueued tokens is waited for besides.
        poll_s: seconds between two looks at the batches.
        wait_s: return after so long, with ``num_open`` batches still under way; None: wait to the end.

    Returns:
        num_rows, num_pending (rows without a caption yet), num_rounds, num_open (of this prompt and model; what was
        asked before with others may be under way besides), and the sums of `spending` over the
        questions of these rows.

    Raises:
        EndpointRefused: wrong key, no credit, or no such model.
        AnswersRefused: a paid answer could not be kept.
        ValueError: one pano_id with two images, a request larger than a shard, a batch larger than the endpoint
            takes at a time, or a round of which every batch was refused.
    """
    dialogue = Dialogue(
        model=model, revision=revision, prompt=prompt, token_budget=token_budget, tokenizer=tokenizer,
        max_frames=max_frames, images=images, detail=detail, slicing_digest=slicing_digest,
    )  # fmt: skip
    politeness = Politeness(concurrency=4, timeout_s=timeout_s, max_attempts=max_attempts, max_bytes=2_000_000_000)
    job = BatchJob(
        folder, answers=answers, base_url=base_url, api_key_env=api_key_env, model=model, politeness=politeness,
        max_requests=max_requests, max_bytes=max_bytes, max_open=max_open, poll_s=poll_s, digest=dialogue.digest,
    )  # fmt: skip
    with job.alone():
        return asyncio.run(_run(job, dialogue, rows, max_rounds, wait_s))


async def _run(
    job: BatchJob,
    dialogue: Dialogue,
    rows: Iterable[tuple[str, str, Pictures]],
    max_rounds: int,
    wait_s: float | None,
) -> dict[str, Any]:
    deadline = None if wait_s is None else time.monotonic() + wait_s
    people: dict[str, tuple[str, int]] = {}
    num_open = 0
    for earlier in job.rounds():
        if not earlier.is_collected:
            if earlier.endpoint not in (None, job.base_url):
                logger.warning("%s was handed in at %s and is left alone", earlier.folder, earlier.endpoint)
                continue
            if earlier.digest in (None, dialogue.digest):
                num_open += await job.finish(earlier, deadline)
            else:
                await job.leave(earlier)
        if earlier.is_collected:
            earlier.drop_requests()  # what is still missing is written anew from the rows
    done = 0
    if num_open == 0:
        round_ = job.write(job.first(dialogue, rows, people))
        while round_ is not None:
            num_open = await job.finish(round_, deadline)
            done += 1
            if num_open or done == max_rounds:
                break
            following = job.write(job.next(dialogue, round_))
            round_.drop_requests()
            round_ = following
        if round_ is not None and not num_open:
            round_.drop_requests()
    else:
        people.update((pano_id, (content_hash, len(pictures))) for pano_id, content_hash, pictures in rows)
    keys: set[str] = set()
    num_pending = 0
    for content_hash, num_frames in people.values():
        walked = walk(dialogue, job.store, content_hash, num_frames)
        keys.update(walked.kept)
        num_pending += walked.question is not None
    return {
        "num_rows": len(people),
        "num_pending": num_pending,
        "num_rounds": len(job.rounds()),
        "num_open": num_open,
        **spending(job.store.folder, keys),
    }
