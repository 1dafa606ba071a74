"""``hedwig publish``, ``rollback`` and ``gc``: which version of a run is served, and what may be thrown away.

A version is published by replacing one small object, after the retriever has opened it: parts of mixed versions are
refused here and not in front of users. Nothing is deleted but by ``gc``, which lists everything first.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hedwig.cli.console import set_up, show

if TYPE_CHECKING:
    from hedwig.publishing import Pointer

__all__ = ["register"]

RunFolder = Annotated[str, typer.Argument(metavar="RUN", help="Run folder; local, s3:// or gs://.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only errors and the result.")]
Json = Annotated[bool, typer.Option("--json", help="The result as JSON.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("publish", rich_help_panel="Serve")(publish)
    app.command("rollback", rich_help_panel="Serve")(rollback)
    app.command("gc", rich_help_panel="Serve")(gc)


def publish(
    run: RunFolder,
    version: Annotated[
        str | None,
        typer.Option("--version", metavar="V", help="'.' or versions/NNNN; default: the newest that is new."),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Let a finished version of a run be the one that is read and served; later runs grow beside it.

    Example: hedwig publish runs/world
    """
    set_up(quiet=quiet, as_json=as_json)
    from hedwig import publishing
    from hedwig.retrieve import load_retriever

    _show(run, publishing.publish(run, load_retriever, version), "Published")


def rollback(run: RunFolder, quiet: Quiet = False, as_json: Json = False) -> None:
    """Go back to the version that was published before.

    Example: hedwig rollback runs/world
    """
    set_up(quiet=quiet, as_json=as_json)
    from hedwig import publishing

    _show(run, publishing.rollback(run), "Rolled back to")


def _show(run: str, pointer: Pointer, what: str) -> None:
    from hedwig.publishing import version_folder

    now = pointer.current
    lines = [f"{what} {now.version} of {run}: {now.num_panoramas} panoramas, {now.model_id or 'unknown model'}"]
    lines += [f"  before: {p.version}, published {p.published_at}" for p in pointer.history]
    lines += [f"  rolled back: {p.version}" for p in pointer.withdrawn]
    show({**asdict(pointer), "folder": version_folder(run, now.version)}, "\n".join(lines))


def gc(
    run: RunFolder,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would go.")] = False,
    keep: Annotated[
        int | None, typer.Option("--keep", min=0, help="Earlier published versions kept for rollback; default: all.")
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Delete what neither the pointer nor a manifest refers to: rolled back and overtaken versions, leftovers.

    Example: hedwig gc runs/world --keep 1 --dry-run
    """
    set_up(quiet=quiet, as_json=as_json)
    from hedwig.publishing import collect_garbage, find_garbage

    garbage = find_garbage(run, keep=keep)
    if not dry_run:
        collect_garbage(run, garbage)
    total = sum(one.num_bytes for one in garbage)
    verb = "would go" if dry_run else "deleted"
    lines = [f"{one.num_bytes / 1e6:12.3f} MB  {one.path}: {one.why}" for one in garbage]
    lines.append(f"{len(garbage)} things, {total / 1e6:.3f} MB {verb}")
    result: dict[str, Any] = {"dry_run": dry_run, "num_bytes": total, "garbage": [asdict(one) for one in garbage]}
    show(result, "\n".join(lines))
