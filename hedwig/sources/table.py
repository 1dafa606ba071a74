"""Check a listing row by row and turn it into the panorama table; a bad row is kept with its reason, never dropped.

A row is judged alone (position, projection, address) and against the table (duplicates). Two layouts are read: one row
per panorama, or one row per heading ('bearings'), whose rows of one ``pano_id`` become one panorama. Whether the whole
table has lat and lon swapped is for `hedwig.geocells.refuse_swapped` to say, which knows where places are.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from hedwig import storage
from hedwig.schema import PANORAMAS, PROJECTIONS, REJECTED, SPLITS, suggestion
from hedwig.sources.images import read_image
from hedwig.sources.listing import KEPT, NUMBERS

__all__ = ["CheckedListing", "check_listing"]


@dataclass(frozen=True)
class CheckedListing:
    """The rows that can be used, and those that cannot with the reason; together every row of the listing.

    Attributes:
        panoramas: table of `schema.PANORAMAS`.
        rejected: table of `schema.REJECTED`.
        num_in: rows of the listing; with bearings, groups of rows plus the single rows rejected.
        num_images: image files that the panoramas refer to.
    """

    panoramas: pa.Table
    rejected: pa.Table
    num_in: int
    num_images: int

    @property
    def reasons(self) -> dict[str, int]:
        """How often each reason occurs, commonest first; the values in it are left out."""
        return dict(Counter(str(r).split(":")[0] for r in self.rejected["reason"].to_pylist()).most_common())


def check_listing(
    frame: pd.DataFrame, *, image_root: str, layout: str = "panoramas", sha256: bool = False
) -> CheckedListing:
    """Check the rows of `read_listing` and make the panorama table; splits are those of the listing or 'train'.

    Args:
        frame: the listing.
        image_root: folder that relative ``image_uri`` start from.
        layout: 'panoramas' or 'bearings'.
        sha256: read the local images of rows without a ``sha256``, and say it; one that cannot be read stays without.

    Raises:
        ValueError: the layout needs a column that is empty.
    """
    if layout == "bearings" and all(value is None for value in frame["pano_id"]):
        raise ValueError("The layout 'bearings' groups rows by pano_id, and the listing has none; add the column.")
    rows = [_Row(number, record) for number, record in enumerate(frame.to_dict("records"))]
    accepted: list[dict[str, Any]] = []
    rejected: list[dict[str, Any]] = []
    for row in rows:
        reason = row.fault()
        if reason is None:
            accepted.append(row.panorama(image_root))
        else:
            rejected.append(row.rejection(reason))
    accepted = _bearings(accepted, rejected) if layout == "bearings" else _unique(accepted, rejected)
    if sha256 and layout == "panoramas":
        _digest_local(accepted)
    for panorama in accepted:
        panorama.pop("row")
    num_images = sum(len(p["bearing_uri"] or (1,)) for p in accepted)
    return CheckedListing(
        panoramas=pa.Table.from_pylist(accepted, schema=PANORAMAS),
        rejected=pa.Table.from_pylist(rejected, schema=REJECTED),
        num_in=len(accepted) + len(rejected),
        num_images=num_images,
    )


@dataclass(frozen=True)
class _Row:
    number: int
    record: dict[Any, Any]

    def fault(self) -> str | None:
        """Why this row cannot be used, or None; the part before ':' is the reason's name, the rest its values."""
        record = self.record
        lat, lon = record["lat"], record["lon"]
        for name in NUMBERS:
            if record[f"{name}_text"] is not None and not np.isfinite(record[name]):
                return f"{name} is not a number: {record[f'{name}_text']!r}"
        if np.isfinite(lat) != np.isfinite(lon):
            return f"only one of lat and lon is given: lat={lat}, lon={lon}"
        if np.isfinite(lat) and not -90 <= lat <= 90:
            return f"lat out of range: {lat}, must lie in [-90, 90]"
        if np.isfinite(lon) and not -180 <= lon <= 180:
            return f"lon out of range: {lon}, must lie in [-180, 180]"
        if np.isfinite(record["fov_deg"]) and not 0 < record["fov_deg"] <= 360:
            return f"fov_deg out of range: {record['fov_deg']}, must lie in (0, 360]"
        if lat == 0 and lon == 0:
            return "lat and lon are both exactly 0: the mark of a lost position"
        if record["image_uri"] is None:
            return "no image_uri"
        projection = record["projection"]
        if projection is not None and projection not in PROJECTIONS:
            return f"unknown projection: {projection!r}.{suggestion(projection, PROJECTIONS)}"
        if record["split"] is not None and record["split"] not in SPLITS:
            return f"unknown split: {record['split']!r}, must be one of {', '.join(SPLITS)}"
        return None

    def rejection(self, reason: str) -> dict[str, Any]:
        record = self.record
        return {
            "pano_id": record["pano_id"],
            "image_uri": record["image_uri"],
            "row": self.number,
            "stage": "panoramas",
            "reason": reason,
        }

    def panorama(self, image_root: str) -> dict[str, Any]:
        record = self.record
        known = bool(np.isfinite(record["lat"]))
        heading, fov_deg = record["heading"], record["fov_deg"]
        return {
            **{name: record[name] for name in KEPT},
            "lat": float(record["lat"]) if known else None,
            "lon": float(record["lon"]) if known else None,
            "heading": float(heading) % 360 if np.isfinite(heading) else None,
            "fov_deg": float(fov_deg) if np.isfinite(fov_deg) else None,
            "projection": record["projection"] or "equirectangular",
            "split": (record["split"] or "train") if known else "query",
            "image_uri": storage.resolve(str(record["image_uri"]), image_root),
            "bearing_uri": None,
            "bearing_deg": None,
            "row": self.number,
        }


def _reject(panorama: dict[str, Any], reason: str) -> dict[str, Any]:
    kept = {name: panorama[name] for name in ("pano_id", "image_uri", "row")}
    return {**kept, "stage": "panoramas", "reason": reason}


def _unique(panoramas: list[dict[str, Any]], rejected: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Derive missing ids from the image's content, then keep the first of each id; the later ones are rejected."""
    kept: dict[str, dict[str, Any]] = {}
    for panorama in panoramas:
        if panorama["pano_id"] is None:
            try:
                digest = hashlib.sha256(read_image(panorama["image_uri"])).hexdigest()
                panorama["pano_id"] = digest[:22]
                panorama["sha256"] = panorama["sha256"] or digest
            except (OSError, ValueError) as error:
                rejected.append(_reject(panorama, f"unreadable image: {error}"))
                continue
        first = kept.setdefault(panorama["pano_id"], panorama)
        if first is not panorama:
            rejected.append(
                _reject(
                    panorama, f"duplicate pano_id: {panorama['pano_id']!r} is also row {first['row']}, which is kept"
                )
            )
    return list(kept.values())


def _digest_local(panoramas: list[dict[str, Any]]) -> None:
    for panorama in panoramas:
        if panorama["sha256"] is None and not storage.is_remote(panorama["image_uri"]):
            with suppress(OSError, ValueError):  # where its pixels are needed it is rejected with the reason
                panorama["sha256"] = hashlib.sha256(read_image(panorama["image_uri"])).hexdigest()


def _bearings(rows: list[dict[str, Any]], rejected: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One panorama per pano_id: its images clockwise from the smallest heading."""
    groups: dict[str, dict[float, dict[str, Any]]] = {}
    for row in rows:
        if row["pano_id"] is None:
            rejected.append(_reject(row, "no pano_id: rows of one panorama are grouped by it"))
            continue
        if row["heading"] is None:
            rejected.append(_reject(row, "no heading: rows of one panorama are ordered by it"))
            continue
        group = groups.setdefault(row["pano_id"], {})
        if row["heading"] in group:
            rejected.append(_reject(row, f"duplicate heading: {row['heading']} of pano_id {row['pano_id']!r}"))
            continue
        group[row["heading"]] = row
    panoramas = []
    for group in groups.values():
        headings = sorted(group)
        first = group[headings[0]]
        positions = {(row["lat"], row["lon"]) for row in group.values()}
        if len(positions) > 1:
            moved = f"rows of one pano_id disagree about the position: {sorted(positions, key=str)[:2]}"
            rejected.extend(_reject(row, moved) for row in group.values())
            continue
        fovs = {row["fov_deg"] for row in group.values()}
        if len(fovs) > 1:
            mixed = f"rows of one pano_id disagree about fov_deg: {sorted(fovs, key=str)[:2]}"
            rejected.extend(_reject(row, mixed) for row in group.values())
            continue
        panoramas.append(
            {
                **first,
                "sha256": first["sha256"] if len(group) == 1 else None,
                "projection": "bearings",
                "bearing_uri": [group[h]["image_uri"] for h in headings],
                "bearing_deg": headings,
                # The strip starts half a field of view before its first heading, so its centre is opposite to that.
                "heading": (headings[0] + 180.0 - 180.0 / len(headings)) % 360,
            }
        )
    return panoramas
