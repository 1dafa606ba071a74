"""Geocells: the partition of the globe that the geolocator classifies into, with its anchors and its polygons.

A cell is a set of training places (anchors). A point belongs to the cell of the anchor nearest to it, so `assign` is
exact everywhere and knows no borders, poles or antimeridian; the polygons are the Voronoi regions of the anchors and
serve maps and exports. Row number = `cell_id` = class index, and the numbers depend on the places alone, not on the
order of the rows they came in. Polygons use shapely's x = lon, y = lat; nothing else here does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

from hedwig.geo import chord_to_km, haversine_km, lat_lon, unit_vectors
from hedwig.geocells.admin import admin_membership
from hedwig.geocells.geography import AdminTable, Geography, wrapped
from hedwig.geocells.kmeans import spherical_kmeans
from hedwig.geocells.voronoi import nearest_anchor, voronoi_polygons

__all__ = ["Geocells", "build_geocells"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

COLUMNS = (
    "cell_id", "geometry", "lat", "lon", "num_panoramas", "radius_km", "country", "admin1", "parent",
)  # fmt: skip
PLACE_DECIMALS = 7  # degrees: panoramas within about 1 cm are at one place
TOLERANCE_DEG = 1e-6  # an anchor may lie this far outside its polygon (0.1 m; rounding at a border)
OVERLAP_SHARE = 1e-6  # polygons may overlap by this share of their area


@dataclass(frozen=True, eq=False)
class Geocells:
    """C cells; made by `build_geocells` or `Geocells.from_membership`, checked whenever one is made or loaded.

    Attributes:
        table: GeoDataFrame (C rows, EPSG:4326): `cell_id` int32 equal to the row number; `geometry`; `lat`, `lon`, the
            spherical mean of its panoramas; `num_panoramas`; `radius_km`, the largest distance of a panorama of the
            cell from there; `country` and `admin1` of most of its panoramas ("" unknown); `parent`, the coarser
            cell: its country.
        anchors: DataFrame of distinct training places: `lat`, `lon` in degrees, `cell_id` int32.

    Raises:
        ValueError: a column is missing, ids are not row numbers, a cell has no anchor or no area, polygons overlap, or
            an anchor lies outside the polygon of its cell.
    """

    table: gpd.GeoDataFrame
    anchors: pd.DataFrame

    def __post_init__(self) -> None:
        missing = [name for name in COLUMNS if name not in self.table.columns]
        missing += [name for name in ("lat", "lon", "cell_id") if name not in self.anchors.columns]
        if missing:
            raise ValueError(f"The geocells lack the columns {missing}; build them with build_geocells.")
        num_cells = len(self.table)
        if num_cells == 0 or not np.array_equal(self.table["cell_id"], np.arange(num_cells)):
            raise ValueError(
                f"cell_id must be the row numbers 0 to {num_cells - 1}; it starts with "
                f"{self.table['cell_id'].head(5).tolist()}. Keep the table in the order it was saved in."
            )
        owner = self.anchors["cell_id"].to_numpy()
        if len(owner) and not 0 <= owner.min() <= owner.max() < num_cells:
            raise ValueError(f"Anchors name cells {owner.min()} to {owner.max()}; the table has {num_cells}.")
        empty = np.setdiff1d(np.arange(num_cells), owner)
        if len(empty):
            raise ValueError(f"{len(empty)} cells have no anchor, first cell_id {empty[0]}; drop and renumber them.")
        self._check_polygons(self.table.geometry.to_numpy(), owner)

    def _check_polygons(self, polygons: NDArray[np.object_], owner: Ints) -> None:
        bad = np.flatnonzero(~(shapely.is_valid(polygons) & ~shapely.is_empty(polygons)))
        if len(bad):
            raise ValueError(f"{len(bad)} polygons are empty or invalid, first cell_id {bad[0]}; build them again.")
        total = float(shapely.area(polygons).sum())
        overlap = total - float(shapely.area(shapely.union_all(polygons)))
        if overlap > OVERLAP_SHARE * total:
            raise ValueError(
                f"The polygons overlap by {overlap:.3g} of {total:.3g} square degrees; a partition is needed, so build "
                "the cells from memberships with Geocells.from_membership."
            )
        points = shapely.points(self.anchors["lon"], self.anchors["lat"])
        shapely.prepare(polygons)
        off = np.flatnonzero(~shapely.covers(polygons[owner], points))
        off = off[shapely.distance(polygons[owner[off]], points[off]) > TOLERANCE_DEG]
        if len(off):
            first = self.anchors.iloc[int(off[0])]
            raise ValueError(
                f"{len(off)} of {len(points)} training places lie over {TOLERANCE_DEG} degrees outside the polygon of "
                f"their cell, first lat={first['lat']}, lon={first['lon']} of cell {int(first['cell_id'])}."
            )

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def _tree(self) -> cKDTree:
        return cKDTree(unit_vectors(self.anchors["lat"].to_numpy(), self.anchors["lon"].to_numpy()))

    @classmethod
    def from_membership(
        cls, lat: ArrayLike, lon: ArrayLike, cell_ids: ArrayLike, admin: AdminTable | None = None
    ) -> Geocells:
        """Cells whose members are the points with equal `cell_ids`; these are renumbered, see the module.

        Where several cells claim one place (panoramas within 1 cm), it goes to the one with most panoramas there.

        Args:
            lat: degrees (N,).
            lon: degrees (N,).
            cell_ids: any integers (N,), one value a cell.
            admin: hierarchy of the N points, for the columns country, admin1 and parent.

        Raises:
            ValueError: no points, coordinates that are not positions, or lengths that differ.
        """
        lat, lon = wrapped(lat, lon)
        claimed = np.asarray(cell_ids)
        if len(lat) == 0 or not len(lat) == len(claimed) == (len(lat) if admin is None else len(admin)):
            num_admin = "no" if admin is None else len(admin)
            raise ValueError(
                f"Cells need at least one point and columns of one length; got {len(lat)} positions, {len(claimed)} "
                f"cell ids and {num_admin} admin rows."
            )
        place_lat, place_lon, place, counts = _places(lat, lon)
        country, admin1 = _place_names(admin, place, len(counts))
        label = _majority(np.unique(claimed, return_inverse=True)[1], place, len(counts))
        label = np.unique(label, return_inverse=True)[1]
        num_cells = int(label.max()) + 1
        centre_lat, centre_lon = _centres(place_lat, place_lon, counts, label, num_cells)
        cell_country, cell_admin1 = _cell_names(country, admin1, counts, label, num_cells)
        order = np.lexsort((centre_lon, centre_lat, cell_admin1, cell_country))
        label = np.argsort(order)[label]
        centre_lat, centre_lon = centre_lat[order], centre_lon[order]
        radius = np.zeros(num_cells)
        np.maximum.at(radius, label, haversine_km(place_lat, place_lon, centre_lat[label], centre_lon[label]))
        drawn, polygons = voronoi_polygons(place_lat, place_lon, label)
        table = gpd.GeoDataFrame(
            {
                "cell_id": drawn.astype(np.int32),
                "geometry": polygons,
                "lat": centre_lat,
                "lon": centre_lon,
                "num_panoramas": np.bincount(label, weights=counts).astype(np.int64),
                "radius_km": radius,
                "country": cell_country[order],
                "admin1": cell_admin1[order],
                "parent": cell_country[order],
            },
            geometry="geometry",
            crs="EPSG:4326",
        )
        anchors = pd.DataFrame({"lat": place_lat, "lon": place_lon, "cell_id": label.astype(np.int32)})
        return cls(table, anchors)

    def assign(self, lat: ArrayLike, lon: ArrayLike) -> NDArray[np.int32]:
        """Cell of each point (N,) int32: that of the nearest anchor."""
        return self.assign_with_distance(lat, lon)[0]

    def assign_with_distance(self, lat: ArrayLike, lon: ArrayLike) -> tuple[NDArray[np.int32], Floats]:
        """Cell (N,) int32 of each point, and the distance to its nearest anchor in km (N,) float64."""
        chord, row = nearest_anchor(self._tree, *wrapped(lat, lon))
        return self.anchors["cell_id"].to_numpy(dtype=np.int32)[row], chord_to_km(np.minimum(chord, 2.0))

    def save(self, folder: str | Path) -> None:
        """Write `geocells.parquet` (GeoParquet) and `anchors.parquet` into a folder, made if needed."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.table.to_parquet(folder / "geocells.parquet", index=False)
        self.anchors.to_parquet(folder / "anchors.parquet", index=False)

    @classmethod
    def load(cls, folder: str | Path) -> Geocells:
        """Read what `save` wrote, and check it as a new one is checked.

        Raises:
            FileNotFoundError: the folder lacks one of the two files.
            ValueError: the files do not hold geocells.
        """
        folder = Path(folder)
        for name in ("geocells.parquet", "anchors.parquet"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} holds no {name}; build the geocells first or correct the path.")
        return cls(gpd.read_parquet(folder / "geocells.parquet"), pd.read_parquet(folder / "anchors.parquet"))


def build_geocells(
    lat: ArrayLike,
    lon: ArrayLike,
    *,
    method: Literal["admin", "kmeans"] = "admin",
    min_panoramas: int = 30,
    max_panoramas: int = 60,
    num_cells: int | None = None,
    geography: Geography | None = None,
    seed: int = 0,
) -> Geocells:
    """Geocells of training panoramas; the same points in any order give the same cells with the same numbers.

    The bounds hold except where they cannot: see `admin_membership` for small countries and crowded places; under
    "kmeans" panoramas at one place that fell into two cells are brought together afterwards.

    Args:
        lat: degrees (N,) of the training panoramas.
        lon: degrees (N,).
        method: "admin" (PIGEON's semantic cells) or "kmeans" (capacity-constrained spherical k-means).
        min_panoramas: fewest panoramas of a cell.
        max_panoramas: most panoramas of a cell.
        num_cells: for "kmeans": C; by default as many as make the mean size the middle of the bounds.
        geography: hierarchy and country names; `Geography.default()` if not given.
        seed: of the k-means seeding; "admin" has no random step.

    Raises:
        ValueError: an unknown method, bounds that cannot hold, num_cells with "admin", or bad coordinates.
    """
    if method not in ("admin", "kmeans"):
        raise ValueError(f"Unknown method {method!r}; use 'admin' or 'kmeans'.")
    if method == "admin" and num_cells is not None:
        raise ValueError(f"num_cells={num_cells} does nothing with method 'admin'; set the bounds or use 'kmeans'.")
    lat, lon = wrapped(lat, lon)
    if len(lat) == 0:
        raise ValueError("There are no panoramas to build geocells from; check the split they were taken from.")
    place_lat, place_lon, _, counts = _places(lat, lon)
    admin = (Geography.default() if geography is None else geography).lookup(place_lat, place_lon)
    every = np.repeat(np.arange(len(counts)), counts)
    if method == "admin":
        label = admin_membership(
            place_lat,
            place_lon,
            admin,
            min_panoramas=min_panoramas,
            max_panoramas=max_panoramas,
            counts=counts,
        )[every]
    else:
        if num_cells is None:
            num_cells = max(1, round(2 * len(every) / max(1, min_panoramas + max_panoramas)))
        vectors = unit_vectors(place_lat, place_lon)[every]
        label = spherical_kmeans(vectors, num_cells, min_panoramas, max_panoramas, seed).astype(np.int64)
    return Geocells.from_membership(place_lat[every], place_lon[every], label, admin.take(every))


def _places(lat: Floats, lon: Floats) -> tuple[Floats, Floats, Ints, Ints]:
    """Distinct places sorted by (lat, lon), the place (N,) of each point, and the number of points at each."""
    lat = np.round(lat, PLACE_DECIMALS)
    lon = np.round(lon, PLACE_DECIMALS)
    lon = np.where((lon >= 180) | (lon < -180), -180.0, lon)
    lon = np.where(np.abs(lat) == 90, 0.0, lon) + 0.0  # + 0.0: one zero, not two
    distinct, place, counts = np.unique(
        np.stack([lat + 0.0, lon], axis=1), axis=0, return_inverse=True, return_counts=True
    )
    return distinct[:, 0], distinct[:, 1], place.reshape(-1).astype(np.int64), counts.astype(np.int64)


def _majority(values: Ints, place: Ints, num_places: int) -> Ints:
    """The most frequent value (num_places,) at each place; the smallest of equals."""
    pairs, counts = np.unique(np.stack([place, values], axis=1), axis=0, return_counts=True)
    order = np.lexsort((pairs[:, 1], -counts, pairs[:, 0]))
    first = order[np.diff(pairs[order, 0], prepend=-1) > 0]
    result = np.empty(num_places, dtype=np.int64)
    result[pairs[first, 0]] = pairs[first, 1]
    return result


def _place_names(admin: AdminTable | None, place: Ints, num_places: int) -> tuple[Any, Any]:
    if admin is None:
        return np.full(num_places, ""), np.full(num_places, "")
    first = np.unique(place, return_index=True)[1]
    return admin.country[first].astype(str), admin.admin1[first].astype(str)


def _centres(lat: Floats, lon: Floats, counts: Ints, label: Ints, num_cells: int) -> tuple[Floats, Floats]:
    """Spherical means (C,) of the members; of members that cancel out, such as antipodes, the first."""
    vectors = unit_vectors(lat, lon)
    sums = np.stack([np.bincount(label, weights=column * counts, minlength=num_cells) for column in vectors.T], 1)
    first = vectors[np.unique(label, return_index=True)[1]]
    weak = np.linalg.norm(sums, axis=1) < 1e-9 * np.bincount(label, weights=counts, minlength=num_cells)
    return lat_lon(np.where(weak[:, None], first, sums))


def _cell_names(country: Any, admin1: Any, counts: Ints, label: Ints, num_cells: int) -> tuple[Any, Any]:
    """Country (C,) and, within it, admin-1 (C,) of most panoramas of each cell."""
    named, code = np.unique(country, return_inverse=True)
    cell_country = named[_majority(np.repeat(code, counts), np.repeat(label, counts), num_cells)]
    within = np.where(country == cell_country[label], counts, 0)  # so that admin-1 lies in that country
    named, code = np.unique(admin1, return_inverse=True)
    return cell_country, named[_majority(np.repeat(code, within), np.repeat(label, within), num_cells)]
