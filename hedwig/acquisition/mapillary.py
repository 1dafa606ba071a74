"""Mapillary's API v4: panoramas inside a small box around a place, then the image of each.

After its public documentation: ``GET /images`` with a ``bbox`` of less than 0.01 square degrees, fields named one by
one, the token in a header. A full page may hide more, so the box is then halved; ``paging.next`` is followed where it
is given. Image addresses expire, so they are asked for anew at the moment of fetching. Images are CC BY-SA 4.0.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from typing import Any

from hedwig.acquisition.offers import Asker, Box, Offer, QuotaSpent, ask_json, box_around, nearest_first
from hedwig.web import Refused

__all__ = ["Mapillary"]

BASE_URL = "https://graph.mapillary.com"
TOKEN_VARIABLE = "HEDWIG_MAPILLARY_TOKEN"  # noqa: S105
FIELDS = "id,geometry,computed_geometry,compass_angle,computed_compass_angle,captured_at,is_pano,sequence,creator"
SIZES = {2048: "thumb_2048_url", 0: "thumb_original_url"}
PAGE = 2000
SMALLEST_DEG = 1e-5  # a metre: more panoramas than a page in less are one place
LIMIT_CODES = frozenset({4, 17, 32, 613})  # of the Graph API: application, user, page and custom limits


class Mapillary:
    """Mapillary's API v4 as an `ImageSource`.

    Args:
        width_px: 2048 for the scaled image, 0 for the original.
        page: most images asked for at a time.
        base_url: another address, for tests and proxies.

    Raises:
        PermissionError: the environment holds no token.
    """

    name = "mapillary"
    terms = (
        "Mapillary images are licensed CC BY-SA 4.0: credit the contributor and Mapillary, share adapted material "
        "under the same licence. Mapillary's terms of use apply to the API. Licence and contributor are kept per image."
    )
    paid = False

    def __init__(self, *, width_px: int = 2048, page: int = PAGE, base_url: str = BASE_URL) -> None:
        if width_px not in SIZES:
            raise ValueError(f"width_px must be one of {sorted(SIZES)} (0: the original), got {width_px}.")
        token = os.environ.get(TOKEN_VARIABLE, "")
        if not token:
            raise PermissionError(f"Mapillary needs a token; set the environment variable {TOKEN_VARIABLE}.")
        self.width_px, self.page, self.base_url = width_px, page, base_url.rstrip("/")
        self.headers = {"Authorization": f"OAuth {token}"}
        self.secrets: tuple[str, ...] = (token,)
        self.digest = f"mapillary width={width_px}"

    async def find(self, client: Asker, lat: float, lon: float, radius_m: float) -> list[Offer]:
        """360° images within the radius, nearest first."""
        images: dict[str, Any] = {}
        for box in box_around(lat, lon, radius_m):
            images |= {str(image["id"]): image for image in await self._inside(client, box)}
        offers = (offer for image in images.values() if (offer := _offer(image)) is not None)
        return nearest_first(offers, lat, lon, radius_m)

    async def _inside(self, client: Asker, box: Box) -> list[dict[str, Any]]:
        query = {
            "bbox": ",".join(f"{edge:.7f}" for edge in box),
            "is_pano": "true",
            "fields": FIELDS,
            "limit": str(self.page),
        }
        page = await self._ask(client, f"{self.base_url}/images", query)
        images, paged = list(page.get("data", [])), False
        while following := (page.get("paging") or {}).get("next"):
            paged = True
            page = await self._ask(client, following)
            images += page.get("data", [])
        if len(images) >= self.page and not paged:
            halves = _halves(box)
            return [image for half in halves for image in await self._inside(client, half)] if halves else images
        return images

    async def _ask(self, client: Asker, url: str, query: dict[str, str] | None = None) -> dict[str, Any]:
        try:
            return await ask_json(client, url, query)
        except Refused as refusal:
            error = _error(refusal.body)
            if refusal.status in (401, 403) or error.get("code") in LIMIT_CODES:
                text = error.get("message", refusal.body[:200])
                raise QuotaSpent(f"Mapillary refuses ({refusal.status}): {text}") from None
            raise

    async def image(self, client: Asker, offer: Offer, number: int) -> bytes:
        """The panorama's image, JPEG."""
        field = SIZES[self.width_px]
        name = offer.pano_id.removeprefix("mapillary:")
        try:
            address = (await self._ask(client, f"{self.base_url}/{name}", {"fields": f"id,{field}"})).get(field)
            if address:
                return (await client.request("GET", str(address))).body
        except Refused as refusal:
            if refusal.status != 404:
                raise
        raise FileNotFoundError(f"{offer.pano_id} has no {field} any more")


def _halves(box: Box) -> list[Box]:
    west, south, east, north = box
    if max(east - west, north - south) < SMALLEST_DEG:
        return []
    if east - west >= north - south:
        middle = (west + east) / 2
        return [(west, south, middle, north), (middle, south, east, north)]
    middle = (south + north) / 2
    return [(west, south, east, middle), (west, middle, east, north)]


def _offer(image: dict[str, Any]) -> Offer | None:
    place = image.get("computed_geometry") or image.get("geometry")
    if image.get("is_pano") is False or not place:
        return None
    lon, lat = place["coordinates"][:2]
    computed = image.get("computed_compass_angle")
    angle = image.get("compass_angle") if computed is None else computed
    captured = image.get("captured_at")
    creator = (image.get("creator") or {}).get("username")
    return Offer(
        pano_id=f"mapillary:{image['id']}", lat=float(lat), lon=float(lon), source="Mapillary",
        licence="CC BY-SA 4.0", author=f"{creator} / Mapillary" if creator else "Mapillary",
        projection="equirectangular", heading=None if angle is None else float(angle) % 360,
        captured_at=datetime.fromtimestamp(captured / 1000, UTC).isoformat() if captured else None,
        sequence=image.get("sequence"),
    )  # fmt: skip


def _error(body: str) -> dict[str, Any]:
    try:
        found = json.loads(body).get("error", {})
    except (ValueError, AttributeError):
        return {}
    return found if isinstance(found, dict) else {}
