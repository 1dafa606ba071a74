"""Sampling plans: where to look for panoramas, decided and written down before anything is asked of anybody.

Four ways to spread N places, each with a bias of its own, so a plan says in its columns and manifest how it was made:
equally many per region (the paper's: congressional districts), uniform by area over land (mostly empty land),
proportional to a power of the population (mostly towns), and evenly over blocks of known coverage (where a service has
imagery). The same arguments give the same plan, byte for byte. The administrative names come from the geography.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import shapely
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

from hedwig import storage
from hedwig.acquisition.regions import Regions
from hedwig.acquisition.sampling import DECIMALS, AreaSampler, CapSampler, shares, spread
from hedwig.geo import EARTH_RADIUS_KM, km_to_chord, unit_vectors
from hedwig.geocells import Geography, refuse_swapped
from hedwig.schema import check_columns, suggestion

__all__ = [
    "Plan",
    "equal_area_blocks",
    "plan_coverage",
    "plan_population",
    "plan_regions",
    "plan_world",
    "read_points",
]

Floats = NDArray[np.float64]

SYNONYMS = {"latitude": "lat", "y": "lat", "lng": "lon", "long": "lon", "longitude": "lon", "x": "lon"}
UNINHABITED = ("AQ",)


@dataclass(frozen=True)
class Plan:
    """A plan and how it came about.

    Attributes:
        table: ``plan_id, lat, lon, region, country`` and what else the kind of plan knows; degrees, rounded to
            6 decimals; sorted by region.
        kind: 'regions', 'world', 'population' or 'coverage'.
        num_asked: points asked for.
        shortfall: points that a region (for the other kinds: the whole) lacks, because it is too small for the
            minimum distance or the source has no more.
        details: counts of what went in.
    """

    table: pd.DataFrame
    kind: str
    num_asked: int
    shortfall: dict[str, int]
    details: dict[str, Any]

    def csv(self) -> bytes:
        """The table as CSV, in UTF-8."""
        return self.table.to_csv(index=False, float_format=f"%.{DECIMALS}f", lineterminator="\n").encode()


def plan_regions(
    regions: Regions, per_region: int, *, geography: Geography, min_distance_km: float = 0.0, seed: int = 0
) -> Plan:
    """`per_region` places in every region, uniform by area within it.

    Without a minimum distance a region's points depend on the seed, its id and its shape alone: neither on the order
    of the regions nor on which others there are.
    """
    samplers = {str(i): AreaSampler(shape) for i, shape in zip(regions.ids, regions.geometry, strict=True)}
    drawn = spread(samplers, dict.fromkeys(samplers, per_region), min_distance_km=min_distance_km, seed=seed)
    found = geography.lookup(drawn.lat, drawn.lon)
    columns = {"region": drawn.owner, "country": found.country, "admin1": found.admin1}
    details = {"polygons": regions.record()}
    return _plan("regions", drawn.lat, drawn.lon, columns, per_region * len(regions), drawn.shortfall, details)


def plan_world(
    num: int,
    *,
    geography: Geography,
    countries: Sequence[str] = (),
    leave_out: Sequence[str] = UNINHABITED,
    min_distance_km: float = 0.0,
    seed: int = 0,
) -> Plan:
    """`num` places uniform by area over the land: the country polygons of the geography.

    Args:
        num: places.
        geography: whose polygons are the land.
        countries: ISO 3166-1 alpha-2 codes to stay in; all by default.
        leave_out: codes to leave out where `countries` names none; by default Antarctica.
        min_distance_km: least distance between two places.
        seed: any integer.

    Raises:
        ValueError: an unknown country.
    """
    codes, land = _land(geography, countries, leave_out)
    drawn = spread({"world": AreaSampler(land)}, {"world": num}, min_distance_km=min_distance_km, seed=seed)
    found = geography.lookup(drawn.lat, drawn.lon)
    columns = {"region": found.country, "country": found.country, "admin1": found.admin1}
    return _plan("world", drawn.lat, drawn.lon, columns, num, drawn.shortfall, {"num_countries": len(codes)})


def plan_population(
    num: int,
    *,
    geography: Geography,
    alpha: float = 1.0,
    radius_km: float = 5.0,
    countries: Sequence[str] = (),
    min_distance_km: float = 0.0,
    seed: int = 0,
) -> Plan:
    """`num` places around GeoNames places drawn with probability ∝ population^alpha, on land.

    Args:
        num: places; fewer are found where `radius_km` is 0 and there are no more, since no position is taken twice.
        geography: whose places and land; `Geography.default` has them.
        alpha: 1 follows the population, 0 makes a village count as much as a city, 0.5 lies between. Places of
            unknown population (0 in the table) are left out.
        radius_km: a point is uniform by area within this distance of its place.
        countries: ISO 3166-1 alpha-2 codes to stay in; all by default.
        min_distance_km: least distance between two points.
        seed: any integer.

    Raises:
        ValueError: an unknown country, a negative radius, or a geography without places.
    """
    if not (radius_km >= 0 and np.isfinite(alpha)):
        raise ValueError(f"radius_km={radius_km} must be 0 or more and alpha={alpha} a number.")
    places = geography.places()
    places = places[places["population"] > 0]
    if countries:
        _check_countries(countries, sorted(set(places["country"])))
        places = places[places["country"].isin(list(countries))]
    places = places.sort_values(["country", "admin1", "name", "lat", "lon"], kind="stable").reset_index(drop=True)
    # Some overseas departments have places of their own code, and their land in the polygon of another.
    have_land = set(countries) <= {str(code) for code in geography.country_polygons()["country"]}
    _, land = _land(geography, countries if have_land else (), ())
    # relative to the largest, so that no alpha overflows
    weight = (places["population"].to_numpy(dtype=np.float64) / places["population"].max()) ** alpha
    lat, lon = places["lat"].to_numpy(dtype=np.float64), places["lon"].to_numpy(dtype=np.float64)
    sampler = CapSampler(lat, lon, weight, radius_km, land)
    drawn = spread({"population": sampler}, {"population": num}, min_distance_km=min_distance_km, seed=seed)
    place = places.iloc[drawn.row].reset_index(drop=True)
    columns = {"region": place["country"], "country": place["country"], "admin1": place["admin1"]}
    columns |= {"place": place["name"], "population": place["population"]}
    return _plan("population", drawn.lat, drawn.lon, columns, num, drawn.shortfall, {"num_places": len(places)})


def plan_coverage(
    points: pd.DataFrame,
    num: int,
    *,
    geography: Geography,
    block_km: float = 50.0,
    min_distance_km: float = 0.0,
    seed: int = 0,
) -> Plan:
    """`num` of the points where imagery is known to be, as evenly over blocks of equal area as they allow.

    One point of every block is taken, then a second, and so on: a block gives its k-th point only when all blocks
    that have k - 1 gave them. A city of ten thousand points weighs as much as a village of ten.

    Args:
        points: ``lat, lon`` in degrees, as `read_points` returns; other columns are not used.
        num: points wanted.
        geography: names the countries.
        block_km: side of a block.
        min_distance_km: least distance between two points.
        seed: any integer.
    """
    lat, lon = (points[name].to_numpy(dtype=np.float64).round(DECIMALS) for name in ("lat", "lon"))
    unique = np.unique(np.stack([lat, lon], axis=1), axis=0)
    lat, lon = unique.T
    block = equal_area_blocks(lat, lon, block_km)
    draw = shares([f"{a:.6f},{b:.6f}" for a, b in unique.tolist()], seed)
    order = np.lexsort((draw, block))
    starts = np.r_[True, block[order][1:] != block[order][:-1]] if len(order) else np.empty(0, dtype=bool)
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order)) - np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))
    turn = np.lexsort((draw, rank))
    chosen = _apart(lat[turn], lon[turn], num, min_distance_km)
    rows = np.sort(turn[chosen])
    found = geography.lookup(lat[rows], lon[rows])
    columns = {"region": found.country, "country": found.country, "admin1": found.admin1, "block": block[rows]}
    details = {
        "num_points": len(points),
        "num_unique": len(unique),
        "num_blocks": len(np.unique(block)),
        "num_blocks_taken": len(np.unique(block[rows])),
        "most_per_block": int(np.bincount(np.unique(block[rows], return_inverse=True)[1]).max()) if len(rows) else 0,
    }
    shortfall = {"coverage": num - len(rows)} if len(rows) < num else {}
    return _plan("coverage", lat[rows], lon[rows], columns, num, shortfall, details)


def equal_area_blocks(lat: ArrayLike, lon: ArrayLike, block_km: float) -> NDArray[np.int64]:
    """Number (N,) of the block of each point: rows of equal height, cut into blocks of `block_km`² to within rounding.

    Raises:
        ValueError: a block that is not between 1 m and the Earth's radius wide.
    """
    if not 0.001 <= block_km <= EARTH_RADIUS_KM:
        raise ValueError(f"block_km must be between 0.001 and {EARTH_RADIUS_KM:.0f}; it was {block_km}.")
    num_rows = max(1, round(np.pi * EARTH_RADIUS_KM / block_km))
    edges = np.sin(np.radians(np.linspace(-90, 90, num_rows + 1)))
    around = np.maximum(1, np.round(2 * np.pi * EARTH_RADIUS_KM**2 * np.diff(edges) / block_km**2)).astype(np.int64)
    first = np.concatenate([[0], np.cumsum(around)])
    row = np.clip(((np.asarray(lat, dtype=np.float64) + 90) / 180 * num_rows).astype(np.int64), 0, num_rows - 1)
    share = (np.asarray(lon, dtype=np.float64) + 180) % 360 / 360
    return np.asarray(first[row] + np.minimum((share * around[row]).astype(np.int64), around[row] - 1))


def read_points(path: str, geography: Geography) -> tuple[pd.DataFrame, int]:
    """Points of known coverage: CSV, TSV, Parquet or a text of ``lat, lon`` lines without a header.

    Returns:
        ``lat, lon`` (degrees, float64) of the rows that are positions, and how many rows are none.

    Raises:
        FileNotFoundError: nothing is there.
        SchemaError: no position columns.
        ValueError: no row is a position, or the columns look swapped.
    """
    path = storage.resolve(path)
    if not storage.exists(path):
        raise FileNotFoundError(f"No points at {path!r}; give a CSV or Parquet file with lat and lon.")
    data = storage.read_bytes(path)
    if path.lower().endswith((".parquet", ".geoparquet")):
        frame = pd.read_parquet(io.BytesIO(data))
    else:
        start = data[:4096].decode("utf-8", "replace").lstrip("\ufeff").splitlines()
        separator = "\t" if start and "\t" in start[0] else ","
        names = ["lat", "lon"] if start and _is_pair(start[0].split(separator)) else None
        frame = pd.read_csv(
            io.BytesIO(data), sep=separator, skipinitialspace=True, names=names, dtype=str, encoding="utf-8-sig"
        )
    lower = {name: str(name).strip().lower() for name in frame.columns}
    frame = frame.rename(columns=lower)
    frame = frame.rename(columns={k: v for k, v in SYNONYMS.items() if k in frame.columns and v not in frame.columns})
    check_columns(map(str, frame.columns), ("lat", "lon"), where=f"The points {path}")
    numbers = pd.DataFrame({name: pd.to_numeric(frame[name], errors="coerce") for name in ("lat", "lon")})
    finite = numbers[np.isfinite(numbers).all(axis=1)]
    refuse_swapped(finite["lat"], finite["lon"], [None] * len(finite), geography)
    lat, lon = (finite[name].to_numpy(dtype=np.float64) for name in ("lat", "lon"))
    # (0, 0) is the mark of a lost position
    good = (np.abs(lat) <= 90) & (np.abs(lon) <= 180) & ((lat != 0) | (lon != 0))
    if not good.any():
        raise ValueError(f"None of the {len(frame)} rows of {path} is a position in degrees.")
    return pd.DataFrame({"lat": lat[good], "lon": lon[good]}), len(frame) - int(good.sum())


def _is_pair(fields: list[str]) -> bool:
    try:
        return len(fields) == 2 and all(np.isfinite(float(field)) for field in fields)
    except ValueError:
        return False


def _land(geography: Geography, countries: Sequence[str], leave_out: Sequence[str]) -> tuple[list[str], Any]:
    """Codes and one MultiPolygon of countries; they touch, which the sampler allows."""
    frame = geography.country_polygons()
    known = [str(code) for code in frame["country"]]
    _check_countries([*countries, *leave_out] if countries else countries, known)
    wanted = set(countries) or set(known) - set(leave_out)
    kept = np.array([code in wanted for code in known], dtype=bool)
    parts = shapely.get_parts(frame.geometry.to_numpy()[kept])
    parts = parts[shapely.get_type_id(parts) == 3]
    return [code for code in known if code in wanted], shapely.multipolygons(parts)


def _check_countries(countries: Sequence[str], known: Sequence[str]) -> None:
    for code in countries:
        if code not in known:
            hint = suggestion(code.upper(), known)
            raise ValueError(f"No country {code!r} here; give ISO 3166-1 alpha-2 codes such as FR.{hint}")


def _apart(lat: Floats, lon: Floats, num: int, min_distance_km: float) -> NDArray[np.int64]:
    """The first `num` rows, in order, that are no nearer than the distance to a row taken before."""
    if not min_distance_km > 0:
        return np.arange(min(num, len(lat)))
    vectors = unit_vectors(lat, lon)
    chord = float(km_to_chord(min_distance_km)) * (1 - 1e-12)
    tree, blocked = cKDTree(vectors), np.zeros(len(lat), dtype=bool)
    taken: list[int] = []
    for row in range(len(lat)):
        if len(taken) == num:
            break
        if not blocked[row]:
            taken.append(row)
            blocked[tree.query_ball_point(vectors[row], chord)] = True
    return np.array(taken, dtype=np.int64)


def _plan(
    kind: str,
    lat: Floats,
    lon: Floats,
    columns: dict[str, Any],
    num_asked: int,
    shortfall: dict[str, int],
    details: dict[str, Any],
) -> Plan:
    texts = [f"{kind}:{a:.{DECIMALS}f},{b:.{DECIMALS}f}" for a, b in zip(lat.tolist(), lon.tolist(), strict=True)]
    # a letter first: sixteen digits with an e among them read as a number
    ids = [f"p{hashlib.sha256(text.encode()).hexdigest()[:15]}" for text in texts]
    table = pd.DataFrame({"plan_id": ids, "lat": lat, "lon": lon, **columns})
    table = table.sort_values("region", kind="stable").reset_index(drop=True)
    return Plan(table, kind, num_asked, dict(shortfall), details)
