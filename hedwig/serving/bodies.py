"""Request bodies to what they ask: images as they are or in JSON, embeddings in JSON or as plain float32 numbers.

JSON is parsed by pydantic's own parser, which is bounded in depth and knows no NaN, after the bytes of the body have
been counted; what does not fit the model is refused with the place of the fault and never with the value, which may be
an image. Large bodies are parsed in a thread, for the loop to stay free.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from fastapi.exceptions import RequestValidationError
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from hedwig.serving.limits import IMAGE_TYPES, check_type, read_body, refusal
from hedwig.serving.messages import BatchBody, PlaceBody

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.requests import Request

    from hedwig.serving.limits import Limits

__all__ = ["FLOATS_TYPE", "JSON_TYPE", "Asked", "Place", "read_batch", "read_embeddings", "read_place", "read_query"]

JSON_TYPE = "application/json"
FLOATS_TYPE = "application/octet-stream"
_THREAD_BYTES = 64 * 1024
_FIELDS = {"embedding", "embeddings", "text_embedding", "text_embeddings", "frame_embeddings", "cells"}

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Place:
    """One place as it was sent.

    Attributes:
        photographs: The files.
        several: Whether they are photographs in several directions, and not one panorama.
        heading: Degrees of the panorama's centre column; NaN when not known.
        headings_deg: Of several: the heading of each; None for evenly spaced.
    """

    photographs: tuple[bytes, ...]
    several: bool = False
    heading: float = math.nan
    headings_deg: tuple[float, ...] | None = None


@dataclass(frozen=True, eq=False)
class Asked:
    """Embeddings as they were sent.

    Attributes:
        image: (B, D).
        text: (B, Dt), or None.
        frames: (B, V·D), or None.
        cells: (B, K) int64, or None.
    """

    image: Floats
    text: Floats | None = None
    frames: Floats | None = None
    cells: NDArray[np.int64] | None = None


def read_query(request: Request, model: type[M]) -> M:
    """The parameters in the address, as FastAPI would read them; of one that is given twice the last counts.

    Raises:
        RequestValidationError: as FastAPI's.
    """
    try:
        return model.model_validate(dict(request.query_params))
    except ValidationError as error:
        found = [{**one, "loc": ("query", *one["loc"])} for one in error.errors(include_url=False)]
        raise RequestValidationError(found) from None


async def read_place(request: Request, limits: Limits, heading: float | None, *, json: bool = True) -> Place:
    """The place in the body: an image file, or JSON.

    Raises:
        HTTPException: as in `read_body`; 400 `bad_body`, 415 for another type.
    """
    accepted = (*IMAGE_TYPES, JSON_TYPE) if json else IMAGE_TYPES
    media_type = check_type(request.headers.get("content-type"), accepted)
    data = await read_body(request, limits.max_body_bytes, limits.body_timeout_s)
    if media_type != JSON_TYPE:
        return Place((data,), heading=math.nan if heading is None else heading)
    if heading is not None:
        raise refusal("bad_parameter", "Query parameter 'heading' goes with an image; in JSON it is part of the body.")
    return await _aside(data, lambda: _place(_parsed(data, PlaceBody), limits, ""))


async def read_batch(request: Request, limits: Limits) -> list[Place]:
    """The places in a batch's body.

    Raises:
        HTTPException: as in `read_place`.
    """
    check_type(request.headers.get("content-type"), (JSON_TYPE,))
    data = await read_body(request, limits.max_body_bytes, limits.body_timeout_s)

    def parse() -> list[Place]:
        items = _parsed(data, BatchBody).items
        if len(items) > limits.max_batch:
            raise refusal("bad_body", f"There are {len(items)} items; at most {limits.max_batch} are accepted.")
        return [_place(item, limits, f"items[{i}].") for i, item in enumerate(items)]

    return await _aside(data, parse)


async def read_embeddings(request: Request, limits: Limits, dim: int) -> Asked:
    """The embeddings in the body: JSON, or float32 numbers in little-endian order, row after row.

    Raises:
        HTTPException: as in `read_place`.
    """
    media_type = check_type(request.headers.get("content-type"), (JSON_TYPE, FLOATS_TYPE))
    data = await read_body(request, limits.max_body_bytes, limits.body_timeout_s)
    if media_type == FLOATS_TYPE:
        return _checked(Asked(_from_bytes(data, dim, "The body")), limits, dim)
    return await _aside(data, lambda: _checked(_embeddings(data, dim), limits, dim))


async def _aside(data: bytes, parse: Callable[[], T]) -> T:
    return parse() if len(data) <= _THREAD_BYTES else await asyncio.to_thread(parse)


def _parsed(data: bytes, model: type[M]) -> M:
    try:
        return model.model_validate(from_json(data, allow_inf_nan=False), strict=False)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        where = ".".join(str(part)[:40] for part in first["loc"]) or "the body"
        raise refusal("bad_body", f"{where[:200]}: {first['msg'][:200]}.") from None
    except ValueError as error:
        raise refusal("bad_body", f"The body is not JSON: {str(error)[:200]}.") from None


def _place(body: PlaceBody, limits: Limits, where: str) -> Place:
    if (body.image is None) == (body.images is None):
        raise refusal("bad_body", f"{where}image or {where}images is needed, and not both.")
    if body.image is not None:
        if body.headings_deg is not None:
            raise refusal("bad_body", f"{where}headings_deg goes with images; of one image it is heading.")
        heading = math.nan if body.heading is None else body.heading
        return Place((_decoded(body.image, f"{where}image"),), heading=heading)
    images, headings = body.images or [], body.headings_deg
    if body.heading is not None or len(images) > limits.max_batch or len(headings or images) != len(images):
        raise refusal(
            "bad_body",
            f"{where}images has {len(images)} entries; at most {limits.max_batch} are accepted, with as many "
            "headings_deg or none, and without heading.",
        )
    photographs = tuple(_decoded(image, f"{where}images[{i}]") for i, image in enumerate(images))
    return Place(photographs, several=True, headings_deg=None if headings is None else tuple(headings))


def _decoded(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise refusal("bad_body", f"{where} is not base64.") from None


def _embeddings(data: bytes, dim: int) -> Asked:
    """By hand: a model of a list of floats takes longer to check than the search takes."""
    try:
        body = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise refusal("bad_body", f"The body is not JSON: {str(error)[:200]}.") from None
    if not isinstance(body, dict) or not body.keys() <= _FIELDS:
        unknown = sorted(str(key)[:40] for key in set(body) - _FIELDS) if isinstance(body, dict) else []
        raise refusal("bad_body", f"The body must be an object of {sorted(_FIELDS)}; unknown are {unknown[:5]}.")
    one = body.get("embedding") is not None
    if one == (body.get("embeddings") is not None):
        raise refusal("bad_body", "embedding or embeddings is needed, and not both.")
    end = "" if one else "s"
    if body.get(f"text_embedding{'s' if one else ''}") is not None:
        raise refusal("bad_body", f"embedding{end} goes with text_embedding{end}.")
    image = _rows(body[f"embedding{end}"], one, dim, f"embedding{end}")
    text, frames, cells = body.get(f"text_embedding{end}"), body.get("frame_embeddings"), body.get("cells")
    return Asked(
        image,
        None if text is None else _rows(text, one, None, f"text_embedding{end}"),
        None if frames is None else _array([frames] if one else frames, np.float32, 3, "frame_embeddings"),
        None if cells is None else _array([cells] if one else cells, np.int64, 2, "cells"),
    )


def _rows(value: Any, one: bool, dim: int | None, name: str) -> Floats:
    if isinstance(value, str) and not one and dim is not None:
        return _from_bytes(_decoded(value, name), dim, name)
    if isinstance(value, str) and not one:
        raise refusal("bad_body", f"{name} must be a list of lists; only embeddings may be base64.")
    return _array([value] if one else value, np.float32, 2, name)


def _array(value: Any, dtype: type, ndim: int, name: str) -> NDArray[Any]:
    kinds = "iu" if dtype is np.int64 else "iuf"
    try:
        found = np.array(value)
        if found.ndim != ndim or found.dtype.kind not in kinds:
            raise ValueError
        with np.errstate(over="ignore"):  # what becomes infinite is refused later
            return found.astype(dtype)
    except ValueError:
        raise refusal(
            "bad_body", f"{name} must be numbers in lists of equal length, {ndim} deep with its rows."
        ) from None


def _from_bytes(data: bytes, dim: int, name: str) -> Floats:
    if dim < 1 or len(data) == 0 or len(data) % (4 * dim):
        raise refusal(
            "bad_body", f"{name} has {len(data):,} bytes; it must be rows of {dim} float32 = {4 * dim} bytes."
        )
    return np.frombuffer(data, dtype="<f4").reshape(-1, dim)


def _checked(asked: Asked, limits: Limits, dim: int) -> Asked:
    num_rows, width = asked.image.shape
    if num_rows > limits.max_vectors:
        raise refusal("bad_body", f"There are {num_rows} embeddings; at most {limits.max_vectors} are accepted.")
    if width != dim or num_rows == 0:
        raise refusal("bad_body", f"The embeddings are {num_rows} of {width} numbers; this run's have {dim}.")
    for name in ("image", "text", "frames", "cells"):
        column = getattr(asked, name)
        if column is not None and (len(column) != num_rows or not np.isfinite(column).all()):
            raise refusal("bad_body", f"{name}: {len(column)} rows of finite numbers, where {num_rows} are needed.")
    if asked.frames is not None:
        flat = asked.frames.reshape(num_rows, -1)
        return Asked(asked.image, asked.text, flat, asked.cells)
    return asked
