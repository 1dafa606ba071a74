"""What a plan will ask of a service: requests, money and time, said before anything is fetched.

An upper bound: it takes every place to have a panorama (`found_share` says otherwise). The prices below are what a list
said on the day it was read, kept with that day and the list's address; they are not the prices of today, and free
allowances and volume discounts are not counted. Where no price is known the cost is None, not zero.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["SERVICES", "Estimate", "Service", "estimate"]

REQUESTS_PER_S = 10.0  # hedwig's own politeness, far below what the services allow


@dataclass(frozen=True)
class Service:
    """How a service is asked, and what it once said it costs.

    Attributes:
        lookups_per_place: requests that find a panorama or nothing.
        lookups_per_panorama: requests for the addresses of its images.
        per_heading: a panorama is fetched as one image per heading, instead of as one image.
        usd_per_1000: listed price of 1,000 images; 0 where the documentation names no charge.
        read_at: when a price was listed; empty where there is none.
        listed_at: where to look.
    """

    lookups_per_place: int
    lookups_per_panorama: int
    per_heading: bool
    usd_per_1000: float
    read_at: str
    listed_at: str


SERVICES = {
    "streetview": Service(
        lookups_per_place=1,
        lookups_per_panorama=0,
        per_heading=True,
        usd_per_1000=7.00,
        read_at="before March 2025",
        listed_at="developers.google.com/maps/documentation/streetview/usage-and-billing",
    ),
    "mapillary": Service(
        lookups_per_place=1,
        lookups_per_panorama=1,
        per_heading=False,
        usd_per_1000=0.0,
        read_at="",
        listed_at="www.mapillary.com/developer/api-documentation",
    ),
    "panoramax": Service(
        lookups_per_place=1,
        lookups_per_panorama=1,
        per_heading=False,
        usd_per_1000=0.0,
        read_at="",
        listed_at="docs.panoramax.fr",
    ),
}


@dataclass(frozen=True)
class Estimate:
    """Requests, money and time of a plan.

    Attributes:
        source: the service.
        num_places: rows of the plan.
        num_panoramas: places taken to have one.
        num_lookups: requests that are free of charge: searches and metadata.
        num_images: requests for images.
        usd_per_1000: price taken for 1,000 images; None if unknown.
        price: where that price is from.
        cost_usd: dollars; None if unknown.
        requests_per_s: rate taken.
        time_s: seconds at that rate.
    """

    source: str
    num_places: int
    num_panoramas: int
    num_lookups: int
    num_images: int
    usd_per_1000: float | None
    price: str
    cost_usd: float | None
    requests_per_s: float
    time_s: float

    @property
    def num_requests(self) -> int:
        """All requests."""
        return self.num_lookups + self.num_images

    def record(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "num_requests": self.num_requests}

    def text(self) -> str:
        """A few lines for a terminal."""
        cost = "unknown; give --price-per-1000" if self.cost_usd is None else f"{self.cost_usd:,.2f} USD"
        return "\n".join(
            [
                f"From {self.source}, at most:",
                f"  {self.num_requests:,} requests: {self.num_lookups:,} lookups, {self.num_images:,} images "
                f"of {self.num_panoramas:,} panoramas",
                f"  cost {cost} ({self.price})",
                f"  time {_duration(self.time_s)} at {self.requests_per_s:g} requests/s",
            ]
        )


def estimate(
    num_places: int,
    source: str,
    *,
    headings: int = 8,
    price_per_1000: float | None = None,
    requests_per_s: float = REQUESTS_PER_S,
    found_share: float = 1.0,
) -> Estimate:
    """What fetching `num_places` from a service will take.

    Args:
        num_places: places of the plan.
        source: 'streetview', 'mapillary' or 'panoramax'; of any other the price is unknown.
        headings: images per panorama, where the service gives one per heading.
        price_per_1000: USD per 1,000 images, of the list of today; in place of the one kept here.
        requests_per_s: rate limit.
        found_share: share of the places that have a panorama, in [0, 1].

    Raises:
        ValueError: a number out of range.
    """
    if num_places < 0 or headings < 1 or not requests_per_s > 0 or not 0 <= found_share <= 1:
        raise ValueError(
            f"num_places={num_places} and headings={headings} must be positive, requests_per_s={requests_per_s} above "
            f"0, and found_share={found_share} between 0 and 1."
        )
    if price_per_1000 is not None and not price_per_1000 >= 0:
        raise ValueError(f"price_per_1000 must be 0 or more USD; it was {price_per_1000}.")
    known = SERVICES.get(source)
    per_place, per_panorama = (known.lookups_per_place, known.lookups_per_panorama) if known else (1, 0)
    num_panoramas = math.ceil(round(num_places * found_share, 6))
    num_images = num_panoramas * (headings if known is None or known.per_heading else 1)
    num_lookups = num_places * per_place + num_panoramas * per_panorama
    usd, price = price_per_1000, "the price given"
    if usd is None and known is not None:
        usd, price = known.usd_per_1000, f"listed {known.read_at} at {known.listed_at}; check it"
        if usd == 0:
            price = f"its documentation names no charge: {known.listed_at}"
    elif usd is None:
        price = f"no price of {source!r} is known here"
    return Estimate(
        source=source,
        num_places=num_places,
        num_panoramas=num_panoramas,
        num_lookups=num_lookups,
        num_images=num_images,
        usd_per_1000=usd,
        price=price,
        cost_usd=None if usd is None else round(num_images / 1000 * usd, 2),
        requests_per_s=requests_per_s,
        time_s=round((num_lookups + num_images) / requests_per_s, 1),
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"
