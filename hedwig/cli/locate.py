"""`hedwig locate`: many images to a running service at once, and what it says of them to a file.

JSON lines are written as answers arrive, so that an interrupted run goes on where it ended: images that the output
already answers are not sent again. GeoJSON and CSV are written whole, in the order of the images. The key comes from
the environment; on a command line it would be seen by everybody on the machine.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import typer

from hedwig.cli.console import Progress, set_up

__all__ = ["register"]

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
Format = Literal["jsonl", "geojson", "csv"]
Tell = Callable[[str, dict[str, Any]], None]


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command("locate", rich_help_panel="Ask")(locate)


def locate(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Images, or folders of images.")],
    server: Annotated[str, typer.Option("--server", help="Address of a service.")] = "http://127.0.0.1:8000",
    out: Annotated[Path | None, typer.Option("--out", help="Write here; default: standard output.")] = None,
    form: Annotated[Format | None, typer.Option("--format", help="Default: by the name of --out, else jsonl.")] = None,
    top_k: Annotated[int, typer.Option("--top-k", min=1, max=50, help="Cells and neighbours to list.")] = 5,
    concurrency: Annotated[int, typer.Option(min=1, max=256, help="Images under way at once.")] = 8,
    explain: Annotated[bool, typer.Option("--explain", help="Weigh every frame; takes twice as long.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only errors and the result.")] = False,
) -> None:
    """Ask a running service where images were taken, many at once.  HEDWIG_API_KEY holds the key, if it wants one.

    Example: hedwig locate photos/ --server http://127.0.0.1:8000 --out answers.jsonl
    """
    set_up(quiet=quiet)
    chosen = form or _format_of(out)
    images = [str(path) for path in _images(files)]
    if not images:
        raise FileNotFoundError(f"There is no .jpg, .png or .webp in {', '.join(map(str, files))}.")
    found = _answered(out, images) if chosen == "jsonl" else {}
    if found:
        typer.echo(f"Resumed: {len(found)} of {len(images)} images are answered in {out}.", err=True)
    missing = [image for image in images if image not in found]
    options = {"top_k": top_k, "explain": explain, "concurrency": concurrency}
    if chosen == "jsonl":
        failed = _lines(server, missing, out, options)
    else:
        results: dict[str, dict[str, Any]] = {}
        failed = asyncio.run(_ask(server, missing, options, results.__setitem__))
        _write(_text(chosen, images, results), out)
    if failed:
        typer.echo(f"{failed} of {len(images)} images could not be located.", err=True)
        raise typer.Exit(3)


def _lines(server: str, images: Sequence[str], out: Path | None, options: dict[str, Any]) -> int:
    def asked(stream: TextIO) -> int:
        def tell(image: str, result: dict[str, Any]) -> None:
            stream.write(json.dumps({"image": image, **result}) + "\n")
            stream.flush()

        return asyncio.run(_ask(server, images, options, tell))

    if out is None:
        return asked(sys.stdout)
    with out.open("a", encoding="utf-8") as stream:
        return asked(stream)


async def _ask(server: str, images: Sequence[str], options: dict[str, Any], tell: Tell) -> int:
    """Hand every answer or error to `tell`; the number of errors."""
    from hedwig.serving import Client

    failed = done = 0
    with Client(server) as client, Progress() as progress:
        async for position, answer in client.locate_many(images, **options):
            if isinstance(answer, PermissionError | ConnectionError) and answer.errno is None:
                raise answer  # the service's, and the same for every other image; a file's has a number
            if isinstance(answer, Exception):
                failed += 1
                typer.echo(f"Error: {images[position]}: {answer}", err=True)
                tell(images[position], {"error": {"code": type(answer).__name__, "message": str(answer), "next": ""}})
            else:
                tell(images[position], answer.model_dump())
            done += 1
            progress("locate", done, len(images))
    return failed


def _text(form: Format, images: Sequence[str], results: dict[str, dict[str, Any]]) -> str:
    from hedwig.serving.answers import csv_text, geojson

    ordered = [results[image] for image in images]
    return csv_text(ordered, items=images) if form == "csv" else json.dumps(geojson(ordered, items=images)) + "\n"


def _write(text: str, out: Path | None) -> None:
    if out is None:
        typer.echo(text, nl=False)
    else:
        out.write_text(text, encoding="utf-8", newline="")


def _format_of(out: Path | None) -> Format:
    suffix = "" if out is None else out.suffix.lower()
    return "csv" if suffix == ".csv" else "geojson" if suffix in (".geojson", ".json") else "jsonl"


def _images(files: Iterable[Path]) -> list[Path]:
    found = []
    for path in files:
        if path.is_dir():
            found += sorted(p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())
        else:
            found.append(path)
    return list(dict.fromkeys(found))


def _answered(out: Path | None, images: Sequence[str]) -> set[str]:
    """The images that an earlier run has an answer for; a line that was cut short counts for nothing."""
    if out is None or not out.exists():
        return set()
    found: set[str] = set()
    text = out.read_text("utf-8")
    if text and not text.endswith("\n"):
        out.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "error" not in record:
            found.add(str(record.get("image")))
    return found & set(images)
