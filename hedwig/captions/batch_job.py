"""The batches of one local folder: rounds are written, handed in, waited for and collected, one batch after the other.

See `hedwig.captions.batch` for the whole and `hedwig.captions.rounds` for the files. Every state is on disk before the
next step, so that any process may go on where another was killed; what is waited for is said in the log.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hedwig import storage
from hedwig.answers import AnswerStore
from hedwig.captions.batch_api import BatchApi, NoRoom
from hedwig.captions.dialogue import Dialogue, Pictures, Question, read_completion, walk
from hedwig.captions.openai import MAX_PAID, open_endpoint
from hedwig.captions.rounds import Round, write_round
from hedwig.web import Politeness

__all__ = ["BatchJob", "custom_id"]

logger = logging.getLogger(__name__)
ENDED = frozenset({"failed", "completed", "expired", "cancelled"})
RETRIED = frozenset({408, 409, 425, 429})
NO_ROOM = "refused for want of room"


def custom_id(pano_id: str, question: Question) -> str:
    """pano_id|step|digest: the same for the same request, and unique in a job; the panorama's own "|" are escaped."""
    return f"{quote(pano_id, safe='')}|{question.step}|{question.digest[:8]}"


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
        digest: of what the dialogue asks, written into its rounds.
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
        digest: str = "",
    ) -> None:
        if storage.is_remote(folder):
            raise ValueError(f"{folder} is not local; shards are written to a local disk and uploaded from there.")
        if min(max_requests, max_bytes, max_open) < 1:
            raise ValueError("max_requests, max_bytes and max_open must be at least 1.")
        self.folder = Path(storage.resolve(folder))
        self.store = AnswerStore(answers)
        self.base_url, self._digest = base_url, digest
        self._api_key_env, self._model, self._politeness = api_key_env, model, politeness
        self._max_requests, self._max_bytes = max_requests, max_bytes
        self._max_open, self._poll_s = max_open, poll_s
        open_endpoint(base_url, api_key_env, politeness)  # a missing key stops the job before anything is encoded
        self.store.check()

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

    def first(
        self, dialogue: Dialogue, rows: Iterable[tuple[str, str, Pictures]], people: dict[str, tuple[str, int]]
    ) -> Iterator[tuple[dict[str, Any], bytes]]:
        """Entry and line of each row's next question; `people` is filled with content hashes and frame counts."""
        asked: set[str] = set()  # twins are asked about once
        for pano_id, content_hash, pictures in rows:
            if people.get(pano_id, (content_hash, 0))[0] != content_hash:
                raise ValueError(f"Two images are called {pano_id!r}; custom_ids would be the same. Rename one.")
            people[pano_id] = (content_hash, len(pictures))
            question = walk(dialogue, self.store, content_hash, len(pictures), partial(_same, pictures)).question
            if question is not None and question.key not in asked and self._may_pay(question.key):
                asked.add(question.key)
                yield _request(pano_id, content_hash, len(pictures), question)

    def next(self, dialogue: Dialogue, before: Round) -> Iterator[tuple[dict[str, Any], bytes]]:
        """The next question of each row of a collected round: again the same where it has no answer yet."""
        final = before.failures()
        for entry, line in before.lines():
            question = walk(dialogue, self.store, entry["content_hash"], entry["num_frames"]).question
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
        return write_round(
            folder, requests, max_requests=self._max_requests, max_bytes=self._max_bytes, digest=self._digest,
            endpoint=self.base_url,
        )  # fmt: skip

    async def finish(self, round_: Round, deadline: float | None = None) -> int:
        """Hand in, wait and collect; returns how many batches are not done, 0 unless the deadline passed.

        Raises:
            EndpointRefused: the endpoint will answer nobody.
            ValueError: it refused every batch, or has no room for one though no other is open.
        """
        unsure = set(round_.shards)  # what an earlier process did: a batch may exist that was not written down
        async with open_endpoint(self.base_url, self._api_key_env, self._politeness) as client:
            api = BatchApi(client, api_key_env=self._api_key_env, model=self._model)
            while True:
                await self._hand_in(api, round_, unsure)
                ended = await self._look_at_all(api, round_)
                left = [shard for shard in round_.shards if not round_.state(shard).get("collected")]
                if not left:
                    break
                refused = [shard for shard in left if round_.state(shard).get("status") == NO_ROOM]
                if refused and len(refused) == len(left) and not await api.any_open():
                    self._give_up(round_, refused)
                if deadline is not None and time.monotonic() + self._poll_s > deadline:
                    return len(left)
                if not ended:
                    self._tell(round_, left)
                    await asyncio.sleep(self._poll_s)
        states = [round_.state(shard) for shard in round_.shards]
        if all(state["status"] == "failed" for state in states):
            raise ValueError(f"The endpoint refused every batch of {round_.folder}: {states[0].get('errors')}")
        return 0

    async def leave(self, round_: Round) -> None:
        """Collect what has ended of a round that asks something else by now, and hand nothing of it in."""
        async with open_endpoint(self.base_url, self._api_key_env, self._politeness) as client:
            api = BatchApi(client, api_key_env=self._api_key_env, model=self._model)
            num_left = 0
            for shard in round_.shards:
                state = round_.state(shard)
                if state.get("batch_id") or state.get("collected"):
                    continue
                found = await api.find(state["file_id"], _tag(round_, shard)) if "file_id" in state else None
                if found is not None:
                    round_.note(shard, batch_id=found["id"], status=found["status"])
                else:
                    round_.note(shard, status="not handed in", collected=True)
                    num_left += 1
            await self._look_at_all(api, round_)
        num_open = sum(not round_.state(shard).get("collected") for shard in round_.shards)
        logger.warning(
            "captions  %s asks with another prompt or model than now: %d of its %d batches were not handed in, %d are "
            "still under way and paid for; their answers are collected by a later call",
            round_.folder, num_left, len(round_.shards), num_open,
        )  # fmt: skip

    def _tell(self, round_: Round, left: list[str]) -> None:
        kinds = Counter(str(round_.state(shard).get("status", "not handed in")) for shard in left)
        logger.info(
            "captions  batches of %s: %d of %d are done, %s; next look in %g s", round_.folder.name,
            len(round_.shards) - len(left), len(round_.shards),
            ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()), self._poll_s,
        )  # fmt: skip

    def _give_up(self, round_: Round, shards: list[str]) -> None:
        """The endpoint will never have room for these: they are written anew, in smaller ones, by the next call."""
        sizes = [(round_.num_requests(shard), (round_.folder / shard).stat().st_size) for shard in shards]
        for shard in shards:
            round_.note(shard, status="too large", collected=True)
        num, size = max(sizes)
        raise ValueError(
            f"The endpoint has no room for a batch of {num} requests ({size / 1e6:.1f} MB), though no other is open: "
            "it holds more tokens than this account may have enqueued. Set captions.batch_requests below "
            f"{num} or captions.batch_megabytes below {max(1, round(size / 1e6))}, and run the same command again; "
            "nothing was paid for these requests."
        )

    async def _look_at_all(self, api: BatchApi, round_: Round) -> int:
        """Look at every batch that is under way; returns how many have ended."""
        ended = 0
        for shard in round_.shards:
            if round_.state(shard).get("batch_id") and not round_.state(shard).get("collected"):
                ended += await self._look(api, round_, shard)
        return ended

    async def _hand_in(self, api: BatchApi, round_: Round, unsure: set[str]) -> None:
        """Create batches until all are, or the endpoint or `max_open` leaves no room."""
        states = [round_.state(shard) for shard in round_.shards]
        room = self._max_open - sum(bool(one.get("batch_id")) and not one.get("collected") for one in states)
        for shard in round_.shards:
            state = round_.state(shard)
            if state.get("batch_id") or state.get("collected"):
                continue
            if room < 1:
                return
            if "file_id" not in state:
                round_.note(shard, file_id=await api.upload(round_.folder / shard), status="uploaded")
                unsure.discard(shard)
            try:
                batch = await api.create(
                    round_.state(shard)["file_id"], _tag(round_, shard), look_first=shard in unsure
                )
            except NoRoom:
                round_.note(shard, status=NO_ROOM)
                return
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
            round_.note(shard, batch_id=None, num_refused=num_refused, status=NO_ROOM)
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


def _tag(round_: Round, shard: str) -> str:
    """Under which a batch's metadata name it; another one after each refusal."""
    return f"{round_.job}/{round_.folder.name}/{shard}/{round_.state(shard).get('num_refused', 0)}"


def _same(pictures: Pictures) -> Pictures:
    return pictures


def _request(pano_id: str, content_hash: str, num_frames: int, question: Question) -> tuple[dict[str, Any], bytes]:
    name = custom_id(pano_id, question)
    line = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": question.body()}
    entry = {
        "custom_id": name, "key": question.key, "pano_id": pano_id, "content_hash": content_hash,
        "num_frames": num_frames,
    }  # fmt: skip
    return entry, json.dumps(line, separators=(",", ":")).encode() + b"\n"
