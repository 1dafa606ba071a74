"""Commands that judge answers: a run's held-out split, two tables of anybody's, runs side by side, a blind guess."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hedwig.cli.console import set_up, show

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd

__all__ = ["register"]

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only errors and the result.")]
Json = Annotated[bool, typer.Option("--json", help="The result as JSON.")]
Bootstrap = Annotated[int, typer.Option("--bootstrap", min=10, help="Resamplings of the 95 % intervals.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of the resampling.")]
LEVELS = ("1", "25", "200", "750", "2500")
_FAULTS = {
    "no_id": "rows without an id",
    "no_position": "rows without a usable position",
    "duplicate": "rows whose id came before (the first counts)",
    "missing": "queries without an answer",
    "unknown": "answers that nobody asked for",
}


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("evaluate", rich_help_panel="Make")(evaluate)
    app.command("compare", rich_help_panel="Make")(compare)
    app.command("expected-error", rich_help_panel="Make")(expected_error)


def evaluate(
    what: Annotated[
        list[str],
        typer.Argument(metavar="EXPERIMENT [KEY=VALUE]... | PREDICTIONS TRUTH", help="An experiment, or two tables."),
    ],
    force: Annotated[bool, typer.Option("--force", help="Make the report anew even when it is up to date.")] = False,
    protocol: Annotated[
        str | None, typer.Option("--protocol", help="im2gps3k, yfcc4k, osv5m or gws15k: published figures beside.")
    ] = None,
    places: Annotated[
        bool, typer.Option("--places", help="Tables: also right country and region, and a line per country.")
    ] = False,
    num_bootstrap: Bootstrap = 1000,
    seed: Seed = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Score an experiment's held-out split and write its report; or score a table of answers against the truth.

    Tables are .csv, .tsv or .parquet with pano_id (or id), lat and lon; every row of both is accounted for. Where a
    table also has pred_lat and pred_lon, or true_lat and true_lon, these are taken.

    Example: hedwig evaluate predictions.csv truth.csv --json
    """
    set_up(quiet=quiet, as_json=as_json)
    if what[0].lower().endswith((".yaml", ".yml")):
        if protocol is not None or places:
            raise typer.BadParameter("--protocol and --places are for two tables; the report of a run has its own")
        from hedwig.cli.make import _run
        from hedwig.config import load_experiment

        _run(load_experiment(what[0], what[1:]), "evaluate", "evaluate", force=force)
        return
    if len(what) != 2:
        raise typer.BadParameter(f"give one experiment (.yaml) or two tables, PREDICTIONS and TRUTH; got {len(what)}")
    from hedwig.evaluate import read_positions, score_tables
    from hedwig.sources.protocols import PROTOCOLS

    if protocol is not None and protocol not in PROTOCOLS:
        raise typer.BadParameter(f"--protocol {protocol} is none of {', '.join(PROTOCOLS)}")
    predictions, truth = read_positions(what[0], "pred_"), read_positions(what[1], "true_")
    found = score_tables(predictions, truth, num_bootstrap=num_bootstrap, seed=seed)
    text = _scores_text(found)
    if places:
        placed, lines = _placed(predictions, truth)
        found |= placed
        text += lines
    if protocol is not None:
        published, lines = _published(protocol, found)
        found["protocol"] = published
        text += lines
    show(found, text)


def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN...", help="Folders of runs; the first is the base.")],
    table: Annotated[str | None, typer.Option("--csv", metavar="FILE", help="Also write a table, one line a run.")] = (
        None
    ),
    num_bootstrap: Bootstrap = 1000,
    seed: Seed = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Set runs side by side on the test queries that all of them answered and none trained on.

    Example: hedwig compare runs/hedwig runs/pigeon --csv comparison.csv
    """
    set_up(quiet=quiet, as_json=as_json)
    if len(runs) < 2:
        raise typer.BadParameter("give at least two run folders")
    from hedwig import storage
    from hedwig.evaluate import compare_runs
    from hedwig.report import console_table

    names = _names(runs)
    found = compare_runs(
        {name: _read_run(path) for name, path in zip(names, runs, strict=True)}, num_bootstrap=num_bootstrap, seed=seed
    )
    text = console_table({"methods": {**found["methods"], **found["floors"]}}, synthetic=False, encoder_note="")
    text += f"\n{found['num_queries']:,} queries are in the test split of every run and answered by all."
    for name, counts in found["left_out"].items():
        text += (
            f"\n  {name}: {counts['num_test']:,} in its test split, {counts['num_unanswered']:,} without an answer, "
        )
        text += f"{counts['num_not_common']:,} answered but not common to all"
    if found["num_trained_elsewhere"]:
        text += f"\n  {found['num_trained_elsewhere']:,} test queries were left out: another run trained on them."
    for name, differences in found["paired"].items():
        text += f"\n{name} minus {found['first']}:{_differences_text(differences)}"
    if table is not None:
        storage.write_bytes(storage.resolve(table), _csv(found).encode())
        text += f"\nTable: {table}"
    show(found, text)


def expected_error(
    points: Annotated[
        str | None, typer.Argument(metavar="POINTS", help="CSV or Parquet with lat, lon: training places.")
    ] = None,
    queries: Annotated[
        str | None, typer.Option("--queries", metavar="POINTS", help="Asked places; without, POINTS themselves.")
    ] = None,
    rectangle: Annotated[
        str | None, typer.Option("--rectangle", metavar="WxH", help="Two uniform points of so many km, 4500x2500.")
    ] = None,
    num_pairs: Annotated[int, typer.Option("--pairs", min=2, help="Pairs to draw.")] = 1_000_000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the draw.")] = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Expected error of a guess that looks at nothing, by Monte Carlo: a random place, or a point in a rectangle.

    Example: hedwig expected-error --rectangle 4500x2500
    """
    set_up(quiet=quiet, as_json=as_json)
    from hedwig import evaluate as judge
    from hedwig.geocells import read_points

    if (points is None) == (rectangle is None):
        raise typer.BadParameter("give either POINTS or --rectangle WxH")
    if rectangle is not None:
        if queries is not None:
            raise typer.BadParameter("--queries goes with POINTS, not with --rectangle")
        try:
            width, height = (float(side) for side in rectangle.lower().split("x"))
        except ValueError:
            raise typer.BadParameter(f"--rectangle {rectangle} is not WxH in km, such as 4500x2500") from None
        found = judge.expected_error_on_rectangle(width, height, num_pairs=num_pairs, seed=seed)
    else:
        lat, lon, _ = read_points(points or "")
        asked = read_points(queries)[:2] if queries is not None else (None, None)
        found = judge.expected_error(lat, lon, *asked, num_pairs=num_pairs, seed=seed)
    text = (
        f"mean {found['mean_km']:,.1f} km, standard error {found['standard_error_km']:,.2f} km; median "
        f"{found['median_km']:,.1f} km; of {found['num_pairs']:,} pairs"
    )
    shares = found["accuracy_at_km"]
    show(found, text + "".join(f"\n< {km:>5} km  {100 * share:6.2f} %" for km, share in shares.items()))


def _read_run(path: str) -> Any:
    from hedwig import storage
    from hedwig.evaluate import ComparedRun

    folder = storage.resolve(path)
    for part in ("predictions", "embeddings"):
        if storage.read_manifest(storage.join(folder, part)) is None:
            raise FileNotFoundError(f"{path} has no finished {part}/; give the folder of a run, made by `hedwig run`.")
    return ComparedRun(
        panoramas=storage.read_table(
            storage.join(folder, "embeddings"), ["pano_id", "lat", "lon", "split"]
        ).to_pandas(),
        predictions=storage.read_table(storage.join(folder, "predictions"), ["pano_id", "lat", "lon"]).to_pandas(),
    )


def _names(runs: Sequence[str]) -> list[str]:
    """The folders' own names, or the paths where two are called the same or like a floor."""
    from hedwig.report.tables import METHODS

    short = [path.rstrip("/").rsplit("/", 1)[-1] for path in runs]
    clear = len(set(short)) == len(short) and not {method.name for method in METHODS} & set(short)
    names = short if clear else [f"{path.rstrip('/')}/" for path in runs]
    if len(set(names)) < len(names):
        raise typer.BadParameter(f"the same run was given twice: {', '.join(runs)}")
    return names


def _scores_text(found: Mapping[str, Any]) -> str:
    def between(bounds: Sequence[float], scale: float = 1.0) -> str:
        return f"[{scale * bounds[0]:,.1f}, {scale * bounds[1]:,.1f}]"

    asked = found["unanswered_as_wrong"]
    lines = [
        f"{found['num_queries']:,} of {asked['num_queries']:,} queries answered "
        f"({100 * found['share_answered']:.1f} %); 95 % intervals in brackets",
        f"median    {found['median_km']:,.1f} km {between(found['median_km_ci'])}",
        f"mean      {found['mean_km']:,.1f} km {between(found['mean_km_ci'])}",
        f"GeoScore  {found['geoscore']:,.1f} {between(found['geoscore_ci'])}",
    ]
    for km in LEVELS:
        share, bounds = found["accuracy_at_km"][km], between(found["accuracy_ci"][km], 100)
        lines.append(f"< {km:>4} km {100 * share:5.1f} % {bounds}")
    if found["share_answered"] < 1:
        wrong = ", ".join(f"{100 * asked['accuracy_at_km'][km]:.1f}" for km in LEVELS)
        lines.append(f"With every unanswered query as wrong: {wrong} %, GeoScore {asked['geoscore']:,.1f}")
    for name, account in found["accounting"].items():
        lines.append(f"{name}: {account['num_rows']:,} rows, {account['num_used']:,} used")
        for fault, words in _FAULTS.items():
            if account.get(f"num_{fault}"):
                more = ", ..." if account[f"num_{fault}"] > len(account[fault]) else ""
                examples = ", ".join(map(str, account[fault]))
                lines.append(f"  {account[f'num_{fault}']:,} {words}: {examples}{more}")
    return "\n".join(lines)


def _placed(predictions: pd.DataFrame, truth: pd.DataFrame) -> tuple[dict[str, Any], str]:
    from hedwig.evaluate import join_answered, places_answered
    from hedwig.geocells import Geography
    from hedwig.metrics import by_group

    geography = Geography.default()
    joined, _ = join_answered(predictions, truth)
    placed, own, _ = places_answered(joined, geography.lookup, geography.places())
    placed["countries"] = by_group(joined["error_km"], own.country)
    text = ""
    for level, row in placed["admin"].items():
        if row["share"] is not None:
            low, high = (100 * bound for bound in row["ci"])
            text += f"\nright {level:<8} {100 * row['share']:5.1f} % [{low:.1f}, {high:.1f}] of {row['num_queries']:,}"
    slices = [{"group": name, **row} for name, row in placed["urban"].items()]
    for row in (*slices, *placed["countries"]):
        low, high = (100 * bound for bound in row["accuracy_at_750_km_ci"])
        text += f"\n{row['group']:<6} n {row['num_queries']:>7,}  median {row['median_km']:>9,.1f} km  < 750 km "
        text += f"{100 * row['accuracy_at_750_km']:5.1f} % [{low:.1f}, {high:.1f}]"
    return placed, text


def _published(name: str, found: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    from dataclasses import asdict

    from hedwig.sources.protocols import PROTOCOLS, PUBLISHED

    protocol, asked = PROTOCOLS[name], found["unanswered_as_wrong"]["num_queries"]
    rows = [
        ["these answers", *(f"{100 * found['accuracy_at_km'][km]:.1f}" for km in LEVELS)]
        + [f"{found[key]:,.0f}" for key in ("geoscore", "mean_km", "median_km")]
        + [f"{found['num_queries']:,} queries"]
    ]
    for entry in PUBLISHED[name]:
        values = [*entry.accuracy, entry.geoscore, entry.mean_km, entry.median_km]
        rows.append([entry.method, *("-" if value is None else f"{value:g}" for value in values), entry.source])
    heads = [protocol.title, *(f"@{km}" for km in LEVELS), "GeoScore", "mean km", "median km", "source"]
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:-1], widths[1:-1], strict=True)), row[-1]]
        )
        for row in (heads, *rows)
    ]
    notes = ["Published figures as others printed them; none was computed again here."]
    if protocol.num_queries is not None and asked != protocol.num_queries:
        notes.append(f"{protocol.title} has {protocol.num_queries:,} queries, this truth {asked:,}: not comparable.")
    if found["share_answered"] < 1:
        notes.append("Not every query was answered: not comparable.")
    record = {
        "name": name,
        "num_queries": protocol.num_queries,
        "published": [asdict(row) for row in PUBLISHED[name]],
        "notes": notes,
    }
    return record, "\n\n" + "\n".join([*lines, *notes])


def _differences_text(differences: Mapping[str, Any]) -> str:
    def line(label: str, row: Mapping[str, Any], scale: float, unit: str) -> str:
        low, high = (scale * bound for bound in row["ci"])
        return f"\n  {label:<10} {scale * row['difference']:+,.1f}{unit} [{low:+,.1f}, {high:+,.1f}]  p {row['p']:.3f}"

    text = line("median", differences["median_km"], 1, " km") + line("GeoScore", differences["geoscore"], 1, "")
    for km, row in differences["accuracy_at_km"].items():
        text += line(f"< {km} km", row, 100, " points")
    return text


def _csv(found: Mapping[str, Any]) -> str:
    """One line per run and floor: its numbers, and the paired differences where there are any."""
    out = io.StringIO()
    heads = ["name", "kind", "num_queries", "median_km", "median_km_low", "median_km_high", "mean_km", "geoscore"]
    heads += ["geoscore_low", "geoscore_high"]
    heads += [f"accuracy_at_{km}_km{end}" for km in LEVELS for end in ("", "_low", "_high")]
    paired = ["median_km", "geoscore", *(f"accuracy_at_{km}_km" for km in LEVELS)]
    heads += [f"{name}_minus_first{end}" for name in paired for end in ("", "_low", "_high", "_p")]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(heads)
    for kind in ("methods", "floors"):
        for name, row in found[kind].items():
            cells = [name, kind.removesuffix("s"), row["num_queries"], row["median_km"], *row["median_km_ci"]]
            cells += [row["mean_km"], row["geoscore"], *row["geoscore_ci"]]
            for km in LEVELS:
                cells += [row["accuracy_at_km"][km], *row["accuracy_ci"][km]]
            difference = found["paired"].get(name) if kind == "methods" else None
            if difference is None:
                cells += [""] * (4 * len(paired))
            else:
                levels = difference["accuracy_at_km"]
                for part in (difference["median_km"], difference["geoscore"], *(levels[km] for km in LEVELS)):
                    cells += [part["difference"], *part["ci"], part["p"]]
            writer.writerow(cells)
    return out.getvalue()
