"""The tables on disk: their columns, types and versions, and the check that a table is what it says.

Shape letters used in every docstring of this package: B batch, V frames, H W pixels, S frame side in pixels,
D embedding, C cells, K candidate cells, M neighbours, N rows. Tables are joined by ``pano_id``, never by row order.

``heading`` is in degrees clockwise from true north and belongs to the image's *centre column*, which is what
Street View and Mapillary mean by it. Rows without a position (``lat``/``lon`` null) are queries: they are embedded
and located, and never trained on or scored.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import pyarrow as pa

__all__ = [
    "PANORAMAS",
    "PREDICTIONS",
    "PROJECTIONS",
    "REJECTED",
    "SCHEMA_VERSION",
    "SPLITS",
    "VECTOR_DTYPES",
    "SchemaError",
    "captions_schema",
    "check_columns",
    "embeddings_schema",
    "suggestion",
    "vector_field",
]

SCHEMA_VERSION = 3  # 3: vectors are fixed-size binary; 2: lists
SPLITS = ("train", "val", "test", "buffer", "query")
PROJECTIONS = ("equirectangular", "perspective", "frame strip", "bearings")
VECTOR_DTYPES = {"float16": 2, "float32": 4}  # bytes of one component


class SchemaError(ValueError):
    """A table lacks a column, or holds one of another type than its schema says."""


PANORAMAS = pa.schema(
    [
        pa.field("pano_id", pa.string(), nullable=False),
        pa.field("lat", pa.float64()),
        pa.field("lon", pa.float64()),
        pa.field("heading", pa.float64()),
        pa.field("projection", pa.string(), nullable=False),
        pa.field("captured_at", pa.string()),
        pa.field("country", pa.string()),
        pa.field("sequence", pa.string()),
        pa.field("split", pa.string(), nullable=False),
        pa.field("image_uri", pa.string(), nullable=False),
        pa.field("source", pa.string()),
        pa.field("licence", pa.string()),
        pa.field("author", pa.string()),
        pa.field("sha256", pa.string()),  # of the image file; null where unknown, or where it came in several
        pa.field("made_from", pa.string()),  # the pano_id whose caption or view asked for a made panorama
        pa.field("fov_deg", pa.float64()),  # horizontal, of each photograph; null for a whole sphere or unknown
        # One panorama that arrived as several images, one per heading: all of them, clockwise from the smallest.
        pa.field("bearing_uri", pa.list_(pa.string())),
        pa.field("bearing_deg", pa.list_(pa.float64())),
    ]
)

REJECTED = pa.schema(
    [
        pa.field("pano_id", pa.string()),
        pa.field("image_uri", pa.string()),
        pa.field("row", pa.int64()),  # position in the listing, from 0; null where the row has no listing
        pa.field("stage", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
    ]
)

PREDICTIONS = pa.schema(
    [
        pa.field("pano_id", pa.string(), nullable=False),
        pa.field("lat", pa.float64(), nullable=False),
        pa.field("lon", pa.float64(), nullable=False),
        pa.field("cell_ids", pa.list_(pa.int32())),
        pa.field("cell_probs", pa.list_(pa.float32())),
        pa.field("neighbour_ids", pa.list_(pa.string())),
        pa.field("neighbour_scores", pa.list_(pa.float32())),
        pa.field("radius_km", pa.float64()),
        pa.field("confidence", pa.float64()),
        pa.field("radius_50_km", pa.float64()),  # null where it was not calibrated
        pa.field("localisable", pa.bool_()),  # false: less confident than retrieve.abstain_below
    ]
)


def captions_schema(*, asked: bool = False) -> pa.Schema:
    """The panorama columns, the caption and its length in tokens of CLIP's tokenizer, which is ViCLIP's too.

    Captions that a model was asked for also have ``caption_detail`` (the first of two steps, else empty),
    ``caption_model``, the tokens that the model read and wrote, ``caption_leaks``, place names joined by "; ",
    ``caption_trimmed``, whether its end was cut off for the budget, and ``content_hash`` of the image.
    """
    schema = PANORAMAS.append(pa.field("caption", pa.string())).append(pa.field("caption_num_tokens", pa.int32()))
    if asked:
        for name in ("content_hash", "caption_detail", "caption_model", "caption_leaks"):
            schema = schema.append(pa.field(name, pa.string()))
        for name in ("caption_prompt_tokens", "caption_completion_tokens"):
            schema = schema.append(pa.field(name, pa.int32()))
        schema = schema.append(pa.field("caption_trimmed", pa.bool_()))
    return schema


def vector_field(name: str, dim: int, dtype: str = "float32") -> pa.Field:
    """A column of vectors of D = `dim` components: their bytes, and in the field's metadata how to read them.

    What is in such a column is written and read by `hedwig.vectors`.
    """
    return pa.field(name, pa.binary(VECTOR_DTYPES[dtype] * dim), metadata={"dtype": dtype, "dim": str(dim)})


def embeddings_schema(image_dim: int, text_dim: int, num_frames: int = 0) -> pa.Schema:
    """The caption columns, the content hash, and one unit-norm float32 vector per modality (`vector_field`).

    ``caption_truncated`` says whether the text encoder saw less than the whole caption. ``image_embedding`` is the
    panorama's one vector, whatever the fusion. With `num_frames` there is also ``frame_embeddings``, V x D
    float32: the unit vectors of the V frames one after the other (row-major), for the fusions that put off the
    choice between frames (max_sim, attention).

    Args:
        image_dim: D of images.
        text_dim: D of captions; 1 for an encoder without a text tower, whose text embedding is one zero.
        num_frames: V when the vector of each frame is kept, 0 when it is not.
    """
    schema = captions_schema().append(pa.field("content_hash", pa.string()))
    schema = schema.append(pa.field("caption_truncated", pa.bool_()))
    schema = schema.append(vector_field("image_embedding", image_dim))
    schema = schema.append(vector_field("text_embedding", text_dim))
    if num_frames:
        schema = schema.append(vector_field("frame_embeddings", num_frames * image_dim))
    return schema


def suggestion(word: str, known: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` when one of `known` is close to `word`, else an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def check_columns(present: Iterable[str], needed: Iterable[str], *, where: str) -> None:
    """Raise SchemaError naming what `where` lacks and what is there instead."""
    have = list(present)
    missing = [name for name in needed if name not in have]
    if missing:
        hints = "".join(suggestion(name, have) for name in missing[:1])
        raise SchemaError(f"{where} lacks the column(s) {', '.join(missing)}; it has {', '.join(have)}.{hints}")
