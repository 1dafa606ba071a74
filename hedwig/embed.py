"""The embedding stage: frames and captions to unit vectors by one encoder.

The encoder is loaded once, in the constructor. A row without a caption gets a zero text embedding, which is no
direction at all, and not the embedding of an empty sentence. Captions that occur several times in a batch are
encoded once. It decodes no image and cuts no frames; that is `hedwig.panorama`.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from hedwig.models.encoder import load_encoder

__all__ = ["Embedder"]

Floats = NDArray[np.float32]
_Row = TypeVar("_Row")


class Embedder:
    """Adds `image_embedding` (B, D) and `text_embedding` (B, D), float32 of unit norm.

    A row whose frames have another shape than the encoder's, or whose embedding is not finite, gets a `failure`.

    Args:
        encoder_name: see `hedwig.models.encoder.ENCODER_NAMES`.
        weights: file or folder; None for random weights.
        seed: decides the random weights.
        device: "auto" takes CUDA where there is one.
        dtype: "float32" or "bfloat16".
        batch_size: rows that go through the encoder at once, whatever the size of the batch handed over.
        num_threads: torch's threads in this process; None leaves them as they are.
        fixed_batch: fill the last batch up to `batch_size`, so that every row goes through products of one shape: the
            same pixels then give the same bits, whatever rows came with them.
    """

    reads: tuple[str, ...] = ("frames", "caption")
    writes: tuple[str, ...] = ("image_embedding", "text_embedding")

    def __init__(
        self,
        *,
        encoder_name: str,
        weights: str | None = None,
        seed: int = 0,
        device: str = "auto",
        dtype: Literal["float32", "bfloat16"] = "float32",
        batch_size: int = 32,
        num_threads: int | None = None,
        fixed_batch: bool = True,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self.batch_size, self.fixed_batch = batch_size, fixed_batch
        self.encoder = load_encoder(encoder_name, weights=weights, seed=seed, device=device, dtype=dtype)

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The batch with both embeddings, and with `failure` if a row has one."""
        num_rows = len(batch["frames"])
        failure: NDArray[np.object_] = np.full(num_rows, None, dtype=object)
        image = self._embed_frames(batch["frames"], failure)
        text = self._embed_captions(batch["caption"])
        for what, embedding in (("image", image), ("text", text)):
            for row in np.flatnonzero(~np.isfinite(embedding).all(axis=1)):
                failure[row] = failure[row] or f"{self.encoder.model_id} gave a {what} embedding that is not finite"
        out = {**batch, "image_embedding": image, "text_embedding": text}
        if any(reason is not None for reason in failure):
            out["failure"] = failure
        return out

    def _embed_frames(self, frames: NDArray[Any], failure: NDArray[np.object_]) -> Floats:
        """(B, D) of (B, V, S, S, 3) uint8 frames, or of B arrays in an object array; zeros where it notes a failure."""
        expected = (self.encoder.num_frames, self.encoder.frame_px, self.encoder.frame_px, 3)
        rows = []
        for row in range(len(frames)):
            each = np.asarray(frames[row])
            if each.dtype == np.uint8 and each.shape == expected:
                rows.append(row)
            else:
                failure[row] = f"frames are {each.dtype} {each.shape}, {self.encoder.name} takes uint8 {expected}"
        embedding = np.zeros((len(frames), self.encoder.image_dim), dtype=np.float32)
        for start in range(0, len(rows), self.batch_size):
            some = rows[start : start + self.batch_size]
            filled = self._filled(some)
            embedding[some] = self.encoder.encode_frames(np.stack([frames[row] for row in filled]))[: len(some)]
        return embedding

    def _embed_captions(self, captions: NDArray[Any]) -> Floats:
        """(B, D) of captions; a row of zeros for None, NaN (an all-null column) and blank text."""
        rows_of: dict[str, list[int]] = {}
        for row, caption in enumerate(captions):
            if isinstance(caption, str) and caption.strip():
                rows_of.setdefault(caption, []).append(row)
        embedding = np.zeros((len(captions), self.encoder.text_dim), dtype=np.float32)
        distinct = list(rows_of)
        for start in range(0, len(distinct), self.batch_size):
            some = distinct[start : start + self.batch_size]
            for caption, vector in zip(some, self.encoder.encode_text(self._filled(some)), strict=False):
                embedding[rows_of[caption]] = vector
        return embedding

    def _filled(self, some: list[_Row]) -> list[_Row]:
        """`some`, its last item repeated up to the batch size."""
        return some + some[-1:] * (self.batch_size - len(some)) if self.fixed_batch else some
