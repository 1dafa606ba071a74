"""The index in pieces on Ray Serve: what one shard's process does, and how a replica asks them.

A replica keeps names, places and cells of the references, which are small, and asks for vectors only those shards that
own a chosen cell, all at once. Each question names the version that the request began with, by the digest of the index:
a shard answers from that very version, loading it first if it must, or says that it has it not, and is asked again
until the request's time is up. So an answer never mixes two. Before a replica moves to a newer version it has every
process of every shard load it, and the older one stays loaded until nobody has asked for it in a while.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hedwig.index import Found, IndexShard, Question, ShardedIndex
from hedwig.index.fetching import local_index
from hedwig.publishing import published_folder
from hedwig.serving.calls import Away, Calls
from hedwig.serving.limits import INLINE_ROWS, refusal
from hedwig.serving.versions import NotHere, Version, Versions, content_digest
from hedwig.storage import join, read_manifest

__all__ = ["PREPARE_S", "ShardReplica", "away", "index_opener", "prepare"]

PREPARE_S = 600.0  # for a large index from object storage


class ShardReplica:
    """One process of one shard.

    Args:
        run: Run folder; its published version is loaded before the first question, others when they are asked for.
        shard: Which, from 0.
        num_shards: Of how many.
        num_threads: Of the search.
        keep_s: How long a version stays loaded that nobody asks for.
    """

    def __init__(self, run: str, shard: int, num_shards: int, num_threads: int = 1, keep_s: float = 120.0) -> None:
        import faiss

        faiss.omp_set_num_threads(num_threads)
        self._shard, self._num_shards = shard, num_shards
        self._versions = Versions(self._open, keep_s=keep_s)
        folder = published_folder(run)
        manifest = read_manifest(join(folder, "index"))
        if manifest is None:
            raise FileNotFoundError(f"{folder} holds no finished index; run `hedwig index` first.")
        self._versions.get(Version(folder, content_digest(manifest.files)))

    async def search(self, version: Version, question: Question) -> list[Found]:
        """What this shard finds in a version.

        Raises:
            NotHere: that version cannot be loaded here now.
        """
        shard = self._versions.ready(version)
        if shard is None:
            shard = await asyncio.to_thread(self._versions.get, version)
        if len(question.queries) <= INLINE_ROWS:
            return shard.search(question)
        return await asyncio.to_thread(shard.search, question)

    async def prepare(self, version: Version) -> list[str]:
        """Load a version; the digests of all that are loaded."""
        await asyncio.to_thread(self._versions.get, version)
        return self._versions.digests

    def _open(self, version: Version) -> IndexShard:
        folder = join(version.folder, "index")
        manifest = read_manifest(folder)
        if manifest is None or content_digest(manifest.files) != version.digest:
            raise NotHere(f"{folder} holds another index than the one that is asked for.")
        with local_index(folder) as (path, fetch):
            return IndexShard.open(path, manifest.files, shard=self._shard, num_shards=self._num_shards, fetch=fetch)


def index_opener(
    calls: Calls, shards: Sequence[Any], folder: str, *, retry_after_s: int = 1, prepare_s: float = PREPARE_S
) -> Callable[[Path, Mapping[str, str]], ShardedIndex]:
    """What opens the index of a version as one that asks the shards; for `hedwig.retrieve.load_retriever`.

    Args:
        calls: Asks them.
        shards: A handle for each shard's deployment.
        folder: Of the run's version.
        retry_after_s: What a caller is told to wait when a shard does not answer in time.
        prepare_s: For loading the version in all shards.
    """

    def opened(path: Path, digests: Mapping[str, str]) -> ShardedIndex:
        version = Version(folder, content_digest(digests))
        prepare(calls, shards, version, timeout_s=prepare_s)

        def ask(questions: Mapping[int, Question]) -> Mapping[int, Sequence[Found]]:
            asks = [partial(_search, shards[shard], version, question) for shard, question in questions.items()]
            try:
                return dict(zip(questions, calls(asks), strict=True))
            except Away as error:
                raise away(error, retry_after_s) from None

        return ShardedIndex.open(path, digests, num_shards=len(shards), ask=ask)

    return opened


def prepare(calls: Calls, handles: Sequence[Any], version: Version, *, timeout_s: float = PREPARE_S) -> None:
    """Have every process of some deployments load a version.

    Raises:
        Away: one of them did not within the time.
        RuntimeError: one of them cannot.
    """
    calls([partial(_prepare, handle, version, timeout_s) for handle in handles], timeout_s=timeout_s)


def away(error: Away, retry_after_s: int) -> Exception:
    """The refusal of a request that could not be finished because a part of the service is being restarted."""
    return refusal("not_ready", str(error), headers={"Retry-After": str(retry_after_s)})


async def _search(handle: Any, version: Version, question: Question) -> list[Found]:
    found: list[Found] = await handle.search.remote(version, question)
    return found


async def _prepare(handle: Any, version: Version, timeout_s: float) -> None:
    try:
        told = await handle.broadcast("prepare", version).results_async(timeout_s=timeout_s)
    except NotHere as error:  # who publishes is told now; whoever follows the pointer tries again
        raise RuntimeError(str(error)) from error
    if not told:
        raise NotHere("No process of a part of the service runs yet.")
