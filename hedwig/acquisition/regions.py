"""Regions to sample from: polygons of any file and any CRS, as one clean EPSG:4326 shape per id.

A region is what its edges say as straight lines in longitude and latitude, which is how every file here stores them.
What would make a sampler wrong in silence is repaired and counted: invalid rings, ids on several rows (dissolved), and
rings that run across the antimeridian undivided, which are cut at ±180°. Shapely's (x=lon, y=lat) order stays inside.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray

from hedwig import storage
from hedwig.geo import EARTH_RADIUS_KM
from hedwig.schema import check_columns

__all__ = ["Regions", "area_km2", "make_regions", "read_regions"]

Floats = NDArray[np.float64]
Objects = NDArray[np.object_]

SIDECARS = (".cpg", ".dbf", ".prj", ".shp", ".shx")
WORLD = (-180.0, -90.0, 180.0, 90.0)


@dataclass(frozen=True)
class Regions:
    """Polygons to sample from, in the order of their ids.

    Attributes:
        ids: (R,) object array of str, sorted, unique.
        geometry: (R,) object array of Polygon or MultiPolygon in EPSG:4326, longitudes in [-180, 180].
        source: where they were read from; empty when they were made from a frame.
        sha256: digest of the file, or of a shapefile's files; empty when there is none.
        num_rows: rows of the source.
        num_left_out: rows without an id or without an area.
        num_repaired: rows whose geometry was invalid.
        num_cut: rows that ran across the antimeridian undivided.
        num_dissolved: rows merged into an earlier row of the same id.
    """

    ids: Objects
    geometry: Objects
    source: str
    sha256: str
    num_rows: int
    num_left_out: int
    num_repaired: int
    num_cut: int
    num_dissolved: int

    def __len__(self) -> int:
        return len(self.ids)

    def record(self) -> dict[str, Any]:
        """What a manifest keeps of it: the source, its digest and the counts."""
        counts = ("num_rows", "num_left_out", "num_repaired", "num_cut", "num_dissolved")
        kept = {"source": self.source, "sha256": self.sha256, "num_regions": len(self)}
        return {**kept, **{name: getattr(self, name) for name in counts}}


def read_regions(path: str, id_column: str, *, layer: str | None = None) -> Regions:
    """Polygons of a GeoJSON, GeoPackage, GeoParquet, Shapefile or zipped Shapefile; local, ``s3://`` or ``gs://``.

    Args:
        path: the file.
        id_column: column whose values name the regions; rows of one id become one region.
        layer: layer of a GeoPackage with several.

    Raises:
        FileNotFoundError: nothing is there.
        SchemaError: the file has no such column; the message suggests one.
        ValueError: it cannot be read, or holds no polygons with an id.
    """
    path = storage.resolve(path)
    if not storage.exists(path):
        raise FileNotFoundError(f"No polygons at {path!r}; give a GeoJSON, GeoPackage, GeoParquet or Shapefile.")
    with _local_file(path) as local:
        try:
            if str(local).lower().endswith((".parquet", ".geoparquet")):
                frame = gpd.read_parquet(local)
            else:
                frame = gpd.read_file(local, layer=layer) if layer else gpd.read_file(local)
        except Exception as error:  # pyogrio, pyarrow and geopandas each have errors of their own
            raise ValueError(f"The polygons {path} cannot be read: {error}") from error
        digest = _digest(local)
    if not isinstance(frame, gpd.GeoDataFrame):
        raise ValueError(f"{path} is a table without geometry; give it a layer of polygons.")
    return make_regions(frame, id_column, source=path, sha256=digest)


def make_regions(frame: gpd.GeoDataFrame, id_column: str, *, source: str = "", sha256: str = "") -> Regions:
    """The same from a GeoDataFrame.

    Raises:
        SchemaError: the frame has no such column; the message suggests one.
        ValueError: no polygon with an id, or coordinates that are no degrees and without a CRS.
    """
    where = f"The polygons {source}" if source else "The polygons"
    columns = [str(name) for name in frame.columns if name != frame.geometry.name]
    check_columns(columns, [id_column], where=where)
    if frame.crs is not None and not frame.crs.equals("EPSG:4326"):
        frame = frame.to_crs("EPSG:4326")
    ids = np.array([_id(value) for value in frame[id_column]], dtype=object)
    shapes = np.asarray(shapely.force_2d(frame.geometry.to_numpy()), dtype=object)
    if frame.crs is None:
        _refuse_no_degrees(shapes, where)
    cut = np.array([_crosses(shape) for shape in shapes], dtype=bool)
    for row in np.flatnonzero(cut):
        shapes[row] = _cut_at_antimeridian(shapes[row], str(ids[row]))
    broken = np.array([s is not None and not shapely.is_valid(s) for s in shapes], dtype=bool)
    for row in np.flatnonzero(broken):
        shapes[row] = shapely.make_valid(shapes[row])
    shapes = np.array([_polygons(shape) for shape in shapes], dtype=object)
    good = np.array([i is not None and s is not None for i, s in zip(ids, shapes, strict=True)], dtype=bool)
    if not good.any():
        raise ValueError(
            f"{where} hold no area with a value in {id_column!r} ({len(frame)} rows); give polygons, not points or "
            "lines, and a column that is not empty."
        )
    names = np.unique(ids[good].astype(str))
    rows_of: dict[str, list[int]] = {str(name): [] for name in names}
    for row in np.flatnonzero(good):
        rows_of[str(ids[row])].append(int(row))
    merged = np.empty(len(names), dtype=object)
    for number, rows in enumerate(rows_of.values()):
        merged[number] = shapes[rows[0]] if len(rows) == 1 else _polygons(shapely.union_all(shapes[rows]))
    return Regions(
        ids=names.astype(object),
        geometry=merged,
        source=source,
        sha256=sha256,
        num_rows=len(frame),
        num_left_out=int((~good).sum()),
        num_repaired=int((broken & good).sum()),
        num_cut=int((cut & good).sum()),
        num_dissolved=int(good.sum()) - len(names),
    )


def area_km2(geometry: Any) -> float:
    """Area on the sphere of a Polygon or MultiPolygon whose edges are straight in longitude and latitude.

    Green's theorem gives R² ∮ sin(lat) d(lon); along an edge from latitude a to b the mean of sin(lat) is
    (cos a - cos b) / (b - a), and sin a where both are equal.
    """
    total = 0.0
    for part in shapely.get_parts(shapely.get_parts(geometry)):
        rings = [part.exterior, *part.interiors]
        total += sum(
            sign * abs(_ring_integral(ring)) for sign, ring in zip([1] + [-1] * len(rings), rings, strict=False)
        )
    return float(total * EARTH_RADIUS_KM**2)


def _ring_integral(ring: Any) -> float:
    lon, lat = np.radians(shapely.get_coordinates(ring)).T
    middle, half = (lat[1:] + lat[:-1]) / 2, (lat[1:] - lat[:-1]) / 2
    # (cos a - cos b) / (b - a) = sin(middle) sin(half) / half, which np.sinc keeps exact for level edges
    return float(np.sum(np.diff(lon) * np.sin(middle) * np.sinc(half / np.pi)))


def _id(value: Any) -> str | None:
    if value is None or pd.isna(value):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of whole numbers with a gap is read as floats
    return str(value).strip() or None


def _refuse_no_degrees(shapes: Objects, where: str) -> None:
    west, south, east, north = shapely.total_bounds(shapes)
    if not (west >= -360 and south >= -90 and east <= 360 and north <= 90):
        raise ValueError(
            f"{where} name no CRS, and their bounds ({west:g}, {south:g}, {east:g}, {north:g}) are no degrees; "
            "set the CRS in the file (frame.set_crs)."
        )


def _polygons(shape: Any) -> Any:
    """The areas in a geometry as a Polygon or MultiPolygon; None when there are none."""
    if shape is None or shapely.is_empty(shape):
        return None
    parts = [p for p in shapely.get_parts(shapely.get_parts(shape)) if p.geom_type == "Polygon" and p.area > 0]
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else shapely.multipolygons(parts)


def _crosses(shape: Any) -> bool:
    """Whether a ring leaves [-180, 180], or has an edge over half the globe which is not the flat map's own frame."""
    if shape is None or shapely.is_empty(shape):
        return False
    west, _, east, _ = shapely.bounds(shape)
    if west < WORLD[0] or east > WORLD[2]:
        return True
    if east - west <= 180:
        return False
    rings = shapely.get_rings(shapely.get_parts(shape))
    return any(bool(_jumps(shapely.get_coordinates(ring)).any()) for ring in rings)


def _jumps(coords: Floats) -> NDArray[np.bool_]:
    """Which edges (E,) of a ring run across the antimeridian instead of around the globe.

    An edge from 180 to -180 is either the flat map's own frame or one point of the antimeridian written twice; where
    both close the ring, that one is meant which bounds the smaller area.
    """
    lon, lat = coords.T
    wide = np.abs(np.diff(lon)) > 180
    wide &= ~((np.abs(lat[:-1]) >= 89.9) & (np.abs(lat[1:]) >= 89.9))
    framed = np.asarray(wide & ~((np.abs(lon[:-1]) == 180) & (np.abs(lon[1:]) == 180)))
    if (wide == framed).all():
        return framed
    smaller = _area_deg2(coords, wide)
    return wide if 1e-9 < smaller < _area_deg2(coords, framed) else framed


def _area_deg2(coords: Floats, jumps: NDArray[np.bool_]) -> float:
    """Area on the flat map of a ring that crosses the antimeridian at `jumps`; infinite if it does not close then."""
    steps = _steps(coords, jumps)
    if abs(steps.sum()) > 1:
        return np.inf
    lon, lat = coords[:, 0] + np.concatenate([[0.0], np.cumsum(steps)]), coords[:, 1]
    return float(abs(np.sum((lon[:-1] + lon[1:]) / 2 * np.diff(lat))))


def _steps(coords: Floats, jumps: NDArray[np.bool_]) -> Floats:
    return np.where(jumps, -360.0 * np.sign(np.diff(coords[:, 0])), 0.0)


def _cut_at_antimeridian(shape: Any, name: str) -> Any:
    """The same area with longitudes in [-180, 180]: rings made continuous, cut at ±180° and moved back by turns."""
    pieces = []
    for part in shapely.get_parts(shapely.get_parts(shape)):
        if part.geom_type != "Polygon" or part.is_empty:
            continue
        exterior = _continuous(shapely.get_coordinates(part.exterior), name)
        middle = (exterior[:, 0].min() + exterior[:, 0].max()) / 2
        holes = []
        for ring in part.interiors:
            hole = _continuous(shapely.get_coordinates(ring), name)
            turns = np.round((middle - (hole[:, 0].min() + hole[:, 0].max()) / 2) / 360)
            holes.append(hole + np.array([360 * turns, 0.0]))
        whole = shapely.make_valid(shapely.Polygon(exterior, holes))
        for turn in range(-2, 3):
            window = shapely.box(-180 + 360 * turn, -90, 180 + 360 * turn, 90)
            piece = _polygons(shapely.intersection(whole, window))
            if piece is not None:
                pieces.append(shapely.transform(piece, lambda c, t=turn: c - [360.0 * t, 0.0]))
    return shapely.union_all(pieces) if pieces else None


def _continuous(coords: Floats, name: str) -> Floats:
    steps = _steps(coords, _jumps(coords))
    if abs(steps.sum()) > 1:
        raise ValueError(
            f"Region {name!r} winds around a pole, so its ring does not close in longitude and latitude; close it "
            "along the pole (…, 180 -90, -180 -90, …) or cut it at ±180°."
        )
    moved = coords.copy()
    moved[1:, 0] += np.cumsum(steps)
    return moved


@contextmanager
def _local_file(path: str) -> Iterator[Path]:
    """A file as a local path: itself, or a temporary copy, of a Shapefile with the files that belong to it."""
    if not storage.is_remote(path):
        yield Path(path)
        return
    folder, name = path.rsplit("/", 1)
    stem, suffix = os.path.splitext(name)
    wanted = [path]
    if suffix.lower() == ".shp":
        beside = storage.list_files(folder)
        wanted = [
            f for f in beside if os.path.splitext(f.rsplit("/", 1)[1])[0] == stem and f.lower().endswith(SIDECARS)
        ]
    scratch = Path(tempfile.mkdtemp(prefix="hedwig-"))
    try:
        for file in wanted:
            (scratch / file.rsplit("/", 1)[1]).write_bytes(storage.read_bytes(file))
        yield scratch / name
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _digest(path: Path) -> str:
    """sha256 of a file; of a Shapefile, of its files in the order of their names; of a folder, of all its files."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
    elif path.suffix.lower() == ".shp":
        files = sorted(p for p in path.parent.glob(f"{path.stem}.*") if p.suffix.lower() in SIDECARS)
    else:
        files = [path]
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()
