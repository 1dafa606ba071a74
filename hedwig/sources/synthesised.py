"""Which panoramas were made by a model and not by a camera, and that none of them is ever scored.

A made panorama says so in its ``source``, which begins with ``synthesis:`` and goes on with the model's name. Such a
row may be trained on; in an evaluation split it would measure how well one model knows another. Where a split is
decided by place or by chance, made rows fall on every side like any others, so they are taken out again afterwards.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from hedwig.schema import SPLITS, check_columns

__all__ = ["SYNTHESISED", "is_synthesised", "keep_out_of_evaluation"]

SYNTHESISED = "synthesis:"
_SCORED = ("val", "test")


def is_synthesised(source: str | None) -> bool:
    """Whether a row's ``source`` says that a model made its image."""
    return source is not None and source.startswith(SYNTHESISED)


def keep_out_of_evaluation(table: pa.Table, *, instead: str = "train") -> pa.Table:
    """The table with every made panorama out of the splits that are scored.

    Args:
        table: columns `source` and `split` of str, of which `source` may be null, and any others.
        instead: the split that made rows of 'val' and 'test' get. After a split by place this should be 'buffer':
            a made row in a held-out block is a copy of a place that is tested, and 'train' would leak it.

    Raises:
        SchemaError: a column is missing.
        ValueError: `instead` is no split, or one that is scored.
    """
    check_columns(table.column_names, ("source", "split"), where="The table to keep out of evaluation")
    if instead not in SPLITS or instead in _SCORED:
        allowed = ", ".join(name for name in SPLITS if name not in _SCORED)
        raise ValueError(f"instead is {instead!r}; choose one of {allowed}.")
    made = pc.fill_null(pc.starts_with(table["source"], SYNTHESISED), False)
    moved = pc.and_(made, pc.is_in(table["split"], pa.array(_SCORED)))
    place = table.column_names.index("split")
    split = pc.if_else(moved, pa.scalar(instead), table["split"])
    return table.set_column(place, table.schema.field("split"), split)
