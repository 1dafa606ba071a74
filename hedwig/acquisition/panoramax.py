"""Panoramax, or any other STAC API of street pictures: 360° items around a place, then the image of each.

After the STAC item-search specification and Panoramax's own: ``GET /search`` with a ``bbox``, pages by the link
``next``, ``view:azimuth`` as the heading of the centre, the horizontal field of view in ``pers:interior_orientation``,
the licence on every item. No key is needed. Only items of 360° are offered; a collection is a sequence.
"""

from __future__ import annotations

from typing import Any

from hedwig.acquisition.offers import Asker, Offer, QuotaSpent, ask_json, box_around, nearest_first
from hedwig.web import Refused

__all__ = ["Panoramax"]

BASE_URL = "https://api.panoramax.xyz/api"
PAGE = 100


class Panoramax:
    """A STAC API of street pictures as an `ImageSource`.

    Args:
        asset: which image of an item: 'hd', 'sd' (2048 px wide) or 'thumb'.
        page: items asked for at a time.
        base_url: of the instance; the default is the federation's catalogue.
    """

    name = "panoramax"
    terms = (
        "Panoramax pictures carry an open licence each (mostly CC BY-SA 4.0 or Licence Ouverte 2.0); it is recorded "
        "per picture with its producer, whom you must credit."
    )
    paid = False

    def __init__(self, *, asset: str = "sd", page: int = PAGE, base_url: str = BASE_URL) -> None:
        if asset not in ("hd", "sd", "thumb"):
            raise ValueError(f"asset must be hd, sd or thumb, got {asset!r}.")
        self.asset, self.page, self.base_url = asset, page, base_url.rstrip("/")
        self.headers: dict[str, str] = {}
        self.secrets: tuple[str, ...] = ()
        self.digest = f"panoramax {self.base_url} asset={asset}"

    async def find(self, client: Asker, lat: float, lon: float, radius_m: float) -> list[Offer]:
        """360° pictures within the radius, nearest first."""
        items: dict[str, Any] = {}
        for box in box_around(lat, lon, radius_m):
            query = {"bbox": ",".join(f"{edge:.7f}" for edge in box), "limit": str(self.page)}
            page = await self._ask(client, f"{self.base_url}/search", query)
            items |= _by_id(page)
            while following := [link["href"] for link in page.get("links", []) if link.get("rel") == "next"]:
                page = await self._ask(client, following[0])
                items |= _by_id(page)
        offers = (offer for item in items.values() if (offer := _offer(item)) is not None)
        return nearest_first(offers, lat, lon, radius_m)

    async def _ask(self, client: Asker, url: str, query: dict[str, str] | None = None) -> dict[str, Any]:
        try:
            return await ask_json(client, url, query)
        except Refused as refusal:
            if refusal.status in (401, 403):
                raise QuotaSpent(f"{self.base_url} refuses ({refusal.status}): {refusal.body[:200]}") from None
            raise

    async def image(self, client: Asker, offer: Offer, number: int) -> bytes:
        """The picture, JPEG."""
        name = offer.pano_id.removeprefix("panoramax:")
        try:
            item = await self._ask(client, f"{self.base_url}/collections/{offer.sequence}/items/{name}")
            address = (item.get("assets") or {}).get(self.asset, {}).get("href")
            if address:
                return (await client.request("GET", str(address))).body
        except Refused as refusal:
            if refusal.status != 404:
                raise
        raise FileNotFoundError(f"{offer.pano_id} has no asset {self.asset!r} any more")


def _by_id(page: dict[str, Any]) -> dict[str, Any]:
    return {str(item["id"]): item for item in page.get("features", [])}


def _offer(item: dict[str, Any]) -> Offer | None:
    properties = item.get("properties") or {}
    view = (properties.get("pers:interior_orientation") or {}).get("field_of_view")
    if view != 360 or not item.get("geometry"):
        return None
    lon, lat = item["geometry"]["coordinates"][:2]
    azimuth = properties.get("view:azimuth")
    makers = [p["name"] for p in item.get("providers") or [] if "producer" in p.get("roles", []) and p.get("name")]
    return Offer(
        pano_id=f"panoramax:{item['id']}", lat=float(lat), lon=float(lon), source="Panoramax",
        licence=str(properties.get("license") or "unknown"),
        author=properties.get("geovisio:producer") or (makers[0] if makers else None), projection="equirectangular",
        heading=None if azimuth is None else float(azimuth) % 360, captured_at=properties.get("datetime"),
        sequence=item.get("collection"),
    )  # fmt: skip
