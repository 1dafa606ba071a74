"""The encoder in replicas of its own: dynamic batches on a GPU, of the frames that any replica has cut.

A replica that answers decodes and cuts, sends frames (uint8, as they go into the model) and captions, and gets
embeddings. What arrives within the wait goes through the encoder together, whatever requests it belongs to, so that a
GPU is filled by many small requests; on a CPU a batch takes as long as its images one after another. A panorama's
embedding then depends on its neighbours in the batch in the last digits, for products of other shapes round otherwise.
Each item names the encoder that it wants, by the digest of all that changes an embedding: versions of a run that share
an encoder share it here, and while one takes over from another both are loaded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray import serve

from hedwig.publishing import published_folder
from hedwig.retrieve.encoder import encoder_settings, load_embedder
from hedwig.serving.calls import Away, Calls
from hedwig.serving.shards import PREPARE_S, away, prepare
from hedwig.serving.versions import NotHere, Version, Versions, content_digest
from hedwig.storage import Manifest, join, read_manifest

__all__ = ["Cut", "EncoderReplica", "RemoteEmbedder", "encode_together"]

Columns = dict[str, NDArray[Any]]
_SENT = ("image_embedding", "text_embedding", "caption_truncated", "frame_embeddings", "failure")
_TOLD = ("model_id", "weights_note", "image_dim", "frame_px")


@dataclass(frozen=True)
class Cut:
    """Some panoramas to be encoded by one version of the encoder.

    Attributes:
        version: Which.
        frames: (B, V, S, S, 3) uint8.
        captions: (B,) str or None.
    """

    version: Version
    frames: NDArray[np.uint8]
    captions: tuple[str | None, ...]

    def __len__(self) -> int:
        return len(self.frames)


def _num_panoramas(items: Sequence[Cut]) -> int:
    return sum(map(len, items))


class EncoderReplica:
    """One encoder.

    Args:
        run: Run folder; the encoder of its published version is loaded before the first call.
        device: "cpu" or "cuda".
        batch: Most panoramas at once.
        wait_s: How long to wait for so many.
        num_threads: Of torch.
        keep_s: How long an encoder stays loaded that nobody asks for.
    """

    def __init__(
        self, run: str, device: str, batch: int, wait_s: float, num_threads: int = 1, keep_s: float = 120.0
    ) -> None:
        import torch

        torch.set_num_threads(num_threads)
        self._device, self._batch = device, batch
        self._versions = Versions(self._open, keep_s=keep_s)
        folder = published_folder(run)
        self._versions.get(_version(folder, _embeddings(folder)))
        self._together.set_max_batch_size(batch)
        self._together.set_batch_wait_timeout_s(wait_s)

    async def encode(self, cut: Cut) -> Columns:
        """The columns that an `Embedder` adds.

        Raises:
            NotHere: that encoder cannot be loaded here now.
        """
        found: Columns | Exception = await self._together(cut)
        if isinstance(found, Exception):
            raise found
        return found

    @serve.batch(batch_size_fn=_num_panoramas)  # type: ignore[untyped-decorator]
    async def _together(self, items: list[Cut]) -> list[Columns | Exception]:
        return await asyncio.to_thread(encode_together, self._versions, items)

    async def each_frame(self, version: Version, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(B, V, D) of (B, V, S, S, 3) uint8 frames, each encoded on its own."""
        embedder = await asyncio.to_thread(self._versions.get, version)
        found: NDArray[np.float32] = await asyncio.to_thread(embedder.encoder.encode_each_frame, frames)
        return found

    async def prepare(self, version: Version) -> dict[str, Any]:
        """Load an encoder, and say what it is."""
        embedder = await asyncio.to_thread(self._versions.get, version)
        return {name: getattr(embedder.encoder, name) for name in _TOLD}

    def _open(self, version: Version) -> Any:
        manifest = _embeddings(version.folder)
        if _version(version.folder, manifest).digest != version.digest:
            raise NotHere(f"{version.folder} has another encoder than the one that is asked for.")
        return load_embedder(version.folder, manifest, device=self._device, batch_size=self._batch)


def _embeddings(folder: str) -> Manifest:
    manifest = read_manifest(join(folder, "embeddings"))
    if manifest is None:
        raise FileNotFoundError(f"{folder} holds no finished embeddings; run `hedwig embed` first.")
    return manifest


def _version(folder: str, manifest: Manifest) -> Version:
    return Version(folder, content_digest(encoder_settings(manifest)))


def encode_together(versions: Versions[Any], items: Sequence[Cut]) -> list[Columns | Exception]:
    """The columns of each item, those of one encoder and one shape in one batch; or why it has none.

    Args:
        versions: `Embedder` by version.
        items: From whatever requests.
    """
    answers: list[Columns | Exception] = [RuntimeError("not encoded")] * len(items)
    groups: dict[Any, list[int]] = {}
    for i, item in enumerate(items):
        groups.setdefault((item.version.digest, item.frames.shape[1:]), []).append(i)
    for members in groups.values():
        these = [items[i] for i in members]
        captions = np.empty(_num_panoramas(these), dtype=object)
        captions[:] = [caption for item in these for caption in item.captions]
        try:
            embedder = versions.get(these[0].version)
            batch = embedder({"frames": np.concatenate([item.frames for item in these]), "caption": captions})
        except Exception as error:  # for those that asked; the others in the batch go on
            for i in members:
                answers[i] = error
            continue
        ends = np.cumsum([len(item) for item in these])[:-1]
        pieces = {name: np.split(batch[name], ends) for name in _SENT if name in batch}
        for place, i in enumerate(members):
            answers[i] = {name: piece[place] for name, piece in pieces.items()}
    return answers


class RemoteEmbedder:
    """The stage of an encoder that is elsewhere; what `hedwig.Hedwig` uses of an `Embedder`.

    Args:
        calls: Asks it.
        handle: Of the encoder's deployment.
        folder: Of the run's version.
        manifest: Of its embeddings.
        most: Panoramas of one call.
        retry_after_s: What a caller is told to wait when it does not answer in time.
        prepare_s: For loading the encoder everywhere.

    Attributes:
        encoder: ``model_id, weights_note, image_dim, frame_px`` and `encode_each_frame` of the encoder.
    """

    def __init__(
        self,
        calls: Calls,
        handle: Any,
        folder: str,
        manifest: Manifest,
        *,
        most: int,
        retry_after_s: int = 1,
        prepare_s: float = PREPARE_S,
    ) -> None:
        self._calls, self._handle, self._most, self._retry_after_s = calls, handle, most, retry_after_s
        self._version = _version(folder, manifest)
        prepare(calls, [handle], self._version, timeout_s=prepare_s)
        told = calls([partial(_told, handle, self._version)], timeout_s=prepare_s)[0]
        self.encoder = SimpleNamespace(**told, encode_each_frame=self._each_frame)

    def __call__(self, batch: Columns) -> Columns:
        """The batch with its embeddings, and with `failure` if a row has one; see `hedwig.embed.Embedder`."""
        frames, captions = batch["frames"], batch["caption"].tolist()
        cuts = [
            Cut(self._version, frames[start : start + self._most], tuple(captions[start : start + self._most]))
            for start in range(0, len(frames), self._most)
        ]
        found = self._asked([partial(_encode, self._handle, cut) for cut in cuts])
        for columns, cut in zip(found, cuts, strict=True):
            columns.setdefault("failure", np.full(len(cut), None, dtype=object))
        joined = {name: np.concatenate([columns[name] for columns in found]) for name in found[0]}
        if not any(reason is not None for reason in joined["failure"]):
            del joined["failure"]
        return {**batch, **joined}

    def _each_frame(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self._asked([partial(_each_frame, self._handle, self._version, frames)])[0]
        return found

    def _asked(self, asks: Sequence[Any]) -> list[Any]:
        try:
            return self._calls(asks)
        except Away as error:
            raise away(error, self._retry_after_s) from None


async def _encode(handle: Any, cut: Cut) -> Columns:
    return dict(await handle.encode.remote(cut))


async def _each_frame(handle: Any, version: Version, frames: NDArray[np.uint8]) -> Any:
    return await handle.each_frame.remote(version, frames)


async def _told(handle: Any, version: Version) -> Any:
    return await handle.prepare.remote(version)
