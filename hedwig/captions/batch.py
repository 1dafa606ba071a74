"""Captions by OpenAI's Batch API: half the price, an answer within a day, and no connection held open meanwhile.

Source: the API's file and batch resources (``/files``, ``/batches``) as its public client and cookbook use them. Work
goes in rounds: one for the pictures, one for every step that reads the answer of another, and what failed or expired
goes into the next. A round's requests are streamed into shards on local disk, limited by count and by bytes; answers
are joined on ``custom_id``, never on order, and kept in the same `AnswerStore` under the same keys as live answers:
afterwards `OpenAICaptioner` finds them all and asks nothing. Every step is written down before the next one is taken,
so a killed job is started again with the same call. What may happen twice is an upload, which costs nothing: a batch
is looked up by its metadata before it is created again.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from hedwig import storage
from hedwig.answers import AnswerStore
from hedwig.captions.batch_api import BatchApi
from hedwig.captions.dialogue import Dialogue, Pictures, Question, read_completion
from hedwig.captions.openai import MAX_PAID, open_endpoint
from hedwig.captions.prompts import PromptName, TokenizerName
from hedwig.captions.rounds import Round, write_round
from hedwig.captions.spending import spending
from hedwig.web import Politeness

__all__ = ["BatchJob", "custom_id", "run_batch"]

ENDED = frozenset({"failed", "completed", "expired", "cancelled"})
RETRIED = frozenset({408, 409, 425, 429})


def custom_id(pano_id: str, question: Question) -> str:
    """pano_id|step|digest: the same for the same request, and unique in a job; the panorama's own "|" are escaped."""
    return f"{quote(pano_id, safe='')}|{question.step}|{question.digest[:8]}"


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
    token_budget: int = 30,
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
        rows: pano_id, content_hash and frames ((V, S, S, 3) uint8, or V JPEG files), gone through once, as a stream.
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
        max_rounds: after which what is missing is left to the live captioner, or to the next call.
        max_open: most batches under way at a time; a tier's limit of enqueued tokens is waited for besides.
        poll_s: seconds between two looks at the batches.
        wait_s: return after so long, with ``num_open`` batches still under way; None: wait to the end.

    Returns:
        num_rows, num_pending (rows without a caption yet), num_rounds, num_open, and the sums of `spending` over the
        questions of these rows.

    Raises:
        EndpointRefused: wrong key, no credit, or no such model.
        ValueError: one pano_id with two images, a request larger than a shard, or a round of which every batch
            was refused.
    """
    dialogue = Dialogue(
        model=model, revision=revision, prompt=prompt, token_budget=token_budget, tokenizer=tokenizer,
        max_frames=max_frames, images=images, detail=detail, slicing_digest=slicing_digest,
    )  # fmt: skip
    politeness = Politeness(concurrency=4, timeout_s=timeout_s, max_attempts=max_attempts, max_bytes=2_000_000_000)
    job = BatchJob(
        folder, answers=answers, base_url=base_url, api_key_env=api_key_env, model=model, politeness=politeness,
        max_requests=max_requests, max_bytes=max_bytes, max_open=max_open, poll_s=poll_s,
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
            num_open += await job.finish(earlier, deadline)
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
        asked, pending = job.walk(dialogue, content_hash, num_frames)
        keys.update(asked)
        num_pending += pending is not None
    return {
        "num_rows": len(people),
        "num_pending": num_pending,
        "num_rounds": len(job.rounds()),
        "num_open": num_open,
        **spending(job.store.folder, keys),
    }


class BatchJob:
    """The batches of one folder: writes rounds, hands them in, waits, collects.

    Args:
        folder: local folder; see `hedwig.captions.rounds` for what is in it.
        answers: folder of kept answers.
        base_url: of the endpoint, ending in /v1.
        api_key_env: environment variable that holds the key.
        model: for errors.
        politeness: towards the endpoint.
        max_requests: see `run_batch`, as for the others.
        max_bytes: see there.
        max_open: see there.
        poll_s: see there.
    """

    def __init__(
        self,
        folder: str,
        *,
        answers: str,
        base_url: str,
        api_key_env: str,
        model: str,
        politeness: Politeness,
        max_requests: int = 50_000,
        max_bytes: int = 200_000_000,
        max_open: int = 50,
        poll_s: float = 60.0,
    ) -> None:
        if storage.is_remote(folder):
            raise ValueError(f"{folder} is not local; shards are written to a local disk and uploaded from there.")
        if min(max_requests, max_bytes, max_open) < 1:
            raise ValueError("max_requests, max_bytes and max_open must be at least 1.")
        self.folder = Path(storage.resolve(folder))
        self.store = AnswerStore(answers)
        self._base_url, self._api_key_env, self._model, self._politeness = base_url, api_key_env, model, politeness
        self._max_requests, self._max_bytes = max_requests, max_bytes
        self._max_open, self._poll_s = max_open, poll_s
        open_endpoint(base_url, api_key_env, politeness)  # a missing key stops the job before anything is encoded

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the folder; the hold ends with the process.

        Raises:
            RuntimeError: another process works on it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RuntimeError(f"Another process works on the batches in {self.folder}; wait for it.") from None
            yield

    def rounds(self) -> list[Round]:
        """The written ones, in order; half-written ones are removed, for nothing of them was handed in."""
        found = []
        for folder in sorted(self.folder.glob("round-*")):
            if (folder / "written.json").exists():
                found.append(Round(folder))
            else:
                shutil.rmtree(folder)
        return found

    def walk(
        self, dialogue: Dialogue, content_hash: str, num_frames: int, pictures: Callable[[], Pictures] | None = None
    ) -> tuple[list[str], Question | None]:
        """The keys of the questions about a panorama so far, and the first one without an answer."""
        keys: list[str] = []
        talk = dialogue.ask(content_hash, num_frames, pictures or _no_pictures)
        try:
            question = next(talk)
            while True:
                keys.append(question.key)
                kept = self.store.get(question.key)
                if kept.answer is None:
                    return keys, question
                question = talk.send(kept.answer["text"])
        except StopIteration:
            return keys, None

    def first(
        self, dialogue: Dialogue, rows: Iterable[tuple[str, str, Pictures]], people: dict[str, tuple[str, int]]
    ) -> Iterator[tuple[dict[str, Any], bytes]]:
        """Entry and line of each row's next question; `people` is filled with content hashes and frame counts."""
        asked: set[str] = set()  # twins are asked about once
        for pano_id, content_hash, pictures in rows:
            if people.get(pano_id, (content_hash, 0))[0] != content_hash:
                raise ValueError(f"Two images are called {pano_id!r}; custom_ids would be the same. Rename one.")
            people[pano_id] = (content_hash, len(pictures))
            question = self.walk(dialogue, content_hash, len(pictures), partial(_same, pictures))[1]
            if question is not None and question.key not in asked and self._may_pay(question.key):
                asked.add(question.key)
                yield _request(pano_id, content_hash, len(pictures), question)

    def next(self, dialogue: Dialogue, before: Round) -> Iterator[tuple[dict[str, Any], bytes]]:
        """The next question of each row of a collected round: again the same where it has no answer yet."""
        final = before.failures()
        for entry, line in before.lines():
            question = self.walk(dialogue, entry["content_hash"], entry["num_frames"])[1]
            if question is None or not self._may_pay(question.key):
                continue
            if question.key != entry["key"]:
                yield _request(entry["pano_id"], entry["content_hash"], entry["num_frames"], question)
            elif not final.get(entry["custom_id"], {}).get("final"):
                yield entry, line

    def _may_pay(self, key: str) -> bool:
        return len(self.store.get(key).spent) < MAX_PAID

    def write(self, requests: Iterator[tuple[dict[str, Any], bytes]]) -> Round | None:
        """A new round of these requests, None where there are none."""
        folder = self.folder / f"round-{len(self.rounds()):03d}"
        return write_round(folder, requests, max_requests=self._max_requests, max_bytes=self._max_bytes)

    async def finish(self, round_: Round, deadline: float | None = None) -> int:
        """Hand in, wait and collect; returns how many batches are not done, 0 unless the deadline passed.

        Raises:
            EndpointRefused: the endpoint will answer nobody.
            ValueError: it refused every batch.
        """
        unsure = set(round_.shards)  # what an earlier process did: a batch may exist that was not written down
        async with open_endpoint(self._base_url, self._api_key_env, self._politeness) as client:
            api = BatchApi(client, api_key_env=self._api_key_env, model=self._model)
            while True:
                await self._hand_in(api, round_, unsure)
                ended = 0
                for shard in round_.shards:
                    if round_.state(shard).get("batch_id") and not round_.state(shard).get("collected"):
                        ended += await self._look(api, round_, shard)
                left = [shard for shard in round_.shards if not round_.state(shard).get("collected")]
                if not left:
                    break
                if deadline is not None and time.monotonic() + self._poll_s > deadline:
                    return len(left)
                if not ended:
                    await asyncio.sleep(self._poll_s)
        states = [round_.state(shard) for shard in round_.shards]
        if all(state["status"] == "failed" for state in states):
            raise ValueError(f"The endpoint refused every batch of {round_.folder}: {states[0].get('errors')}")
        return 0

    async def _hand_in(self, api: BatchApi, round_: Round, unsure: set[str]) -> None:
        """Create batches until all are, or the endpoint or `max_open` leaves no room."""
        states = [round_.state(shard) for shard in round_.shards]
        room = self._max_open - sum(bool(one.get("batch_id")) and not one.get("collected") for one in states)
        for shard in round_.shards:
            state = round_.state(shard)
            if state.get("batch_id"):
                continue
            if room < 1:
                return
            if "file_id" not in state:
                round_.note(shard, file_id=await api.upload(round_.folder / shard), status="uploaded")
                unsure.discard(shard)
            tag = f"{round_.job}/{round_.folder.name}/{shard}/{state.get('num_refused', 0)}"
            batch = await api.create(round_.state(shard)["file_id"], tag, look_first=shard in unsure)
            if batch is None:
                return
            unsure.discard(shard)
            room -= 1
            round_.note(shard, batch_id=batch["id"], status=batch["status"])

    async def _look(self, api: BatchApi, round_: Round, shard: str) -> bool:
        """Ask for a batch's state; collect it when it has ended, which is what is returned."""
        state = round_.state(shard)
        batch = await api.batch(state["batch_id"])
        status = str(batch["status"])
        if status not in ENDED:
            if status != state.get("status"):
                round_.note(shard, status=status)
            return False
        errors = json.dumps((batch.get("errors") or {}).get("data") or [])[:1000]
        if status == "failed" and "token_limit_exceeded" in errors:
            num_refused = state.get("num_refused", 0) + 1
            round_.note(shard, batch_id=None, num_refused=num_refused, status="waits for room")
            return False
        failures: dict[str, dict[str, Any]] = {}
        entries = {entry["custom_id"]: entry for entry in round_.entries(shard)}
        for name in ("output_file_id", "error_file_id"):
            if batch.get(name):
                failures |= self._keep(await api.content(batch[name]), entries, str(batch["id"]))
        round_.note(shard, status=status, errors=errors, failures=failures, collected=True)
        return True

    def _keep(self, content: bytes, entries: dict[str, dict[str, Any]], batch_id: str) -> dict[str, dict[str, Any]]:
        """Put the answers of a result file into the store; returns the failures by custom_id."""
        failures = {}
        for line in content.splitlines():
            try:
                result = json.loads(line)
                entry = entries.get(result["custom_id"])
            except (ValueError, TypeError, KeyError):
                continue  # its request counts as unanswered
            if entry is None:
                continue
            response = result.get("response") or {}
            status = response.get("status_code")
            try:
                if status != 200:
                    raise ValueError(json.dumps(result.get("error") or response.get("body"))[:300])
                completion = read_completion(response.get("body"))
            except ValueError as error:
                final = isinstance(status, int) and 400 <= status < 500 and status not in RETRIED
                failures[entry["custom_id"]] = {"status": status, "trouble": str(error), "final": final}
                continue
            # The id keeps a result that is collected twice, after a crash, from being counted twice.
            spent = {**completion.spent, "id": batch_id}
            if completion.trouble is None:
                self.store.put(entry["key"], completion.answer, spent)
            else:
                self.store.put_trouble(entry["key"], completion.trouble, {**spent, "num_troubles": 1})
        return failures


def _same(pictures: Pictures) -> Pictures:
    return pictures


def _no_pictures() -> Pictures:
    raise RuntimeError("A question about pictures was asked again without its line; this is a bug, report it.")


def _request(pano_id: str, content_hash: str, num_frames: int, question: Question) -> tuple[dict[str, Any], bytes]:
    name = custom_id(pano_id, question)
    line = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": question.body()}
    entry = {
        "custom_id": name, "key": question.key, "pano_id": pano_id, "content_hash": content_hash,
        "num_frames": num_frames,
    }  # fmt: skip
    return entry, json.dumps(line, separators=(",", ":")).encode() + b"\n"
