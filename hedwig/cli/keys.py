"""Commands for whoever runs a service for others: its API keys, and its audit log.

The file of keys is named by HEDWIG_API_KEYS_FILE, for these commands and for the service alike; it holds digests, so
a key is shown once, when it is made. A running service sees a change within a second.
"""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from hedwig.cli.console import console, set_up, show

__all__ = ["register"]

File = Annotated[
    Path | None, typer.Option("--file", help="File of the keys; default: what HEDWIG_API_KEYS_FILE names.")
]
Json = Annotated[bool, typer.Option("--json", help="The result as JSON.")]
keys_app = typer.Typer(no_args_is_help=True, help="API keys of the service: make, list, revoke.")
audit_app = typer.Typer(no_args_is_help=True, help="The service's audit log.")


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.add_typer(keys_app, name="keys", rich_help_panel="Ask")
    app.add_typer(audit_app, name="audit", rich_help_panel="Ask")


@keys_app.command("new")
def new(
    name: Annotated[str, typer.Argument(help="Whose key it is, for people.")],
    scopes: Annotated[
        list[str] | None,
        typer.Option("--scope", help="read, locate, neighbours or metrics; may be repeated. Default: read and locate."),
    ] = None,
    days: Annotated[float | None, typer.Option("--days", help="Good for so many days; default: for ever.")] = None,
    file: File = None,
    as_json: Json = False,
) -> None:
    """Make a key, show it once, and keep its digest.

    Example: HEDWIG_API_KEYS_FILE=keys.json hedwig keys new "map team" --scope read --scope locate --days 90
    """
    set_up(as_json=as_json)
    from hedwig.serving.keys import new_key, write_keys

    path = _file(file)
    keys = _read(path, must_exist=False)
    text, key = new_key(name, scopes or ("read", "locate"), days=days)
    write_keys(path, [*keys, key])
    if not console.json:
        typer.echo(f"Key {key.id} ({', '.join(key.scopes)}) is in {path}; it is shown only now:", err=True)
    show({**_record(key), "key": text, "file": str(path)}, text)


@keys_app.command("list")
def list_(file: File = None, as_json: Json = False) -> None:
    """List the keys: id, name, scopes, expiry; the keys themselves are kept nowhere."""
    set_up(as_json=as_json)
    records = [_record(key) for key in _read(_file(file))]
    lines = [
        f"{r['id']:<10} {', '.join(r['scopes']):<32} {r['expires'] or 'never':<20} "
        f"{'expired' if r['expired'] else 'good':<8} {r['name']}"
        for r in records
    ]
    show({"keys": records}, "\n".join(lines) or "no keys")


@keys_app.command("revoke")
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As `hedwig keys list` shows it.")],
    file: File = None,
    as_json: Json = False,
) -> None:
    """Take a key out; a running service refuses it from then on."""
    set_up(as_json=as_json)
    from hedwig.serving.keys import write_keys

    path = _file(file)
    keys = _read(path)
    left = [key for key in keys if key.id != key_id]
    if len(left) == len(keys):
        raise ValueError(f"{path} has no key {key_id!r}; it has {', '.join(key.id for key in keys) or 'none'}.")
    write_keys(path, left)
    show({"revoked": key_id, "num_left": len(left)}, f"{key_id} is revoked; {len(left)} keys are left in {path}")


@audit_app.command("verify")
def audit_verify(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Of one replica, the oldest first.")],
    last: Annotated[str | None, typer.Option("--last", help="A hash that was seen before; it must be there.")] = None,
    as_json: Json = False,
) -> None:
    """Check that no line of an audit log was changed, put in, moved or taken out.

    Example: hedwig audit verify audit/audit-*.jsonl
    """
    set_up(as_json=as_json)
    from hedwig.serving.audit import verify

    found = verify(files, last_hash=last)
    end = "closed in order" if found.closed else "open at its end: still being written, killed, or cut off there"
    show(
        {"num_lines": found.num_lines, "last_hash": found.last_hash, "closed": found.closed},
        f"{found.num_lines} lines hold; {end}; last hash {found.last_hash}",
    )


def _file(given: Path | None) -> Path:
    from hedwig.serving.keys import KEYS_FILE_VARIABLE

    path = given or (Path(os.environ[KEYS_FILE_VARIABLE]) if os.environ.get(KEYS_FILE_VARIABLE) else None)
    if path is None:
        raise typer.BadParameter(f"name the file of the keys: set {KEYS_FILE_VARIABLE}, or give --file")
    return path


def _read(path: Path, *, must_exist: bool = True) -> tuple[Any, ...]:
    from hedwig.serving.keys import read_keys

    if not path.exists() and not must_exist:
        return ()
    return read_keys(path)


def _record(key: Any) -> dict[str, Any]:
    expires = None if key.expires is None else datetime.fromtimestamp(key.expires, UTC).isoformat(timespec="seconds")
    return {
        "id": key.id,
        "name": key.name,
        "scopes": list(key.scopes),
        "expires": expires,
        "expired": key.expired(time.time()),
    }
