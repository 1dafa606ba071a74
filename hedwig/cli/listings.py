"""What the commands about data write beside their result: the listing, the rejected rows, the data card.

Nothing that is read may be written over, and every row that went in is counted as kept or rejected.
"""

from __future__ import annotations

import hashlib
import os
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hedwig.sources import CheckedListing

__all__ = [
    "account",
    "card_beside",
    "file_name",
    "folder_of",
    "refuse_overwriting",
    "rejection",
    "relative",
    "write_rows",
]


def account(checked: CheckedListing, num_out: int, rejected: list[dict[str, Any]], path: str | None) -> dict[str, Any]:
    """The counts of a command; the rejected rows go to `path`, and an older file there goes where there are none."""
    from hedwig import storage
    from hedwig.schema import REJECTED

    if path is not None:
        if rejected:
            write_rows(path, rejected, REJECTED.names)
        else:
            storage.delete(path)
    if checked.num_in != num_out + len(rejected):
        raise RuntimeError(f"{checked.num_in} rows went in, {num_out} came out and {len(rejected)} were rejected.")
    kept = [{name: row[name] for name in ("pano_id", "image_uri", "row", "reason")} for row in rejected]
    return {"num_in": checked.num_in, "num_out": num_out, "num_rejected": len(rejected), "rejected": kept}


def rejection(row: dict[str, Any], stage: str, reason: str) -> dict[str, Any]:
    """A row of `schema.REJECTED` without its number."""
    named = {name: row[name] for name in ("pano_id", "image_uri")}
    return {**named, "row": None, "stage": stage, "reason": reason}


def write_rows(path: str, rows: list[dict[str, Any]], columns: list[str]) -> None:
    """Write some columns of rows as CSV or, by the name's ending, as Parquet."""
    import pandas as pd
    import pyarrow as pa

    from hedwig import storage

    frame = pd.DataFrame([{name: row.get(name) for name in columns} for row in rows], columns=columns)
    if path.lower().endswith(".parquet"):
        storage.write_table(path, pa.Table.from_pandas(frame, preserve_index=False))
    else:
        storage.write_bytes(path, frame.to_csv(index=False, lineterminator="\n").encode())


def refuse_overwriting(source: str, targets: tuple[str, ...]) -> None:
    """Raise ValueError if one of the files to write is the one that is read."""
    from hedwig import storage

    for target in targets:
        same = not storage.is_remote(source) and os.path.realpath(target) == os.path.realpath(source)
        if same or target == source:
            raise ValueError(f"{target} is what is read, and would be overwritten; choose another --out.")


def card_beside(listing: str) -> str:
    """Write the data card of a listing beside it; returns the address of its page."""
    from hedwig.acquisition.card import write_card
    from hedwig.geocells import Geography

    return str(write_card(listing, geography=Geography.default())["files"]["html"])


def folder_of(path: str) -> str:
    """The folder of a path or URI."""
    return path.rsplit("/", 1)[0] if "://" in path else os.path.dirname(path)


def relative(uri: str, folder: str) -> str:
    """`uri` from `folder` on where it lies below it, so that the listing can be moved with its images."""
    return uri[len(folder) + 1 :] if folder and uri.startswith(folder + "/") else uri


def file_name(pano_id: str) -> str:
    """A name that every file system takes, without an ending; another for each id."""
    safe = re.sub(r"[^\w.-]", "_", pano_id)
    return safe if safe == pano_id else f"{safe}-{hashlib.sha256(pano_id.encode()).hexdigest()[:8]}"
