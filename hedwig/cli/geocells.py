"""``hedwig geocells``: partition the Earth by any set of points, and compare ways to do it before anything is trained.

`build` writes the table that a run has in ``geocells/``; `compare` builds several partitions of the same points and
puts their numbers, and with ``--map`` their pictures, side by side. Neither needs an experiment, Ray or a network.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hedwig.cli.console import set_up, show

if TYPE_CHECKING:
    from hedwig.cli.geocells_map import Panel
    from hedwig.geocells import Geocells, Geography

__all__ = ["register"]

geocells_app = typer.Typer(no_args_is_help=True, help="Partition the Earth by points; compare partitions.")

Builder = Literal["admin", "kmeans", "quadtree", "quadtree-adaptive", "h3"]
Points = Annotated[
    str, typer.Argument(metavar="POINTS", help="CSV or Parquet with lat, lon; or two bare columns, latitude first.")
]
Least = Annotated[int | None, typer.Option("--min", min=1, help="Fewest points of a cell.")]
Most = Annotated[int | None, typer.Option("--max", min=1, help="Most points of a cell.")]
Clusters = Annotated[int | None, typer.Option("--clusters", min=1, help="Number of cells, for kmeans.")]
Depth = Annotated[int, typer.Option("--depth", min=1, max=30, help="Cuts of the quadtree.")]
Levels = Annotated[int, typer.Option("--levels", min=2, max=4, help="Levels of the hierarchy, the cells included.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of kmeans.")]
Admin0 = Annotated[str | None, typer.Option("--admin0", metavar="PATH", help="Country polygons, with ISO codes.")]
Admin1 = Annotated[list[str] | None, typer.Option("--admin1", metavar="PATH", help="Admin-1 polygons; repeatable.")]
Admin2 = Annotated[list[str] | None, typer.Option("--admin2", metavar="PATH", help="Admin-2 polygons; repeatable.")]
Map = Annotated[str | None, typer.Option("--map", metavar="PNG", help="Draw the cells.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only errors and the result.")]
Json = Annotated[bool, typer.Option("--json", help="The result as JSON.")]

# Bounds where none are given: PIGEON's, OSV-5M's, and for hexagons, which divide by seven, ten times the least.
BOUNDS = {"admin": (30, 60), "kmeans": (30, 60), "quadtree": (1, 999), "quadtree-adaptive": (30, 100), "h3": (30, 300)}
COLUMNS = (
    ("builder", "builder"), ("cells", "num_cells"), ("min", "min_size"), ("median", "median_size"),
    ("max", "max_size"), ("balance", "balance"), ("oracle median km", "oracle_median_km"),
    ("mean km", "oracle_mean_km"), ("p90 km", "oracle_p90_km"), ("border purity", "border_purity"),
    ("median km2", "median_area_km2"), ("uncovered", "uncovered"), ("overlaps", "overlaps"), ("s", "seconds"),
)  # fmt: skip


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.add_typer(geocells_app, name="geocells", rich_help_panel="Make")


@geocells_app.command("build")
def build(
    points: Points,
    out: Annotated[str, typer.Option("--out", help="Folder of the cells: local, s3:// or gs://.")],
    builder: Annotated[Builder, typer.Option("--builder", help="How to partition.")] = "admin",
    least: Least = None,
    most: Most = None,
    clusters: Clusters = None,
    depth: Depth = 10,
    levels: Levels = 3,
    seed: Seed = 0,
    admin0: Admin0 = None,
    admin1: Admin1 = None,
    admin2: Admin2 = None,
    map_: Map = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Partition the Earth and write geocells.parquet (GeoParquet), anchors.parquet and a manifest.

    Without bounds: admin and kmeans 30 to 60 points, quadtree at most 999, h3 30 to 300; kmeans with --clusters alone
    is plain k-means.

    Example: hedwig geocells build points.csv --builder admin --min 30 --max 60 --out runs/cells --map cells.png
    """
    set_up(quiet=quiet, as_json=as_json)
    from hedwig import storage
    from hedwig.geocells import read_points

    lat, lon, num_left_out = read_points(points)
    geography = _geography(admin0, admin1, admin2)
    options = {"depth": depth, "levels": levels, "seed": seed}
    cells, record = _built(builder, lat, lon, geography, least, most, clusters, options)
    with storage.writing(out) as folder:
        cells.save(folder)
    storage.publish(
        out, kind="geocells", config=record["settings"], inputs={}, num_in=len(lat) + num_left_out, num_out=len(lat),
        num_rejected=num_left_out, rejected_reasons={"no position": num_left_out} if num_left_out else {},
        details=record, seconds=record["seconds"],
    )  # fmt: skip
    if map_ is not None:
        _draw([_panel(builder, cells, record)], lat, lon, geography, map_)
    result = {"output": out, "num_left_out": num_left_out, **record, "map": map_}
    show(result, _table([record]) + f"\n\n{_levels_text(record)}\nCells: {out}" + (f"\nMap:   {map_}" if map_ else ""))


@geocells_app.command("compare")
def compare(
    points: Points,
    builder: Annotated[
        list[str] | None, typer.Option("--builder", help=f"One of {', '.join(BOUNDS)}; repeatable.  [default: all]")
    ] = None,
    least: Least = None,
    most: Most = None,
    clusters: Clusters = None,
    depth: Depth = 10,
    seed: Seed = 0,
    admin0: Admin0 = None,
    admin1: Admin1 = None,
    admin2: Admin2 = None,
    osv5m: Annotated[
        str | None, typer.Option("--osv5m-quadtree", metavar="CSV", help="OSV-5M's quadtree_10_1000.csv, as one more.")
    ] = None,
    map_: Map = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Build several partitions of the same points and compare sizes, areas, borders and the error they leave.

    The oracle error is that of a classifier that never errs; it falls with the number of cells, so kmeans without
    --clusters and bounds makes as many as admin did.

    Example: hedwig geocells compare points.csv --builder admin --builder h3 --map cells.png
    """
    set_up(quiet=quiet, as_json=as_json)
    from hedwig.geocells import read_points

    lat, lon, num_left_out = read_points(points)
    geography = _geography(admin0, admin1, admin2)
    records: list[dict[str, Any]] = []
    panels: list[Panel] = []
    chosen = builder or list(BOUNDS)
    unknown = sorted(set(chosen) - set(BOUNDS))
    if unknown:
        raise typer.BadParameter(f"unknown builder {', '.join(unknown)}; use {', '.join(BOUNDS)}")
    for name in chosen:
        number = clusters if name == "kmeans" else None
        if name == "kmeans" and clusters is None and least is None and most is None:
            number = next((record["num_cells"] for record in records if record["builder"] == "admin"), None)
        cells, record = _built(name, lat, lon, geography, least, most, number, {"depth": depth, "seed": seed})
        records.append(record)
        if map_ is not None:
            panels.append(_panel(name, cells, record))
    if osv5m is not None:
        record, panel = _published(osv5m, lat, lon, geography)
        records.append(record)
        panels.append(panel)
    if map_ is not None:
        _draw(panels, lat, lon, geography, map_)
    result = {"num_points": len(lat), "num_left_out": num_left_out, "builders": records, "map": map_}
    show(result, _table(records) + (f"\n\nMap: {map_}" if map_ else ""))


def _geography(admin0: str | None, admin1: list[str] | None, admin2: list[str] | None) -> Geography:
    from hedwig.geocells import Geography

    if admin0 is None:
        if admin1 or admin2:
            raise typer.BadParameter("--admin1 and --admin2 need --admin0 PATH: the country polygons above them")
        return Geography.default()
    return Geography.from_polygons(admin0, admin1 or None, admin2 or None)


def _built(
    builder: Any, lat: Any, lon: Any, geography: Geography, least: int | None, most: int | None,
    clusters: int | None, options: dict[str, Any],
) -> tuple[Geocells, dict[str, Any]]:  # fmt: skip
    """The cells and their record; seconds are those of building, not of measuring."""
    from hedwig.geocells import build_geocells, measure

    low, high = BOUNDS[builder]
    if clusters is not None and least is None and most is None:
        low, high = 0, len(lat)  # plain k-means
    low, high = low if least is None else least, high if most is None else most
    if least is not None and most is None:
        high = max(high, 2 * least)
    low = min(low, high) if least is None else low
    started, started_cpu = time.perf_counter(), time.process_time()
    settings = {"builder": builder, "min": low, "max": high, "clusters": clusters, **options}
    cells = build_geocells(
        lat, lon, method=builder, min_panoramas=low, max_panoramas=high, num_cells=clusters, geography=geography,
        **options,
    )  # fmt: skip
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
    record = {"builder": builder, **measure(cells, lat, lon, geography.lookup(lat, lon))}
    levels = {level.column: len(level.names) for level in cells.hierarchy()}
    times = {"seconds": round(seconds, 2), "cpu_seconds": round(cpu_seconds, 2)}
    return cells, {**record, **times, "levels": levels, "settings": settings}


def _published(path: str, lat: Any, lon: Any, geography: Geography) -> tuple[dict[str, Any], Panel]:
    import numpy as np
    import shapely

    from hedwig.cli.geocells_map import Panel
    from hedwig.geocells import PublishedQuadtree, measure_published

    started = time.perf_counter()
    boxes = PublishedQuadtree.read(path)
    record = {"builder": "osv5m", **measure_published(boxes, lat, lon, geography.lookup(lat, lon))}
    record |= {"seconds": round(time.perf_counter() - started, 2), "num_published": len(boxes)}
    owner = boxes.assign(lat, lon)
    sizes = np.bincount(owner[owner >= 0], minlength=len(boxes))
    south, west, north, east = boxes.box[sizes > 0].T
    shapes = np.asarray(shapely.box(west, south, east, north), dtype=object)
    return record, Panel("OSV-5M as published", _words(record), shapes, sizes[sizes > 0])


def _panel(builder: str, cells: Geocells, record: dict[str, Any]) -> Panel:
    from hedwig.cli.geocells_map import Panel

    settings = record["settings"]
    bounds = " without bounds" if settings["min"] == 0 else f" {settings['min']:,} to {settings['max']:,}"
    sizes = cells.table["num_panoramas"].to_numpy()
    return Panel(f"{builder}{bounds}", _words(record), cells.table.geometry.to_numpy(), sizes)


def _words(record: dict[str, Any]) -> str:
    return (
        f"{record['num_cells']:,} cells of {record['min_size']:,} to {record['max_size']:,} · perfect cell "
        f"{record['oracle_median_km']:.0f} km median, {record['oracle_mean_km']:.0f} km mean · border purity "
        f"{record['border_purity']:.1%} · balance {record['balance']:.2f}"
    )


def _draw(panels: list[Panel], lat: Any, lon: Any, geography: Geography, path: str) -> None:
    from hedwig import storage
    from hedwig.cli.geocells_map import draw_partitions
    from hedwig.report.drawing import png_bytes

    figure = draw_partitions(panels, lat, lon, geography.land_rings(0.2), geography.land_rings(0.01))
    storage.write_bytes(path, png_bytes(figure, max_bytes=5_000_000))


def _levels_text(record: dict[str, Any]) -> str:
    parts = [f"{number:,} {column}" for column, number in record["levels"].items()]
    off = f"{record['num_off_polygon']:,} points off every country polygon, at most {record['max_off_polygon_km']} km"
    return f"Levels: {', '.join(parts)}, {record['num_cells']:,} cells.  {off}."


def _table(records: list[dict[str, Any]]) -> str:
    rows = [[name for name, _ in COLUMNS]]
    rows += [[_cell(record.get(key, "")) for _, key in COLUMNS] for record in records]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(
            v.ljust(w) if i == 0 else v.rjust(w) for i, (v, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.3f}" if abs(value) <= 1 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
