"""The command that sends an experiment to a Ray cluster and follows it there."""

from __future__ import annotations

import sys
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from hedwig.cli.console import INTERRUPTED, set_up, show

__all__ = ["register"]

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("submit", rich_help_panel="Make")(submit)


def submit(
    experiment: Annotated[
        str | None, typer.Argument(metavar="[EXPERIMENT]", help="Experiment file, e.g. experiments/hedwig.yaml")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change")] = None,
    address: Annotated[
        str, typer.Option("--address", envvar="RAY_API_SERVER_ADDRESS", help="Job server, e.g. http://head:8265")
    ] = "",
    stage: Annotated[str | None, typer.Option("--stage", help="Run this stage only.")] = None,
    working_dir: Annotated[
        str | None,
        typer.Option("--working-dir", help="Upload this folder; its hedwig/ is used in place of the image's."),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Show the job's log until it ends.")] = True,
    attach: Annotated[str | None, typer.Option("--attach", metavar="ID", help="Follow a job sent earlier.")] = None,
    status: Annotated[str | None, typer.Option("--status", metavar="ID", help="Say how a job is doing.")] = None,
    cancel: Annotated[str | None, typer.Option("--cancel", metavar="ID", help="Stop a job; its work is kept.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only errors and the result.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The result as JSON; the log goes to stderr.")] = False,
) -> None:
    """Run an experiment on a Ray cluster as a job; submitting it again follows or resumes it.

    The cluster's nodes need hedwig (docker/), and output and data at s3://, gs:// or on a shared disk. The token comes
    from RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN. Ends with the job's exit code; Ctrl-C leaves the job running.

    Example: hedwig submit experiments/hedwig.yaml --address http://head:8265 output=s3://bucket/runs/hedwig
    """
    set_up(quiet=quiet, as_json=as_json)
    wanted = [name for name in (experiment, attach, status, cancel) if name is not None]
    if len(wanted) != 1:
        raise typer.BadParameter("give one of EXPERIMENT, --attach ID, --status ID and --cancel ID")
    if not address:
        raise typer.BadParameter("--address is missing; it looks like http://head:8265")
    from hedwig.pipelines import submit as jobs

    # Settings are checked before anybody is asked.
    request = jobs.prepare(experiment, overrides or (), stage=stage, working_dir=working_dir) if experiment else None
    client = jobs.connect(address)
    _warn_of_clear_text(address)
    if request is not None:
        job, new = jobs.submit(client, request)
        if not quiet:
            typer.echo(f"{'Submitted' if new else 'Already running:'} {job}; artefacts: {request.output}", err=True)
    else:
        job = jobs.latest_job(client, wanted[0])
    if cancel is not None:
        stopped = client.stop_job(job)
        show({"id": job, "stopped": stopped}, f"{job}: {'stopping' if stopped else 'had ended already'}")
        return
    code = None
    if status is None and follow:
        code = _follow(jobs, client, job, address, quiet=quiet, as_json=as_json)
    record = jobs.job_record(client.get_job_info(job))
    show(record, f"{job}: {record['status']}" + ("" if record["exit_code"] in (None, 0) else f", {record['message']}"))
    if code == 127:
        typer.echo("The nodes have no `hedwig` on their PATH: build their image with docker/.", err=True)
    if code:
        raise typer.Exit(code)


def _follow(jobs: Any, client: Any, job: str, address: str, *, quiet: bool, as_json: bool) -> int:
    stream = sys.stderr if as_json else sys.stdout

    def write(text: str) -> None:
        if not quiet:
            stream.write(text)
            stream.flush()

    try:
        return int(jobs.follow(client, job, write))
    except KeyboardInterrupt:
        again = f"hedwig submit --address {address}"
        typer.echo(f"\nDetached; the job goes on.\n  {again} --attach {job}\n  {again} --cancel {job}", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _warn_of_clear_text(address: str) -> None:
    parts = urlsplit(address)
    if parts.scheme == "http" and parts.hostname not in _LOOPBACK:
        text = "the token and the job travel in clear text; use a tunnel or https:// outside a network you trust"
        typer.echo(f"warning: {address}: {text}.", err=True)
