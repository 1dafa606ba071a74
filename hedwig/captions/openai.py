"""Captions from an OpenAI-compatible endpoint: hosted, or a server of one's own such as vLLM or `transformers serve`.

Rows of a batch are asked about at the same time, each row's steps one after the other. Every answer is kept the moment
it arrives, useful or not, so that a killed or failed run pays for nothing again; what happens to be asked twice at
once carries the same ``Idempotency-Key``. A row that got no answer says why and is tried by the next run; an endpoint
that will answer nobody (wrong key, no credit, no such model) stops the job, and so does a folder that keeps nothing.
After a batch job nobody is asked: a live answer costs twice a batch's. The official client is not used: its
retries and pools cannot promise a rate.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
from collections import defaultdict
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from hedwig.answers import AnswersRefused, AnswerStore, Kept
from hedwig.captions.dialogue import Dialogue, Pictures, Question, Shown, read_completion, walk
from hedwig.captions.leaks import LeakFilter, LeakMode
from hedwig.captions.prompts import PromptName, TokenizerName
from hedwig.captions.result import CAPTION_COLUMNS, Answer, caption_columns
from hedwig.web import Politeness, Refused, WebClient

__all__ = ["MAX_PAID", "EndpointRefused", "OpenAICaptioner", "open_endpoint", "refusal"]

MAX_PAID = 3  # answers of no use that are paid for one question, all runs together
FINAL = ("insufficient_quota", "billing_hard_limit_reached")


class EndpointRefused(PermissionError):
    """The endpoint will answer none of our requests: wrong key, no credit, unknown model or address."""


class _Unanswered(Exception):
    """One question got no usable answer; the text is the row's failure."""


class OpenAICaptioner:
    """Stage: captions of `frames` by chat completions with images.

    Args:
        model: name at the endpoint.
        base_url: of the endpoint, ending in /v1.
        answers: folder in which answers are kept, shared by all workers and runs.
        revision: of the model; part of the key under which answers are kept.
        api_key_env: environment variable that holds the key, read here and kept nowhere else; it may be absent where
            the endpoint is this machine.
        prompt: "basic", "verbose" or "two-step" (detailed, then condensed without images).
        token_budget: longest caption in tokens of `tokenizer`. A longer answer is condensed once, then cut; None does
            neither.
        tokenizer: "viclip" or "clip".
        max_frames: frames shown, chosen evenly.
        images: one image per frame, or one contact sheet.
        detail: OpenAI's resolution of an image.
        leaks: what happens to place names in captions.
        concurrency: rows, and so requests, under way.
        per_second: most requests a second.
        timeout_s: longest silence of the endpoint.
        max_attempts: how often one request is made when the endpoint is busy or fails.
        slicing_digest: of the settings that cut the frames.
        ask: False takes kept answers only; a row without one fails.

    Raises:
        PermissionError: there is no key in the environment, or answers cannot be kept.
        ValueError: an argument is out of its range.
    """

    reads = ("frames", "content_hash")
    writes = CAPTION_COLUMNS

    def __init__(
        self,
        *,
        model: str,
        base_url: str,
        answers: str,
        revision: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        prompt: PromptName = "basic",
        token_budget: int | None = 30,
        tokenizer: TokenizerName = "viclip",
        max_frames: int = 8,
        images: Literal["frames", "sheet"] = "frames",
        detail: Literal["low", "high", "auto"] = "low",
        leaks: LeakMode = "report",
        concurrency: int = 16,
        per_second: float | None = None,
        timeout_s: float = 60.0,
        max_attempts: int = 6,
        slicing_digest: str = "",
        ask: bool = True,
    ) -> None:
        self.dialogue = Dialogue(
            model=model, revision=revision, prompt=prompt, token_budget=token_budget, tokenizer=tokenizer,
            max_frames=max_frames, images=images, detail=detail, slicing_digest=slicing_digest,
        )  # fmt: skip
        self.caption_model = f"openai:{model}@{revision or '-'}"
        self.store = AnswerStore(answers)
        self._leaks = LeakFilter(leaks)
        self._politeness = Politeness(
            per_second=per_second, concurrency=concurrency, timeout_s=timeout_s, max_attempts=max_attempts
        )
        self._base_url, self._api_key_env, self._ask = base_url, api_key_env, ask
        if ask:  # what would make answers impossible or lose them stops the job here
            open_endpoint(base_url, api_key_env, self._politeness)
            self.store.check()
        self._stopped: PermissionError | None = None

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Add the columns `CAPTION_COLUMNS` and `failure`, (B,) each.

        Raises:
            EndpointRefused: the endpoint will answer nobody; what was answered before is kept.
            AnswersRefused: a paid answer could not be kept, and no other is asked for.
            ValueError: `frames` is not (B, V, S, S, 3) uint8 with at least one frame.
        """
        frames = np.asarray(batch["frames"])
        if frames.ndim != 5 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape[1:]:
            raise ValueError(f"frames are {frames.shape} {frames.dtype}; expected (B, V, S, S, 3) uint8.")
        hashes = [str(one) for one in batch["content_hash"]]
        if self._ask:
            answers = asyncio.run(self._all(hashes, frames))
        else:
            answers = [self._known(one, frames.shape[1]) for one in hashes]
        columns = caption_columns(
            answers,
            model=self.caption_model,
            token_budget=self.dialogue.token_budget,
            tokenizer=self.dialogue.tokenizer,
            leaks=self._leaks,
        )
        return {**batch, **columns}

    def _known(self, content_hash: str, num_frames: int) -> Answer:
        """What the kept answers say."""
        try:
            walked = walk(self.dialogue, self.store, content_hash, num_frames, lambda: Shown(num_frames, ()))
        except ValueError as error:
            return Answer(failure=str(error))
        spent = [attempt for kept in walked.kept.values() for attempt in kept.spent]
        tokens = {name: sum(one.get(name, 0) for one in spent) for name in ("prompt_tokens", "completion_tokens")}
        if walked.said is not None:
            return Answer(walked.said.text, walked.said.detail, **tokens)
        step, last = (walked.question.step if walked.question else ""), list(walked.kept.values())[-1]
        why = f" ({last.trouble})" if last.trouble else ""
        return Answer(
            **tokens,
            failure=f"{step}: there is no kept answer{why}; the next run hands it in again, and captions.source=openai "
            "asks for it live",
        )

    async def _all(self, hashes: list[str], frames: NDArray[np.uint8]) -> list[Answer]:
        rows = asyncio.Semaphore(self._politeness.concurrency)  # no more pictures are encoded than requests are made
        locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)  # twins in a batch are asked about once
        async with open_endpoint(self._base_url, self._api_key_env, self._politeness) as client:

            async def one(content_hash: str, pictures: NDArray[np.uint8]) -> Answer:
                async with rows:
                    return await self._row(client, locks, content_hash, pictures)

            # None is cancelled when another one stops the job: its answer may be paid for already.
            done = await asyncio.gather(*map(one, hashes, frames), return_exceptions=True)
        for result in done:
            if isinstance(result, BaseException):
                raise result
        return [result for result in done if isinstance(result, Answer)]

    async def _row(
        self, client: WebClient, locks: dict[str, asyncio.Lock], content_hash: str, pictures: Pictures
    ) -> Answer:
        spent = {"prompt_tokens": 0, "completion_tokens": 0}
        said, failure = None, None
        dialogue = self.dialogue.ask(content_hash, len(pictures), lambda: pictures)
        try:
            question = next(dialogue)
            while True:
                async with locks[question.key]:
                    kept, failure = await self._answered(client, question)
                for name in spent:
                    spent[name] += sum(attempt.get(name, 0) for attempt in kept.spent)
                if failure is not None:
                    break
                question = dialogue.send(kept.answer["text"])
        except StopIteration as end:
            said = end.value
        return Answer(said.text if said else "", said.detail if said else "", **spent, failure=failure)

    async def _answered(self, client: WebClient, question: Question) -> tuple[Kept, str | None]:
        """What is kept about a question after asking where nothing was, and why there is no answer, else None."""
        try:
            kept = await asyncio.to_thread(self.store.get, question.key)
            while kept.answer is None:
                if len(kept.spent) >= MAX_PAID:
                    return kept, (
                        f"{question.step}: {len(kept.spent)} paid answers were of no use, the last: {kept.trouble}; "
                        f"delete {self.store.path(question.key)} to ask again"
                    )
                await self._pay(client, question, len(kept.spent))
                kept = await asyncio.to_thread(self.store.get, question.key)
        except (_Unanswered, ValueError) as error:
            return Kept(), f"{question.step}: {error}"
        return kept, None

    async def _pay(self, client: WebClient, question: Question, num_paid: int) -> None:
        """Ask once; the answer goes into the store before anything else can happen."""
        body = await asyncio.to_thread(question.body)
        if self._stopped is not None:
            raise type(self._stopped)(*self._stopped.args)
        # A paid answer of no use would be repeated for the same idempotency key.
        headers = {"Idempotency-Key": question.key if num_paid == 0 else f"{question.key}-{num_paid}"}
        try:
            reply = await client.request(
                "POST", "chat/completions", json=body, headers=headers, final=FINAL, check=read_completion
            )
        except Refused as error:
            final = refusal(error, self._api_key_env, self.dialogue.model)
            if final is not None:
                self._stopped = final
                raise final from None
            again = "run the same command again; kept answers are not paid again"
            if error.status in (400, 413, 415, 422):
                again = "the endpoint does not take this request; look at captions.images, detail and model"
            raise _Unanswered(f"{error}; {again}") from None
        completion = read_completion(reply.body)
        try:
            if completion.trouble is None:
                self.store.put(question.key, completion.answer, completion.spent)
            else:
                self.store.put_trouble(question.key, completion.trouble, {**completion.spent, "num_troubles": 1})
        except AnswersRefused as error:
            self._stopped = error
            raise

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("OpenAICaptioner is built in the worker from its arguments and is not pickled.")


def open_endpoint(base_url: str, api_key_env: str, politeness: Politeness) -> WebClient:
    """A client of an OpenAI-compatible endpoint with the key from the environment.

    Raises:
        PermissionError: there is no key, and the endpoint is not this machine.
    """
    key = os.environ.get(api_key_env, "").strip()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    client = WebClient(base_url, politeness=politeness, headers=headers, secrets=(key,))
    if not key and not _is_here(base_url):
        raise PermissionError(
            f"There is no key for {base_url}: set the environment variable {api_key_env}, on every node "
            "(captions.api_key_env names it). A server of your own without keys takes any word."
        )
    return client


def refusal(error: Refused, api_key_env: str, model: str) -> EndpointRefused | None:
    """What stops the job, None where only this request failed."""
    if any(word in error.body for word in FINAL):
        return EndpointRefused(f"The account has no credit left; add some and run the same command again. ({error})")
    if error.status in (401, 403):
        return EndpointRefused(
            f"The endpoint does not accept the key in {api_key_env} for model {model!r}; correct it and run the same "
            f"command again. ({error})"
        )
    if error.status in (404, 405) or (error.status is not None and 300 <= error.status < 400):
        return EndpointRefused(
            f"The endpoint knows no such address or model; correct captions.base_url (it ends in /v1) or "
            f"captions.model, {model!r}. ({error})"
        )
    return None


def _is_here(base_url: str) -> bool:
    host = urlsplit(base_url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
