"""Commands for released models: fetch one, list them with their terms, check a weights file.

Only `hedwig fetch` downloads, and not before it has said what, how much, from where and under which terms.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hedwig.cli.console import DATA_REFUSED, FAILED, USAGE, Progress, set_up, show

if TYPE_CHECKING:
    from hedwig.models.fetch import Plan
    from hedwig.models.fetched import Fetched
    from hedwig.models.identify import Identity

__all__ = ["register"]

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only errors and the result.")]
Json = Annotated[bool, typer.Option("--json", help="The result as JSON.")]
MIB = 1 << 20
NUM_KEYS_SHOWN = 10
models_app = typer.Typer(no_args_is_help=True, help="The released models and their terms; what a weights file holds.")


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("fetch", rich_help_panel="Models")(fetch)
    app.add_typer(models_app, name="models", rich_help_panel="Models")


def fetch(
    name: Annotated[str, typer.Argument(help="A name of `hedwig models list`.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Download without asking.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Hash the files of a model that is here already.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Download a released model into the cache, checked.  $HEDWIG_CACHE chooses the cache, HF_ENDPOINT a mirror.

    Example: hedwig fetch viclip-l14 --yes
    """
    set_up(quiet=quiet, as_json=as_json)
    from hedwig.models.fetch import fetch as fetch_model
    from hedwig.models.fetch import plan
    from hedwig.models.fetched import adopt, find

    _known(name)
    here = find(name) or adopt(name)
    planned = None
    if here is None or here.problems():
        planned = plan(name)
        if not quiet:
            typer.echo(_plan_text(planned), err=True)
        if not yes:
            _confirm(planned)
    with Progress() as progress:
        fetched = fetch_model(
            name,
            planned=planned,
            rehash=verify,
            progress=lambda done, total: progress("MiB", done // MIB, -(-total // MIB)),
        )
    record = {**fetched.to_dict(), "downloaded": planned is not None}
    show(record, _fetched_text(fetched, downloaded=planned is not None))


def _known(name: str) -> None:
    from hedwig.models.catalogue import released

    try:
        released(name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _confirm(planned: Plan) -> None:
    if not sys.stdin.isatty():
        typer.echo(f"Error: not a terminal, so nobody can be asked; add --yes to fetch {planned.model.name}.", err=True)
        raise typer.Exit(USAGE)
    if not typer.confirm("Download?", err=True):
        typer.echo("Nothing was fetched.", err=True)
        raise typer.Exit(FAILED)


def _plan_text(planned: Plan) -> str:
    model = planned.model
    pinned = "" if model.revision else " (the newest; not pinned)"
    checked = "pinned" if model.sha256 else "not pinned; compared with the digest that the hub states"
    files = ", ".join(f"{file.path} ({_size(file.size)})" for file in planned.files[:NUM_KEYS_SHOWN])
    more = len(planned.files) - NUM_KEYS_SHOWN
    lines = [
        ("model", f"{model.name}: {model.use}"),
        ("source", f"{model.repo} at {planned.revision}{pinned}"),
        ("files", files + (f" and {more} more" if more > 0 else "")),
        ("size", _size(planned.size_bytes)),
        ("sha256", checked),
        ("licence", f"{model.licence or 'unknown here'}; the hub's tag: {planned.licence_tag or 'none'}"),
        *([("note", model.note)] if model.note else []),
        ("target", str(planned.folder)),
    ]
    return "\n".join(f"{title:<8} {text}" for title, text in lines)


def _fetched_text(fetched: Fetched, *, downloaded: bool) -> str:
    compared = {
        "pinned": "sha256 as pinned",
        "hub": "sha256 as the hub states; not pinned",
        "": "compared with nothing",
    }
    checks = sorted({compared[file.checked] for file in fetched.files})
    size = _size(sum(file.size for file in fetched.files))
    return f"{fetched.name} {'fetched' if downloaded else 'is here'}: {fetched.entry} ({size}; {', '.join(checks)})"


def _size(num_bytes: int | None) -> str:
    if num_bytes is None:
        return "unknown"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.3g} {unit}"
    return f"{num_bytes} bytes"


@models_app.command("list")
def list_(as_json: Json = False) -> None:
    """List the released models: what for, how large, under which terms, and whether they are here."""
    set_up(as_json=as_json)
    from dataclasses import asdict

    from hedwig.models.catalogue import CATALOGUE
    from hedwig.models.fetched import find

    rows: list[dict[str, Any]] = []
    lines: list[str] = []
    for model in CATALOGUE:
        try:
            found = find(model.name)
            state = "not here" if found is None else "damaged" if found.problems() else "here"
        except ValueError:  # its source.json is; the list goes on
            found, state = None, "damaged"
        path = str(found.entry) if found is not None and state == "here" else None
        rows.append({**asdict(model), "state": state, "path": path})
        size = ("" if model.size_is_exact or model.size_bytes is None else "about ") + _size(model.size_bytes)
        lines.append(f"{model.name}  ({state})")
        lines += [f"    {title:<8} {text}" for title, text in (
            ("use", model.use),
            ("source", f"{model.repo}, {'sha256 pinned' if model.sha256 else 'sha256 not pinned'}"),
            ("size", size),
            ("licence", model.licence or "unknown here; hedwig fetch shows the hub's tag before it downloads"),
            *([("note", model.note)] if model.note else []),
        )]  # fmt: skip
    show({"models": rows}, "\n".join(lines))


@models_app.command("check")
def check(
    path: Annotated[Path, typer.Argument(help="A weights file, or a model's folder.")],
    name: Annotated[str | None, typer.Option("--name", help="What it ought to be, e.g. viclip-l14.")] = None,
    as_json: Json = False,
) -> None:
    """Say what a weights file holds and whether it would load.  Exit code 3 if it would not.

    Example: hedwig models check model.safetensors --name viclip-l14
    """
    set_up(as_json=as_json)
    if not path.exists():
        raise FileNotFoundError(f"There is no {str(path)!r}; give a weights file or a model's folder.")
    from dataclasses import asdict

    from hedwig.models.identify import identify

    identity = identify(path, name=name)
    show({**asdict(identity), "good": identity.good}, _identity_text(identity))
    if not identity.good:
        raise typer.Exit(DATA_REFUSED)


def _identity_text(identity: Identity) -> str:
    loads = {True: "yes", False: "no", None: "not tried"}[identity.loads]
    lines = [
        ("architecture", identity.architecture),
        ("tensors", f"{identity.num_keys}, {identity.num_parameters:,} numbers"),
        ("sizes", ", ".join(f"{key} {value}" for key, value in identity.dims.items()) or "unknown"),
        ("dtypes", ", ".join(f"{num} {dtype}" for dtype, num in identity.dtypes.items()) or "none"),
        ("bytes", f"{identity.size_bytes:,}"),
        ("sha256 of file", identity.sha256 or "several files"),
        ("sha256 of tensors", identity.tensors_sha256 or "not computed"),
        ("loads strictly", loads),
    ]
    for title, keys in (
        ("missing", identity.missing),
        ("unexpected", identity.unexpected),
        ("misshapen", identity.misshapen),
    ):
        if keys:
            more = f" and {len(keys) - NUM_KEYS_SHOWN} more" if len(keys) > NUM_KEYS_SHOWN else ""
            lines.append((f"{len(keys)} {title}", ", ".join(keys[:NUM_KEYS_SHOWN]) + more))
    if identity.problem:
        lines.append(("problem", identity.problem))
    return "\n".join(f"{title:<18} {text}" for title, text in lines)
