"""Ask a running service where an image was taken, with the standard library alone.

Locating changes nothing, so a request that failed on the way is sent again: Serve does not do it when a replica dies
(measured elsewhere: 40 failures of 3,525 under kills without retries, none of 3,493 with three).
"""

from __future__ import annotations

import http.client
import json
import math
import time
import urllib.error
import urllib.parse
import urllib.request

from hedwig.serving.messages import LocateAnswer

__all__ = ["locate_remote"]

_MEDIA_TYPES = ((b"\xff\xd8\xff", "image/jpeg"), (b"\x89PNG", "image/png"), (b"RIFF", "image/webp"))
_RETRIED = frozenset({429, 500, 502, 503, 504})


def locate_remote(
    url: str,
    data: bytes,
    *,
    top_k: int = 5,
    heading: float = math.nan,
    timeout_s: float = 60.0,
    num_retries: int = 3,
) -> LocateAnswer:
    """Send one encoded image to ``{url}/v1/locate``.

    Args:
        url: Base address, as `hedwig.serving.start` returned it.
        data: The whole JPEG, PNG or WebP file.
        top_k: How many geocells and neighbours to ask for.
        heading: Degrees of the centre column; NaN when not known.
        timeout_s: For each attempt.
        num_retries: Further attempts after an overload, a lost replica or a lost connection.

    Returns:
        The answer.

    Raises:
        ValueError: the service refused the image or a parameter; the message is its own.
        ConnectionError: no useful answer after all attempts.
    """
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(f"url is {url!r}; it must begin with http:// or https://.")
    query = {"top_k": str(top_k)} | ({} if math.isnan(heading) else {"heading": repr(float(heading))})
    media_type = next((name for magic, name in _MEDIA_TYPES if data.startswith(magic)), "application/octet-stream")
    request = urllib.request.Request(  # noqa: S310 - the scheme is checked above
        f"{url.rstrip('/')}/v1/locate?{urllib.parse.urlencode(query)}",
        data=data,
        headers={"Content-Type": media_type, "Accept": "application/json"},
        method="POST",
    )
    opener = _opener(url)
    seen = ""
    for attempt in range(num_retries + 1):
        wait_s = 0.05 * 2**attempt
        try:
            with opener.open(request, timeout=timeout_s) as response:
                return LocateAnswer.model_validate_json(response.read())
        except urllib.error.HTTPError as error:
            seen = _text(error)
            if error.code not in _RETRIED:
                raise ValueError(f"{url} refused the image ({error.code}): {seen}") from None
            retry_after = error.headers.get("Retry-After", "")
            wait_s = min(float(retry_after), 10.0) if retry_after.isdecimal() else wait_s
        except (OSError, http.client.HTTPException) as error:
            seen = f"{type(error).__name__}: {error}"
        if attempt < num_retries:
            time.sleep(wait_s)
    raise ConnectionError(f"{url} gave no answer in {num_retries + 1} attempts; the last said: {seen}")


def _opener(url: str) -> urllib.request.OpenerDirector:
    # A proxy from the environment would be asked for its own loopback.
    local = urllib.parse.urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
    return urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if local else []))


def _text(error: urllib.error.HTTPError) -> str:
    body = error.read(4096).decode(errors="replace")
    try:
        detail = json.loads(body)["error"]
        return f"{detail['message']} {detail['next']}"
    except (ValueError, KeyError, TypeError):
        return body[:200]
