"""What is served: the locator of one version of a run, and the thread that exchanges it when another is published.

A replica looks at the run's pointer every few seconds, in a thread of its own. What is newly published is loaded beside
what is served, with the checks of a start, and takes its place by one assignment; requests under way end with the
release they began with, so no answer mixes two. If it cannot be loaded, the old one stays, ``/v1/info`` and the log
say so, and it is tried again now and then, because storage may only be away. A rollback is a publication like any
other. While both are there, a replica needs memory for both. Replicas change one after another, each within seconds:
who must not see two versions in turn compares `run_digest`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from hedwig import __version__

__all__ = ["Follower", "Locator", "Release", "Serving"]

_log = logging.getLogger(__name__)


@runtime_checkable
class Locator(Protocol):
    """What the service needs of `hedwig.Hedwig`."""

    @property
    def dim(self) -> int:
        """D, the length of an image embedding."""
        ...

    @property
    def half_size(self) -> bool:
        """Whether JPEGs are to be decoded at half size."""
        ...

    @property
    def searches_here(self) -> bool:
        """Whether a search asks nobody else, and so may run where others wait for it."""
        ...

    @property
    def cell_places(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(C,) latitudes and (C,) longitudes of the geocells, in degrees."""
        ...

    def query(self, image: Any, *, heading: float = ..., bearings_deg: Sequence[float] | None = ...) -> Any:
        """Cut pixels, or a list of pixels, into frames; ValueError when that cannot be done. Has a `pano_id`."""
        ...

    def embed(self, queries: Sequence[Any]) -> Mapping[str, NDArray[Any]]:
        """``image_embedding, text_embedding`` and perhaps ``frame_embeddings`` of B queries."""
        ...

    def answer(
        self,
        queries: Sequence[Any],
        embedded: Mapping[str, NDArray[Any]],
        *,
        top_k: int | None = ...,
        regions: bool | None = ...,
        posterior_above: float | None = ...,
    ) -> Sequence[Any]:
        """B predictions, each with a `to_dict`."""
        ...

    def explain(
        self, queries: Sequence[Any], embedded: Mapping[str, NDArray[Any]], predictions: Sequence[Any]
    ) -> Sequence[Any]:
        """The same predictions with a weight for every frame."""
        ...

    def neighbours(
        self, embedded: Mapping[str, NDArray[Any]], top_k: int = ..., *, cells: NDArray[Any] | None = ...
    ) -> Mapping[str, list[Any]]:
        """The columns of a `NeighboursAnswer` for B embeddings; ValueError for cells that there are not."""
        ...


@dataclass(frozen=True)
class Release:
    """One version of what is served; never changed, only replaced as a whole.

    Attributes:
        locator: The loaded run.
        info: What ``/v1/info`` says of it.
        cells: The folder of its geocells, or None.
    """

    locator: Locator
    info: Mapping[str, Any] = field(default_factory=dict)
    cells: str | None = None

    @property
    def made_by(self) -> dict[str, Any]:
        """What every answer names."""
        return {
            "model": self.info.get("model"),
            "version": __version__,
            "run_digest": self.info.get("run_digest"),
        }


class Serving(Protocol):
    """What can be given another release: `hedwig.serving.service.Service`."""

    release: Release
    publication: Mapping[str, Any]


class Follower:
    """Keeps a service at what is published.

    Args:
        token: Says what is published: a text that changes whenever something else is; None for nothing.
        load: Makes the release of what is published now; raises when it cannot be served.
        served: The token of what the service has, read before that was loaded.
        period_s: Between two looks.
        retry_s: Until what could not be loaded is tried again.
    """

    def __init__(
        self,
        token: Callable[[], str | None],
        load: Callable[[], Release],
        *,
        served: str | None,
        period_s: float = 2.0,
        retry_s: float = 60.0,
    ) -> None:
        self._token, self._load, self._served = token, load, served
        self._period_s, self._retry_s = period_s, retry_s
        self._failed: str | None = None
        self._again_at = 0.0
        self._blind = False
        self._end = threading.Event()

    def follow(self, service: Serving) -> None:
        """Look again and again, in a thread that ends with the process or with `stop`."""
        service.publication = _state("current", self._served)
        threading.Thread(target=self._watch, args=(service,), name="hedwig-releases", daemon=True).start()

    def stop(self) -> None:
        """End the thread after what it is doing."""
        self._end.set()

    def look(self, service: Serving) -> bool:
        """Look once; whether the release was exchanged."""
        try:
            token = self._token()
        except Exception as error:  # storage, or a pointer that is none: nothing of it may end the service
            if not self._blind:
                _log.exception("what is published cannot be read; what is served stays")
            self._blind = True
            service.publication = _state("unknown", self._served, error)
            return False
        if token == self._served:
            if self._blind or self._failed is not None:  # back to what is served
                service.publication = _state("current", token)
            self._blind, self._failed = False, None
            return False
        self._blind = False
        if token == self._failed and time.monotonic() < self._again_at:
            return False
        service.publication = _state("loading", token)
        began = time.monotonic()
        try:
            release = self._load()
        except Exception as error:
            _log.exception("%s was published and cannot be served; what is served stays", token)
            service.publication = _state("failed", token, error)
            self._failed, self._again_at = token, time.monotonic() + self._retry_s
            return False
        service.release = release
        service.publication = _state("current", token)
        self._served, self._failed = token, None
        _log.info("serving %s, run digest %s, after %.1f s", token, release.info.get("run_digest"), _since(began))
        return True

    def _watch(self, service: Serving) -> None:
        while not self._end.wait(self._period_s):
            self.look(service)


def _since(began: float) -> float:
    return time.monotonic() - began


def _state(state: str, published: str | None, error: Exception | None = None) -> dict[str, str | None]:
    """For ``/v1/info``; of an error its type, for the message may name what only the log should."""
    reason = None if error is None else f"{type(error).__name__}; see the log"
    return {"state": state, "published": published, "reason": reason}
