"""The embedding stage: frames and captions to unit vectors by one encoder.

The encoder is loaded once, in the constructor. A row without a caption gets a zero text embedding, which is no
direction at all, and not the embedding of an empty sentence. Captions that occur several times in a batch are
encoded once. Where the fusion chooses between frames only later (max_sim, attention), the vector of each frame is kept
beside their mean, which is what `image_embedding` then is. It decodes no image and cuts no frames; that is
`hedwig.panorama`.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from hedwig.models.encoder import load_encoder

__all__ = ["Embedder", "FrameEmbedder"]

Floats = NDArray[np.float32]
_Row = TypeVar("_Row")


class Embedder:
    """Adds `image_embedding` (B, Di) and `text_embedding` (B, Dt), float32 of unit norm, and `caption_truncated` (B,).

    With a fusion that keeps frames it also adds `frame_embeddings` (B, V·Di): the V unit vectors one after the other.
    A row whose frames have another shape than they should, or whose embedding is not finite, gets a `failure`.

    Args:
        encoder_name: see `hedwig.models.encoder.load_encoder`.
        weights: file or folder; None for random weights.
        sha256: what the weights file must have; None for any.
        seed: decides the random weights.
        device: "auto" takes CUDA where there is one.
        dtype: "float32", "bfloat16" or "float16".
        fusion: how frames become one vector; "auto" is the encoder's own way.
        temporal: what ViCLIP does with another number of frames than its own.
        long_captions: cut captions that are longer than the context, or encode them in chunks.
        quick_gelu: how the weights of a CLIP were trained, where no file tells.
        compile: compile the image tower.
        num_frames: V, the frames that every row must have; None for as many as the batch's first row has.
        batch_size: rows that go through the encoder at once, whatever the size of the batch handed over.
        num_threads: torch's threads in this process; None leaves them as they are.
        fixed_batch: fill the last batch up to `batch_size`, so that every row goes through products of one shape: the
            same pixels then give the same bits, whatever rows came with them.
    """

    reads: tuple[str, ...] = ("frames", "caption")
    writes: tuple[str, ...] = ("image_embedding", "text_embedding", "caption_truncated")

    def __init__(
        self,
        *,
        encoder_name: str,
        weights: str | None = None,
        sha256: str | None = None,
        seed: int = 0,
        device: str = "auto",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        fusion: Literal["auto", "viclip", "mean", "max_sim", "attention"] = "auto",
        temporal: Literal["select", "interpolate"] = "select",
        long_captions: Literal["truncate", "chunks"] = "truncate",
        quick_gelu: bool | None = None,
        compile: bool = False,
        num_frames: int | None = None,
        batch_size: int = 32,
        num_threads: int | None = None,
        fixed_batch: bool = True,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self.batch_size, self.fixed_batch, self.num_frames = batch_size, fixed_batch, num_frames
        self.encoder = load_encoder(
            encoder_name,
            weights=weights,
            sha256=sha256,
            seed=seed,
            device=device,
            dtype=dtype,
            fusion=fusion,
            temporal=temporal,
            long_captions=long_captions,
            num_frames=num_frames,
            quick_gelu=quick_gelu,
            compile=compile,
        )
        self.cuts_captions = long_captions == "truncate"

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The batch with its embeddings, and with `failure` if a row has one."""
        num_rows = len(batch["frames"])
        failure: NDArray[np.object_] = np.full(num_rows, None, dtype=object)
        image, each = self._embed_frames(batch["frames"], failure)
        text, truncated = self._embed_captions(batch["caption"])
        for what, embedding in (("image", image), ("text", text)):
            for row in np.flatnonzero(~np.isfinite(embedding).all(axis=1)):
                failure[row] = failure[row] or f"{self.encoder.model_id} gave a {what} embedding that is not finite"
        out = {**batch, "image_embedding": image, "text_embedding": text, "caption_truncated": truncated}
        if each is not None:
            out["frame_embeddings"] = each.reshape(num_rows, each.shape[1] * each.shape[2])
        if any(reason is not None for reason in failure):
            out["failure"] = failure
        return out

    def _embed_frames(self, frames: NDArray[Any], failure: NDArray[np.object_]) -> tuple[Floats, Floats | None]:
        """(B, D) and perhaps (B, V, D) of (B, V, S, S, 3) uint8 frames, or of B arrays in an object array.

        Zeros where it notes a failure.
        """
        encoder = self.encoder
        num_frames = self.num_frames or (len(frames[0]) if len(frames) else encoder.num_frames)
        expected = (num_frames, encoder.frame_px, encoder.frame_px, 3)
        rows = []
        for row in range(len(frames)):
            each = np.asarray(frames[row])
            if each.dtype == np.uint8 and each.shape == expected:
                rows.append(row)
            else:
                failure[row] = f"frames are {each.dtype} {each.shape}, {encoder.name} takes uint8 {expected}"
        embedding = np.zeros((len(frames), encoder.image_dim), dtype=np.float32)
        shape = (len(frames), num_frames, encoder.image_dim)
        kept = np.zeros(shape, dtype=np.float32) if encoder.stores_frames else None
        for start in range(0, len(rows), self.batch_size):
            some = rows[start : start + self.batch_size]
            pixels = np.stack([frames[row] for row in self._filled(some)])
            if kept is None:
                embedding[some] = encoder.encode_frames(pixels)[: len(some)]
                continue
            kept[some] = encoder.encode_each_frame(pixels)[: len(some)]
            mean = kept[some].mean(axis=1)
            embedding[some] = mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)
        return embedding, kept

    def _embed_captions(self, captions: NDArray[Any]) -> tuple[Floats, NDArray[np.bool_]]:
        """(B, D) of captions and whether each was cut; zeros for None, NaN (an all-null column) and blank text."""
        embedding = np.zeros((len(captions), self.encoder.text_dim), dtype=np.float32)
        truncated = np.zeros(len(captions), dtype=np.bool_)
        if not self.encoder.has_text:
            return embedding, truncated
        rows_of: dict[str, list[int]] = {}
        for row, caption in enumerate(captions):
            if isinstance(caption, str) and caption.strip():
                rows_of.setdefault(caption, []).append(row)
        distinct = list(rows_of)
        for start in range(0, len(distinct), self.batch_size):
            some = distinct[start : start + self.batch_size]
            vectors, cut = self.encoder.encode_text(self._filled(some)), self.encoder.truncated(some)
            for i, caption in enumerate(some):
                embedding[rows_of[caption]] = vectors[i]
                truncated[rows_of[caption]] = cut[i] and self.cuts_captions
        return embedding, truncated

    def _filled(self, some: list[_Row]) -> list[_Row]:
        """`some`, its last item repeated up to the batch size."""
        return some + some[-1:] * (self.batch_size - len(some)) if self.fixed_batch else some


class FrameEmbedder(Embedder):
    """An `Embedder` whose fusion keeps the vector of each frame; a chain reads the columns off the class."""

    writes: tuple[str, ...] = (*Embedder.writes, "frame_embeddings")
