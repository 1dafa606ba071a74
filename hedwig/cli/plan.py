"""``hedwig plan``: decide where to look for panoramas, see it on a map, and know the price before anything is fetched.

Each command writes the plan as CSV and a small record beside it (``PLAN.csv.json``): the parameters, the digest of what
was read, the seed, the counts and the estimate. Nothing here talks to a network.
"""

from __future__ import annotations

import hashlib
import json
import logging
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hedwig.cli.console import set_up, show

if TYPE_CHECKING:
    from hedwig.acquisition.plans import Plan
    from hedwig.acquisition.regions import Regions
    from hedwig.geocells import Geography

__all__ = ["register"]

logger = logging.getLogger(__name__)

plan_app = typer.Typer(no_args_is_help=True, help="Plan where to look for panoramas; estimate requests, cost and time.")

Out = Annotated[str, typer.Option("--out", help="CSV of the plan; its record is written beside it as .json.")]
Num = Annotated[int, typer.Option("--num", min=1, help="Places wanted.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Same seed, same plan.")]
Apart = Annotated[float, typer.Option("--min-distance-km", min=0, help="Least distance between any two places.")]
Map = Annotated[str | None, typer.Option("--map", metavar="PNG", help="Draw the plan.")]
Country = Annotated[list[str] | None, typer.Option("--country", help="Stay in this country, such as FR; repeatable.")]
Source = Annotated[str, typer.Option("--source", help="streetview, mapillary or panoramax, for the estimate.")]
Headings = Annotated[int, typer.Option("--headings", min=1, max=36, help="Images per panorama, for the estimate.")]
Price = Annotated[
    float | None, typer.Option("--price-per-1000", min=0, help="USD per 1,000 images, from the price list of today.")
]
Rate = Annotated[float, typer.Option("--rate", min=0.001, help="Requests per second, for the estimate.")]
Found = Annotated[float, typer.Option("--found-share", min=0, max=1, help="Share of the places with a panorama.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only errors and the result.")]
Json = Annotated[bool, typer.Option("--json", help="The record as JSON.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.add_typer(plan_app, name="plan", rich_help_panel="Acquire")


@plan_app.command("regions")
def regions_(
    polygons: Annotated[str, typer.Argument(metavar="POLYGONS", help="GeoJSON, GeoPackage, GeoParquet or Shapefile.")],
    per_region: Annotated[int, typer.Option("--per-region", min=1, help="Places in each region.")],
    id_column: Annotated[str, typer.Option("--id-column", help="Column that names the regions.")],
    out: Out,
    layer: Annotated[str | None, typer.Option("--layer", help="Layer of a GeoPackage.")] = None,
    min_distance_km: Apart = 0.0,
    seed: Seed = 0,
    map_: Map = None,
    source: Source = "streetview",
    headings: Headings = 8,
    price: Price = None,
    rate: Rate = 10.0,
    found_share: Found = 1.0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """The same number of places in every region, uniform by area: the paper's congressional districts.

    Example: hedwig plan regions districts.geojson --per-region 18 --id-column district --out plan.csv --map plan.png
    """
    set_up(quiet=quiet, as_json=as_json)
    from hedwig.acquisition.plans import plan_regions
    from hedwig.acquisition.regions import read_regions
    from hedwig.geocells import Geography

    geography, regions = Geography.default(), read_regions(polygons, id_column, layer=layer)
    repaired = [f"{n:,} {what}" for n, what in (
        (regions.num_repaired, "invalid shapes repaired"), (regions.num_cut, "shapes cut at the antimeridian"),
        (regions.num_dissolved, "rows merged by their id"), (regions.num_left_out, "rows without id or area left out"),
    ) if n]  # fmt: skip
    if repaired:
        logger.info("%s: %s", polygons, ", ".join(repaired))
    plan = plan_regions(regions, per_region, geography=geography, min_distance_km=min_distance_km, seed=seed)
    parameters = {"per_region": per_region, "id_column": id_column, "layer": layer, "min_distance_km": min_distance_km}
    words = f"{per_region} in each of {len(regions):,} regions, uniform by area"
    asked = _asked(source, headings, price, rate, found_share)
    _finish(plan, out, parameters, seed, map_, words, asked, geography, regions)


@plan_app.command("world")
def world(
    num: Num,
    out: Out,
    country: Country = None,
    antarctica: Annotated[bool, typer.Option("--antarctica", help="Look in Antarctica too.")] = False,
    min_distance_km: Apart = 0.0,
    seed: Seed = 0,
    map_: Map = None,
    source: Source = "streetview",
    headings: Headings = 8,
    price: Price = None,
    rate: Rate = 10.0,
    found_share: Found = 1.0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Uniform by area over the land of the world, or of some countries.

    Example: hedwig plan world --num 10000 --min-distance-km 20 --out plan.csv --map plan.png
    """
    set_up(quiet=quiet, as_json=as_json)
    from hedwig.acquisition.plans import plan_world
    from hedwig.geocells import Geography

    geography = Geography.default()
    choice: dict[str, Any] = {"countries": sorted(country or ()), "leave_out": [] if antarctica else ["AQ"]}
    plan = plan_world(num, geography=geography, min_distance_km=min_distance_km, seed=seed, **choice)
    parameters = {"num": num, **choice, "min_distance_km": min_distance_km}
    asked = _asked(source, headings, price, rate, found_share)
    _finish(plan, out, parameters, seed, map_, "uniform by area over land", asked, geography)


@plan_app.command("population")
def population(
    num: Num,
    out: Out,
    alpha: Annotated[float, typer.Option("--alpha", help="Weight of a place: population to this power.")] = 1.0,
    radius_km: Annotated[float, typer.Option("--radius-km", min=0, help="Scatter around a place.")] = 5.0,
    country: Country = None,
    min_distance_km: Apart = 0.0,
    seed: Seed = 0,
    map_: Map = None,
    source: Source = "streetview",
    headings: Headings = 8,
    price: Price = None,
    rate: Rate = 10.0,
    found_share: Found = 1.0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Around GeoNames places, with probability proportional to their population (to a power).

    Example: hedwig plan population --num 10000 --alpha 0.5 --out plan.csv --map plan.png
    """
    set_up(quiet=quiet, as_json=as_json)
    from hedwig.acquisition.plans import plan_population
    from hedwig.geocells import Geography

    geography = Geography.default()
    choice: dict[str, Any] = {"alpha": alpha, "radius_km": radius_km, "countries": sorted(country or ())}
    plan = plan_population(num, geography=geography, min_distance_km=min_distance_km, seed=seed, **choice)
    parameters = {"num": num, **choice, "min_distance_km": min_distance_km}
    words = f"within {radius_km:g} km of places, in proportion to population to the power of {alpha:g}"
    asked = _asked(source, headings, price, rate, found_share)
    _finish(plan, out, parameters, seed, map_, words, asked, geography)


@plan_app.command("coverage")
def coverage(
    points: Annotated[str, typer.Argument(metavar="POINTS", help="Where imagery is known to be: CSV or Parquet.")],
    num: Num,
    out: Out,
    block_km: Annotated[float, typer.Option("--block-km", min=0.001, help="Side of the blocks.")] = 50.0,
    min_distance_km: Apart = 0.0,
    seed: Seed = 0,
    map_: Map = None,
    source: Source = "streetview",
    headings: Headings = 8,
    price: Price = None,
    rate: Rate = 10.0,
    found_share: Found = 1.0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """From points of known coverage, as evenly over blocks of equal area as they allow.

    Example: hedwig plan coverage listing.csv --num 10000 --block-km 50 --out plan.csv --map plan.png
    """
    set_up(quiet=quiet, as_json=as_json)
    from hedwig import storage
    from hedwig.acquisition.plans import plan_coverage, read_points
    from hedwig.geocells import Geography

    geography = Geography.default()
    table, num_bad = read_points(points, geography)
    if num_bad:
        logger.warning("%s: %d rows are no positions and were left out", points, num_bad)
    plan = plan_coverage(table, num, geography=geography, block_km=block_km, min_distance_km=min_distance_km, seed=seed)
    path = storage.resolve(points)
    digest = hashlib.sha256(storage.read_bytes(path)).hexdigest()
    plan.details.update(points={"source": path, "sha256": digest, "num_no_position": num_bad})
    parameters = {"num": num, "block_km": block_km, "min_distance_km": min_distance_km}
    words = f"known coverage, evenly over blocks of {block_km:g} km"
    _finish(plan, out, parameters, seed, map_, words, _asked(source, headings, price, rate, found_share), geography)


@plan_app.command("card")
def card(
    table: Annotated[str, typer.Argument(metavar="TABLE", help="Listing (CSV, Parquet) or a folder of Parquet.")],
    out: Annotated[str | None, typer.Option("--out", help="Beginning of the files; by default the table's.")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Describe a table of panoramas: counts, licences, authors, duplicates, gaps and a map.

    Example: hedwig plan card listing.csv
    """
    set_up(quiet=quiet, as_json=as_json)
    from hedwig.acquisition.card import write_card
    from hedwig.geocells import Geography

    result = write_card(table, geography=Geography.default(), out=out)
    twice = result["duplicates"]
    show(
        result,
        f"{result['num_panoramas']:,} panoramas, {result['num_positions']:,} rows with a position, "
        f"{len(result['counts']['country']):,} countries, {len(result['counts']['licence']):,} licences; "
        f"twice: {twice['same_sha256']:,} by bytes, {twice['same_pano_id']:,} by id, "
        f"{twice['near_same_time']:,} by place and time\n{result['files']['html']}",
    )


def _asked(source: str, headings: int, price: float | None, rate: float, found_share: float) -> dict[str, Any]:
    from hedwig.acquisition.costs import SERVICES
    from hedwig.schema import suggestion

    if source not in SERVICES:
        names = ", ".join(SERVICES)
        raise typer.BadParameter(f"--source {source!r} must be one of {names}.{suggestion(source, SERVICES)}")
    numbers = {"headings": headings, "price_per_1000": price, "requests_per_s": rate, "found_share": found_share}
    return {"source": source, **numbers}


def _finish(
    plan: Plan,
    out: str,
    parameters: dict[str, Any],
    seed: int,
    map_: str | None,
    words: str,
    asked: dict[str, Any],
    geography: Geography,
    regions: Regions | None = None,
) -> None:
    """Write the plan, its record and its map, and say what fetching it will take."""
    import importlib.metadata

    from hedwig import storage
    from hedwig.acquisition.costs import estimate
    from hedwig.acquisition.maps import draw_positions, png_bytes

    table = plan.table
    if not len(table):
        raise ValueError("Not one place was found; the minimum distance is too large or the source is empty.")
    content = plan.csv()
    told = estimate(len(table), **asked)
    record = {
        "kind": "plan",
        "plan": plan.kind,
        "parameters": parameters,
        "seed": seed,
        "num_asked": plan.num_asked,
        "num_places": len(table),
        "num_regions": int(table["region"].nunique()),
        "num_countries": int(table["country"].nunique()),
        "shortfall": plan.shortfall,
        **plan.details,
        "estimate": told.record(),
        "sha256": hashlib.sha256(content).hexdigest(),
        "versions": {name: importlib.metadata.version(name) for name in ("hedwig", "numpy", "shapely", "geopandas")},
    }
    path = storage.resolve(out)
    storage.write_bytes(path, content)
    storage.write_bytes(f"{path}.json", (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
    if plan.shortfall:
        worst = sorted(plan.shortfall.items(), key=lambda item: (-item[1], item[0]))
        some = ", ".join(f"{name} ({lacking:,})" for name, lacking in worst[:5])
        logger.warning(
            "%d places fewer than asked for: no more fit at this distance, or there are no more; lacking in %d: %s%s",
            sum(plan.shortfall.values()), len(worst), some, ", …" if len(worst) > 5 else "",
        )  # fmt: skip
    if map_ is not None:
        figure = draw_positions(
            table["lat"], table["lon"], geography.land_rings(0.05),
            title=f"{len(table):,} places in {record['num_regions']:,} {'regions' if regions else 'countries'}",
            subtitle=f"{words}; Equal Earth projection: areas are true",
            outlines=[] if regions is None else list(regions.geometry),
            region=None if regions is None else table["region"].tolist(),
            names=[] if regions is None else [str(i) for i in regions.ids],
        )  # fmt: skip
        storage.write_bytes(storage.resolve(map_), png_bytes(figure))
    where = f"{len(table):,} places in {record['num_regions']:,} regions: {out} (record: {out}.json)"
    drawn = f"\nMap: {map_}" if map_ is not None else ""
    show({"plan": path, "map": map_, **record}, f"{where}{drawn}\n{told.text()}")
