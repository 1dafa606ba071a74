"""How good is a partition, before anything is trained on it: sizes, areas, borders, and the error that it leaves.

The oracle error is the distance from each panorama to the mean of its own cell: what a classifier that is never wrong
would still be off by. It falls with the number of cells, so compare partitions of about as many. Border purity is the
share of panoramas whose cell carries the name of their own country. Balance is exp(entropy of the sizes) / C: 1 when
all cells are equally full, 1/C when one holds everything (Hill 1973: the effective number, as a share).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import shapely
from numpy.typing import ArrayLike, NDArray

from hedwig.geo import EARTH_RADIUS_KM, haversine_km
from hedwig.geocells.cells import TOLERANCE_DEG, Geocells
from hedwig.geocells.geography import AdminTable
from hedwig.geocells.quadtree import PublishedQuadtree

__all__ = ["area_km2", "measure", "measure_published"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

OVERLAP_DEG2 = 1e-9  # cells that share less than this many square degrees touch


def measure(cells: Geocells, lat: ArrayLike, lon: ArrayLike, admin: AdminTable) -> dict[str, Any]:
    """What `hedwig geocells` reports of cells and the points (N,) in degrees they were built from.

    Args:
        cells: the partition.
        lat: degrees (N,).
        lon: degrees (N,).
        admin: hierarchy of the N points.

    Returns:
        num_cells, num_points, min_size, median_size, max_size, balance, uncovered (points outside the polygon of their
        cell), overlaps (pairs of cells whose polygons share an area), oracle_median_km, oracle_mean_km,
        oracle_p90_km, border_purity, num_countries, median_area_km2, max_area_km2, num_off_polygon and
        max_off_polygon_km (points off every country polygon, and how far at most).
    """
    lats, lons = np.asarray(lat, dtype=np.float64), np.asarray(lon, dtype=np.float64)
    polygons = cells.table.geometry.to_numpy()
    owner = cells.assign(lats, lons).astype(np.int64)
    centre = cells.table[["lat", "lon"]].to_numpy()
    points = shapely.points(np.where(np.abs(lons) <= 180, lons, (lons + 180) % 360 - 180), lats)
    shapely.prepare(polygons)
    off = np.flatnonzero(~shapely.covers(polygons[owner], points))
    uncovered = int((shapely.distance(polygons[owner[off]], points[off]) > TOLERANCE_DEG).sum())
    return {
        **_sizes(owner, len(cells)),
        "uncovered": uncovered,
        "overlaps": _num_overlaps(polygons),
        **_errors(lats, lons, centre[owner]),
        **_borders(owner, admin, len(cells)),
        **_areas(area_km2(polygons)),
        "num_off_polygon": int((admin.off_polygon_km > 0).sum()),
        "max_off_polygon_km": round(float(admin.off_polygon_km.max(initial=0.0)), 3),
    }


def measure_published(cells: PublishedQuadtree, lat: ArrayLike, lon: ArrayLike, admin: AdminTable) -> dict[str, Any]:
    """The same of OSV-5M's boxes: cells without one of the (N,) points do not count.

    Points in the gaps between boxes are `uncovered`; their error is that to the nearest mean of a box.
    """
    lats, lons = np.asarray(lat, dtype=np.float64), np.asarray(lon, dtype=np.float64)
    box = cells.assign(lats, lons)
    gap = np.flatnonzero(box < 0)
    for rows in np.array_split(gap, len(gap) // 2000 + 1):
        km = haversine_km(lats[rows, None], lons[rows, None], cells.lat, cells.lon)
        box[rows] = km.argmin(axis=1) if len(rows) else 0
    used, owner = np.unique(box, return_inverse=True)
    owner = owner.reshape(-1).astype(np.int64)
    south, west, north, east = cells.box[used].T
    shapes = shapely.box(west, south, east, north)
    centre = np.stack([cells.lat[used], cells.lon[used]], axis=1)
    return {
        **_sizes(owner, len(used)),
        "uncovered": len(gap),
        "overlaps": _num_overlaps(shapes),
        **_errors(lats, lons, centre[owner]),
        **_borders(owner, admin, len(used)),
        **_areas(area_km2(shapes)),
        "num_off_polygon": int((admin.off_polygon_km > 0).sum()),
        "max_off_polygon_km": round(float(admin.off_polygon_km.max(initial=0.0)), 3),
    }


def area_km2(polygons: ArrayLike) -> Floats:
    """Area (C,) of lon/lat polygons: exact for edges along meridians and parallels (Lambert's equal-area cylinder)."""
    flat = shapely.transform(
        np.asarray(polygons, dtype=object),
        lambda xy: np.stack([np.radians(xy[:, 0]), np.sin(np.radians(xy[:, 1]))], axis=1),
    )
    return np.asarray(shapely.area(flat) * EARTH_RADIUS_KM**2)


def _sizes(owner: Ints, num_cells: int) -> dict[str, Any]:
    sizes = np.bincount(owner, minlength=num_cells)
    share = sizes[sizes > 0] / max(sizes.sum(), 1)
    effective = float(np.exp(-(share * np.log(share)).sum()))
    return {
        "num_cells": num_cells,
        "num_points": len(owner),
        "min_size": int(sizes.min()),
        "median_size": float(np.median(sizes)),
        "max_size": int(sizes.max()),
        "balance": round(effective / num_cells, 4),
    }


def _errors(lat: Floats, lon: Floats, centre: Floats) -> dict[str, float]:
    km = haversine_km(lat, lon, centre[:, 0], centre[:, 1])
    return {
        "oracle_median_km": round(float(np.median(km)), 3),
        "oracle_mean_km": round(float(km.mean()), 3),
        "oracle_p90_km": round(float(np.percentile(km, 90)), 3),
    }


def _borders(owner: Ints, admin: AdminTable, num_cells: int) -> dict[str, Any]:
    named, code = np.unique(admin.country.astype(str), return_inverse=True)
    code = code.reshape(-1)
    pairs, num = np.unique(owner * len(named) + code, return_counts=True)
    most = np.zeros(num_cells, dtype=np.int64)
    np.maximum.at(most, pairs // len(named), num)
    return {"border_purity": round(float(most.sum() / len(owner)), 4), "num_countries": int((named != "").sum())}


def _areas(km2: Floats) -> dict[str, float]:
    return {"median_area_km2": round(float(np.median(km2)), 1), "max_area_km2": round(float(km2.max()), 1)}


def _num_overlaps(polygons: NDArray[np.object_]) -> int:
    """Pairs of polygons that share an area."""
    first, second = shapely.STRtree(polygons).query(polygons, predicate="intersects")
    first, second = first[first < second], second[first < second]
    relation = shapely.relate_pattern(polygons[first], polygons[second], "T********")
    first, second = first[relation], second[relation]
    return int((shapely.area(shapely.intersection(polygons[first], polygons[second])) > OVERLAP_DEG2).sum())
