"""The audit as middleware: every answer of the API gets a request id, and leaves its line before it leaves itself.

The routes say with `note` which images they were asked about and what they answered; a refusal that came before any of
that gets a line of its own. Where the line cannot be written the answer is not sent: a log that may have holes proves
nothing. Probes, metrics and the page are not logged.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request

from hedwig.serving.access import caller_of
from hedwig.serving.audit import AuditLog

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Audited", "note"]

_NOTES = "hedwig.audit"
_LOGGED = "/v1/"


def note(
    request: Request,
    images: Sequence[Sequence[bytes]],
    answers: Sequence[Mapping[str, Any] | HTTPException],
    precision_km: float | None = None,
) -> None:
    """Say what a request was about; does nothing where nobody keeps an audit log.

    Args:
        request: The one that is being answered.
        images: The photographs of each place.
        answers: What was found for each, or why nothing was.
        precision_km: The floor of the answers; 0 and None for none.
    """
    notes = request.scope.get(_NOTES)
    if notes is None:
        return
    for photographs, answer in zip(images, answers, strict=True):
        failed = {"status": answer.status_code} if isinstance(answer, HTTPException) else {}
        cells: Sequence[int] = () if isinstance(answer, HTTPException) else answer.get("cell_ids", ())
        digests = [hashlib.sha256(data).digest() for data in photographs]
        one = digests[0] if len(digests) == 1 else hashlib.sha256(b"".join(digests)).digest()
        notes.append(
            {
                "image_sha256": one.hex(),
                "cell_id": int(cells[0]) if len(cells) else None,
                "precision_km": precision_km or None,
                **failed,
            }
        )


class Audited:
    """ASGI middleware: write the lines of a request when its answer starts.

    Args:
        app: The application inside, with `hedwig.serving.access.Access` in it.
        log: Where to.
    """

    def __init__(self, app: ASGIApp, log: AuditLog) -> None:
        self._app, self._log = app, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or not scope["path"].startswith(_LOGGED):
            await self._app(scope, receive, send)
            return
        request_id = secrets.token_hex(8)
        notes: list[dict[str, Any]] = []
        scope[_NOTES] = notes

        async def logged(message: Message) -> None:
            if message["type"] == "http.response.start":
                about = {
                    "status": message["status"],
                    "route": str(getattr(scope.get("route"), "path", "other")),
                    "request_id": request_id,
                    "key_id": caller_of(Request(scope)).key_id,
                }
                for each in notes or [{}]:
                    self._log.write(**{**about, **each})
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        await self._app(scope, receive, logged)
