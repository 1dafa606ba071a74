"""What the terminal sees: log lines, progress, and errors as one clear text with an exit code.

On a terminal there are progress bars; into a pipe or a file go plain lines, at most one in ten seconds per stage;
with ``--quiet`` neither. Results go to stdout and nothing else does.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import typer
from typer.core import TyperGroup

__all__ = ["DATA_REFUSED", "FAILED", "INTERRUPTED", "USAGE", "HedwigGroup", "Progress", "console", "set_up", "show"]

FAILED, USAGE, DATA_REFUSED, INTERRUPTED = 1, 2, 3, 130
PLAIN_EVERY_S = 10.0


@dataclass
class _Console:
    debug: bool = False
    quiet: bool = False
    json: bool = False


console = _Console()


class HedwigGroup(TyperGroup):
    """Turn the errors of a command into one text and the documented exit code; ``--debug`` shows the traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("Interrupted. What was done is kept; the same command goes on from there.", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            # Typer brings a click of its own, so its exceptions are known by their names.
            if console.debug or _names(error) & {"ClickException", "Exit", "Abort"}:
                raise
            typer.echo(f"Error: {error_text(error)}", err=True)
            raise typer.Exit(_exit_code(error)) from None


def _names(error: Exception) -> set[str]:
    return {type_.__name__ for type_ in type(error).__mro__}


def _exit_code(error: Exception) -> int:
    names = _names(error)
    if names & {"TooManyRejected", "SchemaError"}:
        return DATA_REFUSED
    return USAGE if names & {"ConfigError", "FileNotFoundError"} else FAILED


def error_text(error: Exception) -> str:
    """The message of an error without Ray's wrapping; an error without a message is named by its type."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception) and str(cause):
        error = cause
    text = str(error).strip() or type(error).__name__
    if not isinstance(error, ValueError | OSError | RuntimeError):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) < 4000 else text[:2000] + "\n...\n" + text[-1500:]


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        typer.echo(prefix + record.getMessage(), err=True)


def set_up(*, quiet: bool = False, as_json: bool = False) -> None:
    """Choose what a command says; called first in every command."""
    console.quiet, console.json = quiet, as_json
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")  # read when ray.serve is imported; its files keep the log
    logger = logging.getLogger("hedwig")
    logger.handlers = [_Lines()]
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.propagate = False


def show(result: dict[str, Any], text: str) -> None:
    """Print a command's result: `text`, or with ``--json`` the record."""
    typer.echo(json.dumps(result, indent=1, default=str) if console.json else text)


@dataclass
class Progress:
    """Rows done, as a bar on a terminal or now and then as a line."""

    _bar: Any = None
    _tasks: dict[str, Any] = field(default_factory=dict)
    _started: dict[str, tuple[float, int]] = field(default_factory=dict)
    _said: dict[str, float] = field(default_factory=dict)

    def __enter__(self) -> Progress:
        if sys.stderr.isatty() and not console.quiet:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"), TimeRemainingColumn(), console=Console(stderr=True), transient=True,
            )  # fmt: skip
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, stage: str, done: int, total: int, rejected: int = 0) -> None:
        """Say that `done` of `total` rows of `stage` are done, `rejected` of them without a result."""
        now = time.monotonic()
        began, first = self._started.setdefault(stage, (now, done))
        speed = (done - first) / (now - began) if now > began and done > first else 0.0
        rate = f"{speed:.1f}/s" if speed else ""
        rate += f", {rejected} rejected" if rejected else ""
        if self._bar is not None:
            if stage not in self._tasks:
                self._tasks[stage] = self._bar.add_task(stage, total=total, rate="")
            self._bar.update(self._tasks[stage], completed=done, rate=rate)
            if done >= total:
                self._bar.remove_task(self._tasks.pop(stage))
        elif not console.quiet and done and now - self._said.get(stage, began) >= PLAIN_EVERY_S:
            self._said[stage] = now
            left = f", {_clock((total - done) / speed)} left" if speed and done < total else ""
            typer.echo(f"{stage:<9} {done}/{total} ({done / max(total, 1):.0%}) {rate}{left}", err=True)


def _clock(seconds: float) -> str:
    """H:MM:SS."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
