"""The two stages that speak to a source: find what it has around a planned point, then fetch the images of each find.

Everything a source answered is kept at once (`AnswerStore`, or the image file itself), so a run that was killed asks
nothing twice but what was under way. When the source says that the quota is spent, no further request is made: the rows
that are left fail with that reason, and the same command goes on from there another day.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from hedwig import storage
from hedwig.acquisition.mapillary import Mapillary
from hedwig.acquisition.offers import ImageSource, Offer, QuotaSpent
from hedwig.acquisition.panoramax import Panoramax
from hedwig.acquisition.streetview import StreetView
from hedwig.answers import AnswerStore, answer_key
from hedwig.web import Answer, Politeness, Refused, WebClient

__all__ = ["QUOTA", "SOURCES", "Fetcher", "Finder", "image_name", "image_source"]

Batch = dict[str, NDArray[Any]]
_T = TypeVar("_T")

SOURCES = ("streetview", "mapillary", "panoramax")
QUOTA = "quota spent"


def image_source(name: str, **options: Any) -> ImageSource:
    """The source called `name`, one of `SOURCES`; options are its constructor's.

    Raises:
        ValueError: unknown name, or options it does not take.
        PermissionError: it needs a key that the environment does not hold.
    """
    made: dict[str, Callable[..., ImageSource]] = {
        "streetview": StreetView,
        "mapillary": Mapillary,
        "panoramax": Panoramax,
    }
    if name not in made:
        raise ValueError(f"Unknown source {name!r}; there are {', '.join(SOURCES)}.")
    given = {key: value for key, value in options.items() if value is not None}
    try:
        return made[name](**given)
    except TypeError as error:
        raise ValueError(f"{name} does not take these options: {error}.") from error


class _BoundReached(QuotaSpent):
    """The user's own bound: what is under way may end, nothing new begins."""


class _Counting:
    """A client for one row: counts its attempts, and asks nothing any more once the source is closed."""

    def __init__(self, client: WebClient, stage: _Asking, slots: asyncio.Semaphore) -> None:
        self._client, self._stage, self._slots = client, stage, slots
        self.base_url, self.num_attempts = client.base_url, 0

    async def request(self, method: str, path: str, *, params: Mapping[str, str] | None = None) -> Answer:
        """`WebClient.request`, unless the source is closed."""
        async with self._slots:
            if self._stage.closed is not None:
                raise QuotaSpent(self._stage.closed)
            try:
                answer = await self._client.request(method, path, params=params)
            except Refused as refusal:
                self.num_attempts += refusal.num_attempts
                if refusal.status == 429:  # asked to be left alone for longer than we wait
                    self._stage.close(str(refusal))
                raise
            self.num_attempts += answer.num_attempts
            return answer

    def another(self) -> _Counting:
        """One that counts from zero."""
        return _Counting(self._client, self._stage, self._slots)

    def hide(self, text: str) -> str:
        """`text` without secrets."""
        return self._client.hide(text)


class _Asking:
    """What both stages share: the source, how politely it is asked, and whether it still answers."""

    def __init__(
        self,
        *,
        source: str,
        options: dict[str, Any],
        folder: str,
        per_second: float,
        concurrency: int,
        max_attempts: int,
    ) -> None:
        self._source = image_source(source, **options)
        self._politeness = Politeness(per_second=per_second, concurrency=concurrency, max_attempts=max_attempts)
        self._answers = AnswerStore(storage.join(folder, "answers"))
        self._folder = folder
        self.closed: str | None = None  # nothing is asked any more
        self.full: str | None = None  # no row begins any more

    def close(self, reason: str) -> None:
        """Make no further request; `reason` is what the remaining rows fail with."""
        if self.closed is None:
            self.closed = f"{QUOTA}: {reason}; run the same command again when there is more"

    def _for_all(
        self, rows: Sequence[Any], ask: Callable[[_Counting, Any], Awaitable[_T]]
    ) -> tuple[list[_T | None], NDArray[np.object_]]:
        """What `ask` gives for each row, and why not for the others."""
        failure: NDArray[np.object_] = np.full(len(rows), None, dtype=object)
        results: list[_T | None] = [None] * len(rows)

        async def one(client: _Counting, i: int) -> None:
            if self.closed is not None or self.full is not None:
                failure[i] = self.closed or self.full
                return
            try:
                results[i] = await ask(client, rows[i])
            except _BoundReached:
                failure[i] = self.full
            except QuotaSpent as error:
                self.close(str(error))
                failure[i] = self.closed
            except Refused as error:
                failure[i] = self.closed or f"not fetched: {error}"
            except FileNotFoundError as error:
                failure[i] = f"gone: {error}"
            except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:  # odd JSON gives any of these
                failure[i] = client.hide(f"not fetched: {type(error).__name__}: {error}")

        async def everything() -> None:
            source = self._source
            async with WebClient(
                source.base_url, politeness=self._politeness, headers=source.headers, secrets=source.secrets
            ) as client:
                requests = asyncio.Semaphore(self._politeness.concurrency)
                begun = asyncio.Semaphore(self._politeness.concurrency)

                async def in_turn(i: int) -> None:
                    async with begun:  # rows wait here, so that a closed source stops those that have not begun
                        await one(_Counting(client, self, requests), i)

                done = await asyncio.gather(*(in_turn(i) for i in range(len(rows))), return_exceptions=True)
            for each in done:
                if isinstance(each, BaseException):
                    raise each

        asyncio.run(everything())
        return results, failure


class Finder(_Asking):
    """Adds `offers`: for every planned point, what the source has within the radius, nearest first, as JSON.

    Args:
        source: one of `SOURCES`.
        options: of its constructor.
        folder: where answers are kept.
        radius_m: how far from the point, in metres.
        per_second: most requests a second of this process.
        concurrency: requests under way.
        max_attempts: how often one request is made at most.
    """

    reads: tuple[str, ...] = ("lat", "lon")
    writes: tuple[str, ...] = ("offers",)

    def __init__(self, *, radius_m: float = 50.0, **asking: Any) -> None:
        super().__init__(**asking)
        self._radius_m = radius_m

    def __call__(self, batch: Batch) -> Batch:
        """The batch with `offers`, an object array of JSON lists, and `failure`."""
        points = list(zip(batch["lat"].tolist(), batch["lon"].tolist(), strict=True))

        async def ask(client: _Counting, point: tuple[float, float]) -> str:
            key = answer_key("find", self._source.digest, self._source.base_url, *point, self._radius_m)
            kept = self._answers.get(key)
            if kept.answer is not None:
                return json.dumps(kept.answer, ensure_ascii=False)
            try:
                offers = [o.to_dict() for o in await self._source.find(client, *point, self._radius_m)]
            except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
                if client.num_attempts:
                    self._answers.put_trouble(key, str(error), {"num_requests": client.num_attempts})
                raise
            self._answers.put(key, offers, {"num_searches": 1, "num_requests": client.num_attempts})
            return json.dumps(offers, ensure_ascii=False)

        found, failure = self._for_all(points, ask)
        offers: NDArray[np.object_] = np.empty(len(points), dtype=object)
        offers[:] = found
        return {**batch, "offers": offers, "failure": failure}


class Fetcher(_Asking):
    """Fetches the images of an offer into ``images/`` and adds where they lie and their SHA-256.

    Args:
        source: one of `SOURCES`.
        options: of its constructor.
        folder: where ``images/`` and the answers lie.
        per_second: most requests a second of this process.
        concurrency: requests under way.
        max_attempts: how often one request is made at most.
        max_images: images that may ever be asked for in this folder, attempts counted; None for no bound. With a
            bound there must be one process only.
    """

    reads: tuple[str, ...] = ("offer",)
    writes: tuple[str, ...] = ("image_uris", "sha256s", "num_bytes")

    def __init__(self, *, max_images: int | None = None, **asking: Any) -> None:
        super().__init__(**asking)
        spent = 0 if max_images is None else int(self._answers.total().get("num_image_attempts", 0))
        self._left = None if max_images is None else max(0, max_images - spent)

    def __call__(self, batch: Batch) -> Batch:
        """The batch with `image_uris` and `sha256s`, object arrays of lists, `num_bytes` and `failure`."""
        offers = [Offer.of(json.loads(text)) for text in batch["offer"].tolist()]

        async def ask(client: _Counting, offer: Offer) -> tuple[list[str], list[str], int]:
            names = [image_name(offer, number, self._source.digest) for number in range(offer.num_images)]
            # All are waited for, whatever one of them raises: an image under way is paid for and must be kept.
            tried = await asyncio.gather(
                *(self._image(client, offer, n) for n in range(len(names))), return_exceptions=True
            )
            images = []
            for each in tried:
                if isinstance(each, BaseException):
                    raise each
                images.append(each)
            return names, [digest for digest, _ in images], sum(size for _, size in images)

        found, failure = self._for_all(offers, ask)
        columns: dict[str, NDArray[Any]] = {name: np.empty(len(offers), dtype=object) for name in self.writes[:2]}
        columns["num_bytes"] = np.zeros(len(offers), dtype=np.int64)
        for i, result in enumerate(found):
            names, digests, size = result or ([], [], 0)
            columns["image_uris"][i], columns["sha256s"][i], columns["num_bytes"][i] = names, digests, size
        return {**batch, **columns, "failure": failure}

    def _key(self, offer: Offer, number: int) -> str:
        return answer_key("image", self._source.digest, offer.pano_id, number)

    async def _image(self, client: _Counting, offer: Offer, number: int) -> tuple[str, int]:
        """SHA-256 and size of one image, fetched unless its file is there."""
        path = storage.join(self._folder, image_name(offer, number, self._source.digest))
        key = self._key(offer, number)
        kept = self._answers.get(key)
        if kept.answer is not None and storage.exists(path):
            return str(kept.answer["sha256"]), int(kept.answer["num_bytes"])
        # A file without its entry was fetched, and paid for, by a run that was killed before it could note it.
        if storage.exists(path):
            data, attempts = storage.read_bytes(path), 1
        else:
            data, attempts = await self._ask(client, offer, number)
            storage.write_bytes(path, data)
        digest = hashlib.sha256(data).hexdigest()
        spent = {"num_images": 1, "num_image_attempts": attempts, "num_requests": attempts, "num_bytes": len(data)}
        self._answers.put(key, {"sha256": digest, "num_bytes": len(data)}, spent)
        return digest, len(data)

    async def _ask(self, client: _Counting, offer: Offer, number: int) -> tuple[bytes, int]:
        """The image and how many requests it took; what failed is noted with its cost."""
        if self._left is not None:
            if self._left <= 0:
                self.full = f"{QUOTA}: the images allowed (--max-usd, --max-images) are reached; run it again for more"
                raise _BoundReached(self.full)
            self._left -= 1
        own = client.another()
        try:
            data = await self._source.image(own, offer, number)
            if not data.startswith((b"\xff\xd8", b"\x89PNG", b"RIFF")):
                raise OSError(f"{offer.pano_id} image {number} is no JPEG, PNG or WebP; it begins {data[:12]!r}")
        except QuotaSpent as error:
            self.close(str(error))
            self._note(offer, number, str(error), own.num_attempts)
            raise
        except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
            self._note(offer, number, str(error), own.num_attempts)
            raise
        if self._left is not None:
            self._left -= own.num_attempts - 1
        return data, own.num_attempts

    def _note(self, offer: Offer, number: int, trouble: str, attempts: int) -> None:
        """Keep what a failed attempt took; a refusal for want of quota is not billed."""
        if attempts:
            self._answers.put_trouble(self._key(offer, number), trouble, {"num_requests": attempts})


def image_name(offer: Offer, number: int, options: str) -> str:
    """Where an image lies below the folder of the acquisition; spread over 256 folders by the id's digest.

    `options` is the source's digest: the same panorama in another size or field of view is another file.
    """
    safe = "".join(c if c.isalnum() or c in "-_" else "_" for c in offer.pano_id)
    mark = hashlib.sha256(offer.pano_id.encode()).hexdigest()
    # Two ids that differ in odd characters only must not meet in one file.
    stem = safe if safe == offer.pano_id.replace(":", "_") else f"{safe}-{mark[:8]}"
    bearing = f"-{offer.bearings_deg[number]:07.3f}" if offer.bearings_deg else ""
    kind = hashlib.sha256(options.encode()).hexdigest()[:6]
    return f"images/{mark[:2]}/{stem}{bearing}-{kind}.jpg"
