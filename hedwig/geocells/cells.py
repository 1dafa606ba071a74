"""Geocells: the partition of the globe that the geolocator classifies into, with its anchors and its polygons.

A cell is a set of training places (anchors). A point belongs to the cell of the anchor nearest to it, so `assign` is
exact everywhere and knows no borders, poles or antimeridian; the polygons are the Voronoi regions of the anchors and
serve maps and exports. Row number = `cell_id` = class index, and the numbers depend on the places alone, not on the
order of the rows they came in. Polygons use shapely's x = lon, y = lat; nothing else here does.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

from hedwig.geo import chord_to_km, haversine_km, lat_lon, unit_vectors
from hedwig.geocells.geography import AdminTable, wrapped
from hedwig.geocells.hierarchy import Level, parent_names
from hedwig.geocells.voronoi import nearest_anchor, voronoi_polygons

__all__ = ["Geocells", "places_of"]

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
    """C cells, made by `build_geocells` or `Geocells.from_membership`; checked whenever one is made or loaded.

    Attributes:
        table: GeoDataFrame (C rows, EPSG:4326): `cell_id` int32 equal to the row number; `geometry`; `lat`, `lon`, the
            spherical mean of its panoramas; `num_panoramas`; `radius_km`, the largest distance of a panorama of the
            cell from there; `country` and `admin1` of most of its panoramas ("" unknown); `parent_1`, `parent_2` ...,
            names of the coarser cells it lies in, coarsest first, nested (see `hedwig.geocells.hierarchy`), and
            `parent`, which is `parent_1`; `off_polygon_km`, the largest distance of a panorama from the country that
            it was counted to without lying in its polygon (0 if all lie in it).
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
        levels = self.hierarchy()
        for coarse, fine in itertools.pairwise(levels):
            if len(np.unique(np.stack([coarse.parent, fine.parent]), axis=1).T) > len(fine.names):
                raise ValueError(f"A value of {fine.column} lies in several of {coarse.column}; levels must be nested.")

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
        cls,
        lat: ArrayLike,
        lon: ArrayLike,
        cell_ids: ArrayLike,
        admin: AdminTable | None = None,
        *,
        levels: int = 3,
    ) -> Geocells:
        """Cells whose members are the points with equal `cell_ids`; these are renumbered, see the module.

        Where several cells claim one place (panoramas within 1 cm), it goes to the one with most panoramas there.

        Args:
            lat: degrees (N,).
            lon: degrees (N,).
            cell_ids: any integers (N,), one value a cell.
            admin: hierarchy of the N points, for the columns country, admin1 and those of the parents.
            levels: 2 to 4 levels of the hierarchy, the cells included.

        Raises:
            ValueError: no points, coordinates that are not positions, lengths that differ, or another number of levels.
        """
        lat, lon = wrapped(lat, lon)
        claimed = np.asarray(cell_ids)
        if len(lat) == 0 or not len(lat) == len(claimed) == (len(lat) if admin is None else len(admin)):
            num_admin = "no" if admin is None else len(admin)
            raise ValueError(
                f"Cells need at least one point and columns of one length; got {len(lat)} positions, {len(claimed)} "
                f"cell ids and {num_admin} admin rows."
            )
        place_lat, place_lon, place, counts = places_of(lat, lon)
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
        off_km = np.zeros(num_cells)
        np.maximum.at(off_km, label, _place_off_km(admin, place, len(counts)))
        drawn, polygons = voronoi_polygons(place_lat, place_lon, label)
        parents = parent_names(cell_country[order], cell_admin1[order], centre_lat, centre_lon, levels)
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
                "parent": parents[0],
                **{f"parent_{number}": names for number, names in enumerate(parents, 1)},
                "off_polygon_km": off_km,
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

    def hierarchy(self) -> list[Level]:
        """The coarser levels, coarsest first: for each the names of the parents and the parent (C,) of each cell.

        Cells saved before there were levels have one, their countries.
        """
        columns = [name for name in self.table.columns if name.startswith("parent_")] or ["parent"]
        return [Level.of(name, self.table[name]) for name in sorted(columns)]

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


def places_of(lat: Floats, lon: Floats) -> tuple[Floats, Floats, Ints, Ints]:
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


def _place_off_km(admin: AdminTable | None, place: Ints, num_places: int) -> Floats:
    return np.zeros(num_places) if admin is None else admin.off_polygon_km[np.unique(place, return_index=True)[1]]


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
