"""The command that runs a matrix of experiments and prints the paper's tables."""

from __future__ import annotations

from typing import Annotated

import typer

from hedwig.cli.console import Progress, set_up, show

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("experiment", rich_help_panel="Make")(experiment)


def experiment(
    matrix: Annotated[str, typer.Argument(metavar="MATRIX", help="Matrix file, e.g. experiments/paper_us.yaml")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. base.data.panoramas=listing.csv")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the experiments; run nothing.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only errors and the result.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The result as JSON.")] = False,
) -> None:
    """Run every combination of a matrix, sharing stages, and print the paper's tables.

    Example: hedwig experiment experiments/paper_us.yaml
    """
    set_up(quiet=quiet, as_json=as_json)
    from hedwig.config import load_matrix

    loaded = load_matrix(matrix, overrides or ())
    if dry_run:
        outputs = {cell.name: cell.experiment.output for cell in loaded.cells}
        show(outputs, "\n".join(f"{name}: {output}" for name, output in outputs.items()))
        return
    from hedwig.pipelines.matrix import run_matrix

    with Progress() as progress:
        result = run_matrix(loaded, progress)
    show(result, result["text"])
