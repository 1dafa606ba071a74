"""Google's Street View Static API: the free metadata request first, then one image per bearing.

After its public documentation: ``/metadata`` answers 200 whatever happens and says what it means in ``status``; images
are asked for by panorama id with ``return_error_code=true``, so that a missing one is a 404 and not a grey picture.
Requests are signed (HMAC-SHA1 over path and query) when a secret is there. Keys come from the environment. Google's
terms forbid keeping most of what is fetched; the user is shown that and decides.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
from urllib.parse import urlencode, urlsplit

from hedwig.acquisition.offers import Asker, Offer, QuotaSpent, ask_json
from hedwig.web import Refused

__all__ = ["StreetView", "signature"]

BASE_URL = "https://maps.googleapis.com/maps/api/streetview"
KEY_VARIABLE, SECRET_VARIABLE = "HEDWIG_STREETVIEW_KEY", "HEDWIG_STREETVIEW_SECRET"
LARGEST_PX = 640


class StreetView:
    """The Street View Static API as an `ImageSource`.

    Args:
        headings: how many bearings, evenly from north; the paper takes 8.
        fov_deg: horizontal field of view of an image, at most 120.
        size_px: side of an image, at most 640.
        base_url: another address, for tests and proxies.

    Raises:
        PermissionError: the environment holds no key.
        ValueError: a number the API does not take.
    """

    name = "streetview"
    terms = (
        "Google Maps Platform Terms of Service apply: images must be shown with Google's attribution, and storing them "
        "or building other data from them is restricted (see 'No Scraping', 'No Caching', 'No Creating Content'). "
        "Whether your use is allowed is for you to find out. Metadata requests are free; every image is billed."
    )
    paid = True

    def __init__(
        self, *, headings: int = 8, fov_deg: float = 90.0, size_px: int = LARGEST_PX, base_url: str = BASE_URL
    ) -> None:
        if not 1 <= headings <= 36 or not 10 <= fov_deg <= 120 or not 64 <= size_px <= LARGEST_PX:
            raise ValueError(
                f"headings={headings} must be 1..36, fov_deg={fov_deg} 10..120, size_px={size_px} 64..{LARGEST_PX}."
            )
        self._key, self._secret = os.environ.get(KEY_VARIABLE, ""), os.environ.get(SECRET_VARIABLE, "")
        if not self._key:
            raise PermissionError(f"Street View needs a key; set the environment variable {KEY_VARIABLE}.")
        self.headings, self.fov_deg, self.size_px = headings, fov_deg, size_px
        self.base_url = base_url.rstrip("/")
        self.headers: dict[str, str] = {}
        self.secrets: tuple[str, ...] = (self._key, self._secret)
        self.digest = f"streetview headings={headings} fov={fov_deg:g} size={size_px}"

    def _url(self, end: str, query: dict[str, str]) -> str:
        url = f"{self.base_url}{end}?{urlencode({**query, 'key': self._key})}"
        return f"{url}&signature={signature(url, self._secret)}" if self._secret else url

    async def find(self, client: Asker, lat: float, lon: float, radius_m: float) -> list[Offer]:
        """The nearest outdoor panorama, or nothing. Free of charge."""
        query = {"location": f"{lat:.7f},{lon:.7f}", "radius": f"{radius_m:.0f}", "source": "outdoor"}
        found = await ask_json(client, self._url("/metadata", query))
        status = found.get("status")
        if status in ("ZERO_RESULTS", "NOT_FOUND"):
            return []
        if status in ("OVER_QUERY_LIMIT", "REQUEST_DENIED"):
            raise QuotaSpent(f"Street View says {status}: {client.hide(str(found.get('error_message', '')))[:200]}")
        if status != "OK":
            raise OSError(f"Street View metadata has status {status!r} at {lat:.5f}, {lon:.5f}.")
        place, step = found["location"], 360 / self.headings
        return [
            Offer(
                pano_id=f"streetview:{found['pano_id']}", lat=float(place["lat"]), lon=float(place["lng"]),
                source="Street View Static API", licence="Google Maps Platform Terms of Service",
                author=str(found.get("copyright") or "© Google"), projection="bearings", captured_at=found.get("date"),
                bearings_deg=tuple(round(i * step, 4) for i in range(self.headings)), fov_deg=self.fov_deg,
            )
        ]  # fmt: skip

    async def image(self, client: Asker, offer: Offer, number: int) -> bytes:
        """One bearing, JPEG."""
        query = {
            "size": f"{self.size_px}x{self.size_px}",
            "pano": offer.pano_id.removeprefix("streetview:"),
            "heading": f"{offer.bearings_deg[number]:g}",
            "fov": f"{self.fov_deg:g}",
            "pitch": "0",
            "return_error_code": "true",
        }
        try:
            return (await client.request("GET", self._url("", query))).body
        except Refused as refusal:
            if refusal.status == 403:
                raise QuotaSpent(f"Street View gives no more images (403): {refusal.body[:200]}") from None
            if refusal.status == 404:
                raise FileNotFoundError(f"{offer.pano_id} has no image any more (404)") from None
            raise


def signature(url: str, secret: str) -> str:
    """The URL's signature: HMAC-SHA1 over path and query by the URL-safe base64 secret, again URL-safe base64."""
    parts = urlsplit(url)
    digest = hmac.new(base64.urlsafe_b64decode(secret), f"{parts.path}?{parts.query}".encode(), hashlib.sha1)
    return base64.urlsafe_b64encode(digest.digest()).decode()
