"""One process of the service: the published version of a run, loaded, and the application around it.

Encoder and index live in it unless the layout has them elsewhere; a version is then served once those elsewhere have
loaded it too. Everything that a replica needs is opened here and not before: what travels to it are settings and
handles. It is told of a newer version by nobody; it looks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from hedwig.publishing import pointer_token, published_folder
from hedwig.serving.app import create_app
from hedwig.serving.calls import Calls
from hedwig.serving.limits import Gate, Limits
from hedwig.serving.releases import Follower, Locator, Release
from hedwig.serving.safety import Safety
from hedwig.serving.shards import index_opener
from hedwig.storage import Manifest, join, manifest_digest, read_manifest

__all__ = ["LocateReplica", "describe_run", "open_release"]

_SERVED = ("embeddings", "geocells", "geolocator", "index")
_SHARE_OF_TIME = 0.9  # of request_timeout_s, for what others do
_STUCK_AFTER = 4.0  # times request_timeout_s; then the replica is replaced


class LocateReplica:
    """One replica.

    Args:
        run: Run folder; its published version is served, and the next one as soon as there is one.
        load: Makes the locator from the folder of a version; `Hedwig.load` when None.
        device: Of the real locator, "cpu" or "cuda".
        limits: What a request may cost.
        allowed_hosts: Names accepted in the Host header.
        num_threads_torch: Threads of torch and faiss in this process.
        safety: Who is let in, how often, and what is told.
        look_every_s: How often to look for a newly published version.
        encoder: Handle of the encoders' deployment; None encodes here.
        encoder_batch: Most panoramas of one call to it.
        shards: Handles of the shards' deployments; none searches here.
        num_decoders: Images that are decoded at the same time; as many as threads when None.
    """

    def __init__(
        self,
        run: str,
        load: Callable[[str], Locator] | None,
        device: str,
        limits: Limits,
        allowed_hosts: Collection[str],
        num_threads_torch: int,
        safety: Safety,
        look_every_s: float = 2.0,
        encoder: Any = None,
        encoder_batch: int = 16,
        shards: Sequence[Any] = (),
        num_decoders: int | None = None,
    ) -> None:
        others = _Others(limits, encoder, encoder_batch, shards) if encoder is not None or shards else None
        layout = {"encoder": "together" if encoder is None else "apart", "shards": max(1, len(shards))}

        def opened() -> Release:
            found = open_release(run, load or (lambda folder: _load(folder, device, num_threads_torch, others)))
            return replace(found, info={**found.info, "layout": layout})

        served = pointer_token(run)  # before it is loaded: what is published meanwhile is seen as new
        # The whole replica is built before Serve sends it anything, so it is never ready without its index.
        self._release = opened()
        self._follower = Follower(lambda: pointer_token(run), opened, served=served, period_s=look_every_s)
        self._limits = limits
        self._allowed_hosts = tuple(allowed_hosts)
        self._gate = Gate(limits)
        self._safety = safety.open(replace(limits, num_threads=num_decoders or limits.num_threads))

    def __serve_build_asgi_app__(self) -> Any:
        app = create_app(
            self._release.locator,
            limits=self._limits,
            allowed_hosts=self._allowed_hosts,
            info=self._release.info,
            cells=self._release.cells,
            gate=self._gate,
            **self._safety,
        )
        self._follower.follow(app.state.service)
        del self._release  # from now on only the service has it, so that it can be given up
        return app

    async def check_health(self) -> None:
        """Raise when work has hung, which nothing but a new process cures; Serve then replaces the replica."""
        limit_s = _STUCK_AFTER * self._limits.request_timeout_s
        if self._gate.oldest_s() > limit_s:
            raise RuntimeError(f"one image has been worked on for more than {limit_s:g} s")


def open_release(run: str, load: Callable[[str], Locator]) -> Release:
    """Load what is published in a run folder.

    Raises:
        ValueError: it is no longer what was published; or what `load` says.
    """
    folder = published_folder(run)
    locator = load(folder)
    geocells = join(folder, "geocells")
    return Release(locator, describe_run(folder, locator), geocells if read_manifest(geocells) is not None else None)


def describe_run(run: str, locator: object = None) -> dict[str, Any]:
    """What ``/v1/info`` says: counts from the run's manifests, model from the encoder that was loaded.

    Args:
        run: Folder of one version.
        locator: `Hedwig`; anything without an encoder says nothing about the model.

    Returns:
        ``num_references``, ``num_cells``, ``dim``, ``run_digest``, ``digests`` of the artefacts' manifests,
        ``versions`` of the packages that compute, ``model``, ``weights``: those that are known.
    """
    found: dict[str, Any] = {}
    manifests = {name: read_manifest(join(run, name)) for name in _SERVED}
    digests = {name: manifest_digest(join(run, name)) for name, there in manifests.items() if there is not None}
    index, geocells = manifests["index"], manifests["geocells"]
    if digests:
        found["digests"] = digests
    if index is not None:
        found |= {"num_references": index.num_out, "run_digest": digests["index"]}
    if geocells is not None and "num_cells" in geocells.details:
        found["num_cells"] = geocells.details["num_cells"]
    encoder = getattr(getattr(locator, "embedder", None), "encoder", None)
    if encoder is not None:
        found |= {"model": encoder.model_id, "weights": encoder.weights_note, "dim": encoder.image_dim}
        found["versions"] = {name: version(name) for name in ("numpy", "ray", "torch")}
    return found


def _load(folder: str, device: str, num_threads: int, others: _Others | None) -> Locator:
    """The real locator, with the threads of torch and faiss set: both default to every core of the machine."""
    import faiss
    import torch

    from hedwig.retrieve import Hedwig

    torch.set_num_threads(num_threads)
    faiss.omp_set_num_threads(num_threads)
    return Hedwig.load(folder, device=device, **({} if others is None else others.loaders(folder)))


class _Others:
    """What of a replica's work other deployments do.

    Args:
        limits: What a request may cost; a part of its time is left for the answer.
        encoder: See `LocateReplica`, as the rest.
        encoder_batch: Likewise.
        shards: Likewise.
    """

    def __init__(self, limits: Limits, encoder: Any, encoder_batch: int, shards: Sequence[Any]) -> None:
        self._calls = Calls(_SHARE_OF_TIME * limits.request_timeout_s)
        self._retry_after_s = limits.retry_after_s
        self._encoder, self._encoder_batch, self._shards = encoder, encoder_batch, tuple(shards)

    def loaders(self, folder: str) -> dict[str, Any]:
        """The arguments of `Hedwig.load` for a version."""
        found: dict[str, Any] = {}
        if self._encoder is not None:
            found["encoder"] = self._remote_embedder
        if self._shards:
            found["open_index"] = index_opener(self._calls, self._shards, folder, retry_after_s=self._retry_after_s)
        return found

    def _remote_embedder(self, folder: str, manifest: Manifest) -> Any:
        from hedwig.serving.encoder_pool import RemoteEmbedder  # torch

        return RemoteEmbedder(
            self._calls,
            self._encoder,
            folder,
            manifest,
            most=self._encoder_batch,
            retry_after_s=self._retry_after_s,
        )
