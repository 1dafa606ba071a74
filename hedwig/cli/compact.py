"""``hedwig compact``: the same table in few large files."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from hedwig.cli.console import set_up, show

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("compact", rich_help_panel="Tools")(compact)


def compact(
    table: Annotated[str, typer.Argument(help="Folder of a finished table; local, s3:// or gs://.")],
    rows_per_file: Annotated[
        int | None, typer.Option("--rows-per-file", metavar="N", min=1, help="Default: what 256 MiB hold.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only errors and the result.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The result as JSON.")] = False,
) -> None:
    """Rewrite a table's many files into few large ones; nothing that was made from it has to be made again.

    Killed at any time, the old table or the new one is whole. Run it while no job reads or writes the table.

    Example: hedwig compact runs/world/embeddings
    """
    set_up(quiet=quiet, as_json=as_json)
    from hedwig.publishing import compact as rewrite

    done = rewrite(table, rows_per_file=rows_per_file)
    text = f"{table}: {done.files_before} files of {done.num_rows} rows"
    if done.files_after == done.files_before:
        text += ", already few enough"
    else:
        text += f" are now {done.files_after}, {done.rows_per_file} rows each and {done.rows_per_group} a row group"
    show(asdict(done), text)
