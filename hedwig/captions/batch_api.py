"""The four calls of OpenAI's Batch API that a batch job needs: upload, create, look, fetch.

Creating is the one call that must not happen twice, because each batch is paid. It is therefore made once at a time;
when its answer was lost, the batches are listed and searched for our metadata before the next attempt. Listing could
lag behind creation; the same ``Idempotency-Key`` on both attempts covers that where the service heeds it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from hedwig.captions.openai import FINAL, refusal
from hedwig.web import Answer, Refused, WebClient

__all__ = ["BatchApi", "NoRoom"]

OPEN = frozenset({"validating", "in_progress", "finalizing", "cancelling"})
MAX_PAGES = 20  # of 100 batches, newest first: what is older has ended


class NoRoom(Exception):
    """The endpoint refuses a batch because of the tokens that are enqueued with it."""


class BatchApi:
    """Calls through an open client.

    Args:
        client: of the endpoint.
        api_key_env: for errors.
        model: for errors.

    All calls raise:
        EndpointRefused: the endpoint will answer nobody.
        Refused: it failed too often, or does not take this.
    """

    def __init__(self, client: WebClient, *, api_key_env: str, model: str) -> None:
        self._client, self._api_key_env, self._model = client, api_key_env, model

    async def upload(self, path: Path) -> str:
        """Upload a shard; returns the id of the file. Uploaded twice it costs nothing and expires."""
        with open(path, "rb") as stream:
            files = {"file": (path.name, stream, "application/jsonl")}
            return str((await self._object("POST", "files", files=files, data={"purpose": "batch"}))["id"])

    async def create(self, file_id: str, tag: str, *, look_first: bool) -> dict[str, Any] | None:
        """Create the batch of a file, or find it where an earlier attempt may have created it.

        Args:
            file_id: the shard.
            tag: under ``metadata.hedwig``, by which it is found again.
            look_first: an earlier process may have created it.

        Returns:
            The batch, or None where the endpoint is busy; it is asked again later.

        Raises:
            NoRoom: it takes no more tokens.
        """
        body = {
            "input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": "24h",
            "metadata": {"hedwig": tag},
        }  # fmt: skip
        politeness = self._client.politeness
        for attempt in range(1, politeness.max_attempts + 1):
            if (look_first or attempt > 1) and (found := await self.find(file_id, tag)) is not None:
                return found
            try:
                headers = {"Idempotency-Key": tag}
                return await self._object("POST", "batches", json=body, headers=headers, max_attempts=1)
            except Refused as error:
                if "token_limit_exceeded" in error.body:
                    raise NoRoom from None
                if error.status == 429:
                    return None
                if attempt == politeness.max_attempts or (error.status is not None and error.status < 500):
                    raise
                await asyncio.sleep(min(politeness.max_wait_s, politeness.first_wait_s * 2 ** (attempt - 1)))
        return None

    async def batch(self, batch_id: str) -> dict[str, Any]:
        """The state of a batch."""
        return await self._object("GET", f"batches/{batch_id}")

    async def content(self, file_id: str) -> bytes:
        """The bytes of a result file; none where it has expired, then its requests are asked again."""
        reply = await self._request("GET", f"files/{file_id}/content", accept=(404,))
        return b"" if reply.status == 404 else reply.body

    async def find(self, file_id: str, tag: str) -> dict[str, Any] | None:
        """The batch of a file with our tag; None where there is none."""
        async for page in self._pages():
            for one in page:
                if one.get("input_file_id") == file_id and (one.get("metadata") or {}).get("hedwig") == tag:
                    return dict(one)
        return None

    async def any_open(self) -> bool:
        """Whether any batch of the account, ours or another's, is under way."""
        num_pages = 0
        async for page in self._pages():
            num_pages += 1
            if any(one.get("status") in OPEN for one in page):
                return True
            if num_pages == MAX_PAGES:
                break
        return False

    async def _pages(self) -> AsyncIterator[list[dict[str, Any]]]:
        after: dict[str, str] = {}
        while True:
            page = await self._object("GET", "batches", params={"limit": "100", **after})
            yield page.get("data") or []
            if not page.get("has_more") or not page.get("data"):
                return
            after = {"after": page["data"][-1]["id"]}

    async def _object(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        return dict(json.loads((await self._request(method, path, check=_is_object, **options)).body))

    async def _request(self, method: str, path: str, **options: Any) -> Answer:
        try:
            return await self._client.request(method, path, final=FINAL, **options)
        except Refused as error:
            final = refusal(error, self._api_key_env, self._model)
            if final is not None:
                raise final from None
            raise


def _is_object(body: bytes) -> None:
    if not isinstance(json.loads(body), dict):
        raise ValueError("expected a JSON object")
