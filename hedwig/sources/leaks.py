"""What training and held-out panoramas share: ids, sequences, places and pictures; measured, not repaired.

A test panorama 20 m from a training panorama asks whether a street is recognised, not where on Earth a place is, and
a split by row ("random") makes most test panoramas such ones: published systems lost a factor of two to five in median
error between such a split and new places. Positions are compared by a KD-tree on the sphere, pictures by the hashes of
`hedwig.panorama.duplicates`, so a million rows take seconds. `hedwig.sources.spatial_split` is the remedy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

from hedwig.geo import chord_to_km, unit_vectors
from hedwig.panorama.duplicates import near_duplicates
from hedwig.schema import check_columns

__all__ = ["leak_report"]

NEAR_KM = 0.1
HELD_OUT = ("val", "test")
NUM_EXAMPLES = 5
_NEEDED = ("pano_id", "lat", "lon", "split")


def leak_report(
    table: pa.Table | pd.DataFrame,
    hashes: ArrayLike | None = None,
    *,
    method: str | None = None,
    near_km: float = NEAR_KM,
    max_bits: int = 8,
) -> dict[str, Any]:
    """What the rows of 'val' and 'test' share with those of 'train'.

    Args:
        table: (N,) rows with ``pano_id, lat, lon, split`` and, where known, ``sequence``.
        hashes: (N,) uint64 of `hedwig.panorama.roll_hash` or `perceptual_hash`, row for row; 0 where there is no
            picture. None leaves the pictures out.
        method: how the split was made: 'spatial', 'random' or 'column'; 'random' is warned of.
        near_km: nearer than this to a training panorama counts.
        max_bits: pictures that differ in at most so many bits count.

    Returns:
        ``num_train``, ``num_held_out``; ``same_id``, ``same_sequence``, ``near`` (with ``near_km``, and ``min_km``,
        the smallest distance, None without positions) and ``same_picture`` (None without hashes), each
        {"num_held_out": rows concerned, "share": of the held-out rows, "examples": [[held-out id, training id, what],
        ...]}, of which ``what`` is the sequence, the km or the bits; ``num_leaking`` (held-out rows with any of them),
        ``share_leaking``; ``clean`` and ``sentence``. Plain values, ready for JSON.

    Raises:
        SchemaError: a column is missing.
        ValueError: hashes of another length or type.
    """
    names_there = table.column_names if isinstance(table, pa.Table) else [str(name) for name in table.columns]
    check_columns(names_there, _NEEDED, where="The table to look for leaks in")
    columns = [name for name in (*_NEEDED, "sequence") if name in names_there]
    frame = table.select(columns).to_pandas() if isinstance(table, pa.Table) else table[columns]
    split = frame["split"].to_numpy(dtype=object)
    train, held = np.flatnonzero(split == "train"), np.flatnonzero(np.isin(split, HELD_OUT))
    names = frame["pano_id"].to_numpy(dtype=object)
    found: dict[str, Any] = {"num_train": len(train), "num_held_out": len(held)}
    partners: dict[str, Mapping[int, tuple[int, Any]]] = {
        "same_id": _same_value(names, train, held),
        "same_sequence": {},
        "near": {},
    }
    if "sequence" in frame:
        partners["same_sequence"] = _same_value(frame["sequence"].to_numpy(dtype=object), train, held)
    partners["near"], min_km = _near(frame, train, held, near_km)
    if hashes is not None:
        partners["same_picture"] = _same_picture(hashes, len(frame), train, held, max_bits)
    for kind, pairs in partners.items():
        found[kind] = {
            "num_held_out": len(pairs),
            "share": len(pairs) / len(held) if len(held) else 0.0,
            "examples": [[str(names[a]), str(names[b]), what] for a, (b, what) in sorted(pairs.items())[:NUM_EXAMPLES]],
        }
    found["near"] |= {"near_km": near_km, "min_km": min_km}
    found.setdefault("same_picture", None)
    leaking = set().union(*partners.values())
    found["num_leaking"] = len(leaking)
    found["share_leaking"] = len(leaking) / len(held) if len(held) else 0.0
    found["clean"] = not leaking and method != "random"
    found["sentence"] = _sentence(found, method)
    return found


def _same_value(values: NDArray[Any], train: NDArray[Any], held: NDArray[Any]) -> dict[int, tuple[int, Any]]:
    """Held-out row -> (first training row with the same value, the value); None and NaN equal nothing."""
    series = pd.Series(values)
    known = series.notna().to_numpy()
    train, held = train[known[train]], held[known[held]]
    first = pd.Series(train, index=values[train])
    first = first[~first.index.duplicated()]
    partner = first.reindex(values[held])
    there = partner.notna().to_numpy()
    return {
        int(row): (int(other), str(values[row]))
        for row, other in zip(held[there], partner.to_numpy()[there], strict=True)
    }


def _near(
    frame: pd.DataFrame, train: NDArray[Any], held: NDArray[Any], near_km: float
) -> tuple[dict[int, tuple[int, Any]], float | None]:
    lat, lon = frame["lat"].to_numpy(np.float64), frame["lon"].to_numpy(np.float64)
    located = np.isfinite(lat) & np.isfinite(lon)
    train, held = train[located[train]], held[located[held]]
    if len(train) == 0 or len(held) == 0:
        return {}, None
    chord, row = cKDTree(unit_vectors(lat[train], lon[train])).query(unit_vectors(lat[held], lon[held]))
    km = chord_to_km(chord)
    near = np.flatnonzero(km < near_km)
    pairs = {int(held[i]): (int(train[row[i]]), round(float(km[i]), 6)) for i in near}
    return pairs, float(km.min())


def _same_picture(
    hashes: ArrayLike, num_rows: int, train: NDArray[Any], held: NDArray[Any], max_bits: int
) -> dict[int, tuple[int, Any]]:
    bits = np.asarray(hashes)
    if bits.shape != (num_rows,) or bits.dtype != np.uint64:
        raise ValueError(f"hashes must be one uint64 per row: got {bits.dtype} {bits.shape} for {num_rows} rows.")
    # Equal hashes are paired with the first of them only, so each value is looked at once per side.
    sides = []
    for rows in (train, held):
        rows = rows[bits[rows] != 0]
        sides.append((rows, *np.unique(bits[rows], return_index=True, return_inverse=True)))
    (train, values, first, _), (held, own, _, member) = sides
    if len(train) == 0 or len(held) == 0:
        return {}
    nearest: dict[int, tuple[int, int]] = {}  # distinct held-out value -> (bits, training row)
    place = np.searchsorted(values, own)
    equal = values[np.minimum(place, len(values) - 1)] == own
    for i in np.flatnonzero(equal).tolist():
        nearest[i] = (0, int(train[first[place[i]]]))
    pairs, distance = near_duplicates(np.concatenate([values, own[~equal]]), max_bits)
    others = np.flatnonzero(~equal)
    for (a, b), d in zip(pairs.tolist(), distance.tolist(), strict=True):
        if a < len(values) <= b:
            place_of, candidate = int(others[b - len(values)]), (int(d), int(train[first[a]]))
            nearest[place_of] = min(nearest.get(place_of, candidate), candidate)
    return {
        int(row): (nearest[int(i)][1], nearest[int(i)][0])
        for row, i in zip(held, member, strict=True)
        if int(i) in nearest
    }


def _sentence(found: Mapping[str, Any], method: str | None) -> str:
    num, near_km = found["num_held_out"], found["near"]["near_km"]
    if num == 0 or found["num_train"] == 0:
        text = "There is no held-out split to compare with the training panoramas."
    elif found["num_leaking"] == 0:
        apart = found["near"]["min_km"]
        text = f"No leak found: none of {num:,} held-out panoramas shares an id or a sequence with training"
        text += "" if apart is None else f", and the nearest two are {apart:.3g} km apart"
        text += "." if found["same_picture"] is None else ", and no picture is one of training's."
    else:
        words = {
            "near": f"{{}} lie within {1000 * near_km:.0f} m of a training panorama",
            "same_sequence": "{} belong to a sequence that is trained on",
            "same_picture": "{} show the same picture as a training panorama",
            "same_id": "{} have the id of a training panorama",
        }
        parts = [
            text.format(f"{found[kind]['num_held_out']:,}")
            for kind, text in words.items()
            if found[kind] is not None and found[kind]["num_held_out"]
        ]
        share = f"{100 * found['share_leaking']:.1f} %"
        text = (
            f"LEAK: {found['num_leaking']:,} of {num:,} held-out panoramas ({share}) are known from training: "
            f"{'; '.join(parts)}. Scores on them say how well streets are recognised, not places."
        )
    if method == "random":
        text += (
            " WARNING: the split is random by row, so neighbours fall on both sides and scores are too good; "
            "use data.split.method=spatial for numbers that hold elsewhere."
        )
    return text
