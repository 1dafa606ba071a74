"""Content that a browser keeps: bytes with a strong ETag, as they are or as gzip, and 304 for who has them already.

The tag differs between the plain and the compressed form, as RFC 9110 §8.8.3 asks of a strong one.
"""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

__all__ = ["Tagged"]


@dataclass(frozen=True)
class Tagged:
    """One content: the bytes as they are and as gzip, the media type, and the tag of them."""

    plain: bytes
    zipped: bytes
    media_type: str
    etag: str

    @classmethod
    def of(cls, plain: bytes, media_type: str) -> Tagged:
        """Compress and tag; equal bytes get an equal tag in every process."""
        etag = f'"{hashlib.sha256(plain).hexdigest()[:32]}"'
        return cls(plain, gzip.compress(plain, 6, mtime=0), media_type, etag)

    def answer(self, request: Request, cache_control: str) -> Response:
        """The whole content in the form that the request accepts, or 304 where its tag still names it."""
        zipped = _accepts_gzip(request.headers.get("accept-encoding", ""))
        headers = {"ETag": self._tag(zipped), "Vary": "Accept-Encoding", "Cache-Control": cache_control}
        if self._matches(request.headers.get("if-none-match", "")):
            return Response(status_code=304, headers=headers)
        if zipped:
            headers["Content-Encoding"] = "gzip"
        return Response(self.zipped if zipped else self.plain, headers=headers, media_type=self.media_type)

    def _tag(self, zipped: bool) -> str:
        return f'{self.etag[:-1]}-gzip"' if zipped else self.etag

    def _matches(self, header: str) -> bool:
        """Weak comparison, RFC 9110 §13.1.2, with either form of the content."""
        known = {self._tag(zipped=False), self._tag(zipped=True)}
        return header.strip() == "*" or any(part.strip().removeprefix("W/") in known for part in header.split(","))


def _accepts_gzip(header: str) -> bool:
    for part in header.lower().split(","):
        name, _, parameters = part.partition(";")
        if name.strip() in ("gzip", "*"):
            return parameters.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return False
