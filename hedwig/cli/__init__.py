"""The command line: one command per stage, results on stdout, everything else on stderr.

``hedwig --help`` answers without loading torch or ray: every command imports what it needs when it runs.
Exit codes: 0 done, 1 failed, 2 wrong usage or settings, 3 the data was refused, 130 interrupted.
"""

from __future__ import annotations

from typing import Annotated

import typer

from hedwig.cli import (
    acquire,
    ask,
    bench,
    compact,
    data,
    diffusion,
    evaluate,
    experiment,
    geocells,
    keys,
    make,
    models,
    plan,
    plan_run,
    publish,
    submit,
    tools,
)
from hedwig.cli.console import HedwigGroup, console

__all__ = ["app", "main"]

app = typer.Typer(
    name="hedwig",
    cls=HedwigGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Where on Earth was this panorama taken? Embeddings, geocells, retrieval and serving on Ray.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or settings, 3 data refused, 130 interrupted.",
)


def _version(value: bool) -> None:
    if value:
        typer.echo(tools.versions_text())
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show versions and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    console.debug = debug


make.register(app)
evaluate.register(app)
experiment.register(app)
geocells.register(app)
ask.register(app)
keys.register(app)
data.register(app)
tools.register(app)
models.register(app)
bench.register(app)
acquire.register(app)
diffusion.register(app)
plan.register(app)
plan_run.register(app)
publish.register(app)
compact.register(app)
submit.register(app)


def main() -> None:
    """Entry point of the ``hedwig`` command."""
    app()
