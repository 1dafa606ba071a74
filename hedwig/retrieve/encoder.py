"""The encoder that a run's embeddings were made with, loaded again for queries: what settles it, and that it is it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hedwig import storage
from hedwig.embed import Embedder
from hedwig.models.fetched import resolve_weights

__all__ = ["encoder_settings", "load_embedder"]

_OPTIONS = ("seed", "dtype", "fusion", "temporal", "long_captions", "quick_gelu")  # all that changes an embedding


def encoder_settings(manifest: storage.Manifest) -> dict[str, Any]:
    """All that tells one encoder from another, as plain values.

    Args:
        manifest: of a run's ``embeddings``.
    """
    # A table made before an option existed was made with what is its default now.
    encoder = {"weights": None, **manifest.config["encoder"]}
    return {
        "name": encoder["name"],
        "weights": encoder["weights"],
        "model_id": manifest.details.get("model_id"),
        "num_frames": manifest.config["slicing"].get("num_frames"),
        "options": {key: encoder[key] for key in _OPTIONS if key in encoder},
    }


def load_embedder(run: str, manifest: storage.Manifest, *, device: str = "cpu", batch_size: int = 32) -> Embedder:
    """The stage that made a run's embeddings.

    Args:
        run: folder of one version.
        manifest: of its ``embeddings``.
        device: where it computes; "auto" takes CUDA where there is one.
        batch_size: rows at once; fewer are not filled up, for one image would be computed as a whole batch.

    Raises:
        ValueError: the weights are not those of the embeddings.
    """
    settings = encoder_settings(manifest)
    with _local_weights(run, settings["weights"]) as weights:
        embedder = Embedder(
            encoder_name=settings["name"],
            weights=weights,
            device=device,
            num_frames=settings["num_frames"],
            batch_size=batch_size,
            fixed_batch=False,
            **settings["options"],
        )
    if settings["model_id"] not in (None, embedder.encoder.model_id):
        raise ValueError(
            f"{storage.join(run, 'embeddings')} was made by {settings['model_id']}, but the weights there now are "
            f"{embedder.encoder.model_id}; restore those weights, or run `hedwig embed` again."
        )
    return embedder


@contextmanager
def _local_weights(run: str, weights: str | None) -> Iterator[str | None]:
    """A local path of weights named relative to the run, or else to the working directory; or of a fetched model."""
    if weights is None:
        yield None
        return
    weights = resolve_weights(weights)
    inside = storage.resolve(weights, base=storage.resolve(run))
    with storage.local_copy(inside if storage.exists(inside) else storage.resolve(weights)) as path:
        yield str(path)
