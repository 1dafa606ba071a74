"""The work behind the routes: from the bytes of places to answers, by a locator that can be exchanged while it serves.

A request takes the release once and uses nothing else of it afterwards, so an answer never mixes two versions. Images
are checked by their headers, decoded, and then located together in one thread of the gate: one encoding and one search
for a whole batch. Of an image only its sizes are logged, and nothing is written to disk. No HTTP here but refusals.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from starlette.exceptions import HTTPException

from hedwig import __version__
from hedwig.panorama import decode_image
from hedwig.serving.limits import INLINE_ROWS, Gate, Limits, check_image, refusal
from hedwig.serving.metrics import Metrics
from hedwig.serving.precision import coarsen, whole, withhold_neighbours
from hedwig.serving.releases import Locator, Release
from hedwig.serving.together import Together

if TYPE_CHECKING:
    from hedwig.serving.bodies import Asked, Place

__all__ = ["Service", "Timings"]

_log = logging.getLogger(__name__)

_EVERYTHING = 0.0
_NEIGHBOURS = "/v1/neighbours"

Pixels = NDArray[np.uint8]
Answer = dict[str, Any]


class Timings:
    """Milliseconds by stage of one request; `total` is the time since it was made."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - began)

    def add(self, name: str, seconds: float) -> None:
        """Add seconds to a stage."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def to_dict(self) -> dict[str, float]:
        """The milliseconds."""
        total = time.perf_counter() - self._began
        return {name: round(1000 * seconds, 3) for name, seconds in {**self._seconds, "total": total}.items()}


class Service:
    """Everything that the routes share.

    Args:
        locator: Ready to use, or a function that loads one, called in a thread when the application starts.
        limits: What a request may cost.
        info: What ``/v1/info`` says about the model and the index.
        cells: The folder of the run's geocells, for ``/v1/cells``.
        gate: Places and threads; made from `limits` when None.
        decode: Makes pixels of the bytes of an image, and of whether to halve it, in a process that can be killed;
            ValueError when it cannot. None decodes here.
        min_precision_km: No answer is finer than squares of this side, and embeddings and neighbours are withheld; 0
            tells all.
        metrics: Where it is counted; made when None.
    """

    def __init__(
        self,
        locator: Locator | Callable[[], Locator],
        *,
        limits: Limits,
        info: Mapping[str, Any] | None = None,
        cells: str | None = None,
        gate: Gate | None = None,
        decode: Callable[[bytes, bool], Pixels] | None = None,
        min_precision_km: float = 0.0,
        metrics: Metrics | None = None,
    ) -> None:
        self.limits, self.gate = limits, gate or Gate(limits)
        self.metrics = metrics or Metrics()
        self.min_precision_km = min_precision_km
        self._decode = decode
        self._together = Together(lambda size: self.metrics.batch(_NEIGHBOURS, size))
        self._load = None if isinstance(locator, Locator) else locator
        self._info, self._cells = dict(info or {}), cells
        self._reason = "The model and the index are being loaded."
        self._release: Release | None = None
        self.publication: Mapping[str, Any] = {}  # what `hedwig.serving.releases` found when it last looked
        if isinstance(locator, Locator):
            self.release = Release(locator, self._info, cells)
        self.metrics.watch("waiting", lambda: self.gate.num_waiting)
        self.metrics.watch("ongoing", lambda: self.gate.num_ongoing)

    async def load(self) -> None:
        """Load the locator, where a function was given."""
        if self._load is None or self._release is not None:
            return
        try:
            locator = await asyncio.to_thread(self._load)
            self.release = Release(locator, self._info, self._cells)
        except Exception as error:
            _log.exception("the model and the index could not be loaded")
            self._reason = f"The model and the index could not be loaded ({type(error).__name__}); see the log."

    @property
    def info(self) -> Mapping[str, Any]:
        """What is known of what is served, also before it is loaded."""
        return self._info if self._release is None else self._release.info

    @property
    def release(self) -> Release:
        """What is being served; setting it is the whole of a hot swap.

        Raises:
            HTTPException: 503 while there is none.
        """
        if self._release is None:
            raise refusal("not_ready", self._reason, headers={"Retry-After": "5"})
        return self._release

    @release.setter
    def release(self, release: Release) -> None:
        self._release = release
        self.metrics.released(__version__, str(release.info.get("model")), str(release.info.get("run_digest")))

    @contextlib.asynccontextmanager
    async def place(self, timings: Timings) -> AsyncIterator[None]:
        """One of the gate's places, with the time spent waiting for it."""
        began = time.perf_counter()
        async with self.gate.place():
            timings.add("wait", time.perf_counter() - began)
            yield

    def refuse_withheld(self) -> None:
        """Refuse what cannot be made coarse.

        Raises:
            HTTPException: 403 where there is a precision floor.
        """
        if self.min_precision_km > 0:
            raise refusal("withheld", "Embeddings and neighbours tell more than this service's precision floor.")

    def finish(self, release: Release, timings: Timings) -> Answer:
        """The fields that end every answer; its stages are counted."""
        milliseconds = timings.to_dict()
        self.metrics.stages(milliseconds)
        return {"timings_ms": milliseconds, **release.made_by}

    async def locate(
        self,
        release: Release,
        places: Sequence[Place],
        timings: Timings,
        *,
        top_k: int,
        explain: bool = False,
        posterior: bool = False,
        precision_km: float = 0.0,
        neighbours: bool = True,
    ) -> list[Answer | HTTPException]:
        """For each of B places its answer, or why there is none.

        `precision_km` makes it coarser than the service's floor, never finer; without `neighbours` they are withheld.

        Raises:
            HTTPException: 503, for all of them.
        """
        locator, floor_km = release.locator, max(self.min_precision_km, precision_km)
        above = _EVERYTHING if floor_km > 0 else _LISTED if posterior else None

        def work(queries: list[Any]) -> list[Answer]:
            with timings.stage("encode"):
                embedded = locator.embed(queries)
            with timings.stage("search"):
                found = locator.answer(queries, embedded, top_k=top_k, regions=True, posterior_above=above)
            if explain and floor_km == 0:
                with timings.stage("explain"):
                    found = locator.explain(queries, embedded, found)
            return [one.to_dict() for one in found]

        answers = await self._worked(release, places, timings, work)
        for answer in answers:
            if isinstance(answer, dict) and (bits := answer.get("entropy_bits")) is not None:
                self.metrics.entropy(bits)
        if floor_km > 0:
            lat, lon = locator.cell_places
            return [coarsen(whole(a), lat, lon, floor_km, top_k=top_k) if isinstance(a, dict) else a for a in answers]
        if not neighbours:
            return [withhold_neighbours(a) if isinstance(a, dict) else a for a in answers]
        return answers

    async def embed(self, release: Release, place: Place, timings: Timings) -> Answer | HTTPException:
        """The columns of one embedding, with its `pano_id`."""
        self.refuse_withheld()

        def work(queries: list[Any]) -> list[Answer]:
            with timings.stage("encode"):
                embedded = release.locator.embed(queries)
            return [
                {"pano_id": query.pano_id, **{name: column[b] for name, column in embedded.items()}}
                for b, query in enumerate(queries)
            ]

        return (await self._worked(release, [place], timings, work))[0]

    async def neighbours(self, release: Release, asked: Asked, timings: Timings, *, top_k: int) -> Answer:
        """The columns of a `NeighboursAnswer`."""
        self.refuse_withheld()
        named = ("image_embedding", asked.image), ("text_embedding", asked.text), ("frame_embeddings", asked.frames)
        columns = {name: column for name, column in (*named, ("cells", asked.cells)) if column is not None}

        def search(columns: Mapping[str, NDArray[Any]]) -> Mapping[str, list[Any]]:
            embedded = {name: column for name, column in columns.items() if name != "cells"}
            return release.locator.neighbours(embedded, top_k, cells=columns.get("cells"))

        def work() -> Answer:
            with timings.stage("search"):
                return dict(search(columns))

        try:
            if len(asked.image) > INLINE_ROWS or not release.locator.searches_here:
                answer = await self._run(work, timings)
                self.metrics.batch(_NEIGHBOURS, len(asked.image))
                return answer  # type: ignore[no-any-return]
            shapes = tuple((name, column.shape[1:]) for name, column in columns.items())
            answer, seconds = await self._together.search((id(release), top_k, shapes), columns, search)
        except ValueError as error:
            raise refusal("bad_body", str(error)[:500]) from None
        timings.add("search", seconds)
        return dict(answer)

    async def _worked(
        self,
        release: Release,
        places: Sequence[Place],
        timings: Timings,
        work: Callable[[list[Any]], list[Answer]],
    ) -> list[Answer | HTTPException]:
        """Decode and slice each place, then `work` on all that are well; if that fails, on one after another."""
        results: list[Any] = [None] * len(places)
        for i, place in enumerate(places):
            try:
                results[i] = await self._pixels(release.locator, place, timings)
            except HTTPException as error:
                if error.status_code >= 500:
                    raise
                results[i] = error

        def all_at_once() -> None:
            queries: dict[int, Any] = {}
            with timings.stage("decode"):
                for i, pixels in enumerate(results):
                    if not isinstance(pixels, HTTPException):
                        with _refusing(results, i):
                            queries[i] = _cut(release.locator, places[i], pixels)
            try:
                found = work(list(queries.values())) if queries else []
                for i, answer in zip(queries, found, strict=True):
                    results[i] = answer
            except ValueError:
                # The locator's contract: ValueError is about an image, anything else is our fault.
                for i, query in queries.items():
                    with _refusing(results, i):
                        results[i] = work([query])[0]

        if not all(isinstance(result, HTTPException) for result in results):
            await self._run(all_at_once, timings)
        return results

    async def _pixels(self, locator: Locator, place: Place, timings: Timings) -> list[Pixels]:
        found = []
        for data in place.photographs:
            width, height = check_image(data, self.limits)
            try:
                with timings.stage("decode"):
                    if self._decode is not None:
                        found.append(await asyncio.to_thread(self._decode, data, locator.half_size))
                    else:
                        here = functools.partial(decode_image, data, half_size=locator.half_size)
                        found.append(await self.gate.run(here))
            except ValueError as error:
                _log.info("could not decode %d bytes, %dx%d px", len(data), width, height)
                raise refusal("bad_image", str(error)[:500]) from None
        return found

    async def _run(self, work: Callable[[], Any], timings: Timings) -> Any:
        """`work()` in a thread; the time until it began counts as waiting."""
        asked = time.perf_counter()

        def timed() -> Any:
            timings.add("wait", time.perf_counter() - asked)
            return work()

        return await self.gate.run(timed)


_LISTED = 1e-4


@contextlib.contextmanager
def _refusing(results: list[Any], i: int) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        results[i] = refusal("bad_image", str(error)[:500])


def _cut(locator: Locator, place: Place, pixels: list[Pixels]) -> Any:
    if place.several:
        return locator.query(pixels, heading=math.nan, bearings_deg=place.headings_deg)
    return locator.query(pixels[0], heading=place.heading)
