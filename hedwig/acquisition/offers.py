"""What a source of imagery offers: one panorama, where it is, whose it is, and the images it consists of.

The common tongue of Street View, Mapillary and Panoramax here, written to tables as JSON. A panorama is either one
image of 360° or several perspective ones (bearings). Addresses that expire or hold a key are not part of an offer:
images are named, and the source knows how to get what it named.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from hedwig.geo import haversine_km
from hedwig.web import Answer

__all__ = ["Asker", "Box", "ImageSource", "Offer", "QuotaSpent", "ask_json", "box_around", "nearest_first"]

M_PER_DEG = 111_195.0  # on a sphere of 6371.0088 km
Box = tuple[float, float, float, float]


class QuotaSpent(OSError):
    """The source gives nothing more for now, to this key; every further request would be refused too."""


@dataclass(frozen=True)
class Offer:
    """One panorama that a source has.

    Attributes:
        pano_id: the source's name and its own id, such as ``mapillary:1933525276802129``.
        lat: degrees.
        lon: degrees.
        source: where it comes from.
        licence: under which terms, as precisely as the source says.
        author: whom to credit.
        projection: 'equirectangular' or 'bearings'.
        heading: degrees clockwise from north of the image's centre column; None if unknown or for bearings.
        captured_at: ISO 8601 or a part of it; None if unknown.
        sequence: panoramas of one ride share it; None if unknown.
        bearings_deg: headings of the images for 'bearings', else empty.
        fov_deg: horizontal field of view of each bearing; None for panoramas.
    """

    pano_id: str
    lat: float
    lon: float
    source: str
    licence: str
    author: str | None
    projection: str
    heading: float | None = None
    captured_at: str | None = None
    sequence: str | None = None
    bearings_deg: tuple[float, ...] = ()
    fov_deg: float | None = None

    @property
    def num_images(self) -> int:
        """Images the panorama consists of."""
        return max(1, len(self.bearings_deg))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `of` is the inverse."""
        return {**asdict(self), "bearings_deg": list(self.bearings_deg)}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Offer:
        """The offer of `to_dict`'s values."""
        return cls(**{**values, "bearings_deg": tuple(values.get("bearings_deg") or ())})


class Asker(Protocol):
    """The part of `hedwig.web.WebClient` that a source uses."""

    base_url: str

    async def request(self, method: str, path: str, *, params: Mapping[str, str] | None = None) -> Answer:
        """Ask until there is an answer; see `WebClient.request`."""

    def hide(self, text: str) -> str:
        """`text` without secrets."""


class ImageSource(Protocol):
    """What `Finder` and `Fetcher` need to know of a source."""

    name: str
    terms: str
    """What must be shown before the first use."""
    paid: bool
    """Whether each image costs money."""
    digest: str
    """Changes whenever another answer is to be expected for the same place."""
    base_url: str
    headers: dict[str, str]
    """Of every request; may hold the key."""
    secrets: tuple[str, ...]
    """What no error may show."""

    async def find(self, client: Asker, lat: float, lon: float, radius_m: float) -> list[Offer]:
        """The panoramas within `radius_m` metres, nearest first."""

    async def image(self, client: Asker, offer: Offer, number: int) -> bytes:
        """Image `number` of an offer, encoded."""


async def ask_json(client: Asker, url: str, query: Mapping[str, str] | None = None) -> dict[str, Any]:
    """GET an object.

    Raises:
        Refused: see `WebClient.request`.
        OSError: what came is not a JSON object.
    """
    body = (await client.request("GET", url, params=query)).body
    try:
        found = json.loads(body)
    except ValueError as error:
        raise OSError(f"{client.base_url} answered no JSON ({error}); it begins {body[:60]!r}.") from error
    if not isinstance(found, dict):
        raise OSError(f"{client.base_url} answered a {type(found).__name__}, not an object.")
    return found


def box_around(lat: float, lon: float, radius_m: float) -> list[Box]:
    """(west, south, east, north) around a place in degrees; two boxes where it crosses the 180th meridian.

    Raises:
        ValueError: the box would be larger than the API takes.
    """
    high = radius_m / M_PER_DEG
    wide = min(high / max(math.cos(math.radians(lat)), 1e-6), 180.0)
    if 4 * high * wide >= 0.01:
        raise ValueError(
            f"A radius of {radius_m:g} m at latitude {lat:.2f} makes a box of {4 * high * wide:.4f} square degrees; "
            "0.01 is the most. Use a smaller radius and more points."
        )
    south, north = max(lat - high, -90.0), min(lat + high, 90.0)
    west, east = lon - wide, lon + wide
    if west < -180:
        return [(west + 360, south, 180.0, north), (-180.0, south, east, north)]
    if east > 180:
        return [(west, south, 180.0, north), (-180.0, south, east - 360, north)]
    return [(west, south, east, north)]


def nearest_first(offers: Iterable[Offer], lat: float, lon: float, radius_m: float) -> list[Offer]:
    """Those within the radius in metres, by distance and then by id."""
    near = sorted((float(haversine_km(lat, lon, o.lat, o.lon)), o.pano_id, o) for o in offers)
    return [offer for distance_km, _, offer in near if distance_km * 1000 <= radius_m]
