"""Sending an experiment to a cluster as a Ray job, and following it until it ends.

The package is expected in the cluster's image, so what travels is one file: the experiment as it resolves here. A job's
id is made from that, so the same submission is the same job: while it runs, submitting again follows it, and when it
has ended, submitting again resumes, because stages that are up to date have nothing to do. Ray keeps the jobs; this is
not a queue. No secret travels: a job's settings, command and environment are on the dashboard for all to see, so keys
are named in the settings and their values come from the nodes' own environment.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import yaml

from hedwig import storage
from hedwig.config import Experiment, load_experiment
from hedwig.pipelines.run import STAGE_FOLDERS
from hedwig.schema import suggestion

__all__ = ["JobRequest", "connect", "exit_code", "follow", "job_record", "latest_job", "prepare", "submit"]

ACTIVE = ("PENDING", "RUNNING")
STOPPED_EXIT_CODE = 130
_TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_CHATTY = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
_FILE = "experiment.yaml"
_EXCLUDED = (".git", ".venv", "runs", "**/__pycache__", "*.egg-info", ".mypy_cache", ".ruff_cache", ".pytest_cache")
_RECONNECT_S = 2.0


@dataclass(frozen=True)
class JobRequest:
    """What is sent.

    Attributes:
        name: Of the job, without the number of the attempt: the experiment's name and fingerprint.
        entrypoint: The shell command that the job runs.
        settings: The resolved experiment as YAML; None when the file travels with `working_dir`.
        working_dir: Folder to upload in place of the settings alone.
        output: Where the artefacts will be.
    """

    name: str
    entrypoint: str
    settings: str | None
    working_dir: str | None
    output: str


def prepare(
    experiment: str, overrides: Sequence[str] = (), *, stage: str | None = None, working_dir: str | None = None
) -> JobRequest:
    """Read and check an experiment for a cluster; asks nobody.

    Args:
        experiment: Its file.
        overrides: ``key=value``.
        stage: The only stage to run; None for all.
        working_dir: Folder with the file, uploaded whole; its ``hedwig/`` is then used in place of the image's.

    Raises:
        ValueError: there is no such stage; a path that the cluster's nodes would not find; an address with a secret.
    """
    if stage is not None and stage not in STAGE_FOLDERS:
        raise ValueError(
            f"There is no stage {stage!r}; the stages are {', '.join(STAGE_FOLDERS)}.{suggestion(stage, STAGE_FOLDERS)}"
        )
    x = load_experiment(experiment, [*overrides, "cluster.address=auto"])
    settings = x.model_dump(mode="json")
    _refuse_secrets(settings)
    _refuse_relative_paths(x)
    fingerprint = storage.fingerprint("job", settings, {"stage": stage or ""})[:12]
    name = f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', x.name)[:40]}-{fingerprint}"
    file, arguments, text = _FILE, ["cluster.address=auto"], yaml.safe_dump(settings, sort_keys=False)
    if working_dir is not None:
        folder, path = Path(working_dir).resolve(), Path(experiment).resolve()
        if not path.is_relative_to(folder):
            raise ValueError(f"{experiment} is not in {working_dir}, which is all that the job gets; move it there.")
        file, arguments = str(path.relative_to(folder)), [*overrides, *arguments]
    command = ["hedwig", "run", file, *arguments, *(["--from", stage, "--until", stage] if stage else [])]
    return JobRequest(
        name=name,
        entrypoint=shlex.join(command),
        settings=text if working_dir is None else None,
        working_dir=working_dir,
        output=x.output,
    )


def _refuse_secrets(settings: Mapping[str, Any], where: str = "") -> None:
    for key, value in settings.items():
        path = f"{where}.{key}".lstrip(".")
        if isinstance(value, Mapping):
            _refuse_secrets(value, path)
        elif isinstance(value, list):
            _refuse_secrets({str(i): item for i, item in enumerate(value)}, path)
        elif isinstance(value, str) and re.match(r"[A-Za-z0-9+.-]+://[^/]*@", value):
            raise ValueError(
                f"{path} is an address with credentials in it, which the cluster's dashboard would show; leave them "
                "out and give the nodes a role, or the variables of the storage's standard chain."
            )


def _refuse_relative_paths(x: Experiment) -> None:
    paths = {"output": x.output, "data.panoramas": x.data.panoramas, "data.image_root": x.data.image_root}
    for key, path in paths.items():
        if path is not None and not storage.is_remote(path) and not os.path.isabs(path):
            raise ValueError(
                f"{key} is {path!r}, which on a cluster is lost with the job's own folder; give s3:// or gs://, or the "
                f"absolute path of a disk that all nodes share, for example {key}=s3://BUCKET/{path}."
            )


@contextmanager
def _without(names: Sequence[str]) -> Iterator[None]:
    """Ray lets these variables win over an address that was given; here the given one counts."""
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def connect(address: str) -> Any:
    """Ray's client of the job server at `address`, authenticated by the token in the environment if there is one.

    Raises:
        ValueError: `address` is not http:// or https://.
        PermissionError: the cluster wants a token, or another one.
        ConnectionError: nobody answers.
    """
    if urlsplit(address).scheme not in ("http", "https") or not urlsplit(address).hostname:
        raise ValueError(f"The address {address!r} is not a job server's; it looks like http://head:8265.")
    if any(os.environ.get(name) for name in _TOKEN_VARIABLES):
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # read when Ray is imported
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        with _without(_ADDRESS_VARIABLES):
            return JobSubmissionClient(address)
    except AuthenticationError as error:
        problem = "refused the token" if "failed" in str(error).lower().split("\n")[0] else "asks for a token"
        raise PermissionError(
            f"The cluster at {address} {problem}; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the file with "
            "the cluster's token (or RAY_AUTH_TOKEN to the token)."
        ) from None
    except ConnectionError as error:
        raise ConnectionError(
            f"{error} Is the head's port 8265 reachable from here, for example by "
            "`kubectl port-forward service/NAME-head-svc 8265` or `ray dashboard CLUSTER.yaml`?"
        ) from None


def _attempts(client: Any, name: str) -> list[Any]:
    """The jobs of this name, the first attempt first."""
    pattern = re.compile(rf"{re.escape(name)}-(\d+)")
    found = [(int(m[1]), job) for job in client.list_jobs() if (m := pattern.fullmatch(job.submission_id or ""))]
    return [job for _, job in sorted(found, key=lambda pair: pair[0])]


def latest_job(client: Any, job: str) -> str:
    """The submission id that `job` means: itself, or the last attempt of that name.

    Raises:
        ValueError: the cluster knows no such job.
    """
    known = [entry.submission_id for entry in client.list_jobs() if entry.submission_id]
    if job in known:
        return job
    attempts = _attempts(client, job)
    if not attempts:
        raise ValueError(f"The cluster has no job {job!r}; it has {', '.join(known) or 'none'}.")
    return str(attempts[-1].submission_id)


def submit(client: Any, request: JobRequest) -> tuple[str, bool]:
    """Start the job, or find the one that is already doing the same.

    Returns:
        The submission id, and whether it is a new job.
    """
    attempts = _attempts(client, request.name)
    if attempts and str(attempts[-1].status) in ACTIVE:
        return str(attempts[-1].submission_id), False
    number = int(str(attempts[-1].submission_id).rsplit("-", 1)[1]) + 1 if attempts else 1
    job = f"{request.name}-{number}"
    metadata = {"hedwig_output": request.output}
    with TemporaryDirectory(prefix="hedwig-submit-") as staged:
        runtime_env: dict[str, Any] = {"working_dir": staged}
        if request.working_dir is not None:
            runtime_env = {"working_dir": request.working_dir, "excludes": list(_EXCLUDED)}
        else:
            Path(staged, _FILE).write_text(request.settings or "", encoding="utf-8")
        try:
            client.submit_job(
                entrypoint=request.entrypoint, submission_id=job, runtime_env=runtime_env, metadata=metadata
            )
        except RuntimeError:
            # Somebody else sent the same in the same moment: then it is there.
            if job not in [entry.submission_id for entry in client.list_jobs()]:
                raise
            return job, False
    return job, True


def follow(client: Any, job: str, write: Callable[[str], None]) -> int:
    """Write the job's log as it grows until the job ends; goes on where it was when the connection breaks.

    Returns:
        The exit code for this command, see `exit_code`.
    """
    import aiohttp

    seen = 0

    async def tail() -> None:
        nonlocal seen
        skip = seen  # a new connection begins with the first line again
        async for text in client.tail_job_logs(job):
            part, skip = text[skip:], max(0, skip - len(text))
            if part:
                seen += len(part)
                write(part)

    while True:
        try:
            asyncio.run(tail())
        except (RuntimeError, aiohttp.ClientError, OSError):
            time.sleep(_RECONNECT_S)
        code = exit_code(client.get_job_info(job))
        if code is not None:
            return code
        time.sleep(_RECONNECT_S)


def exit_code(info: Any) -> int | None:
    """0 done, 130 stopped, else what the job's command returned (1 when it did not get that far); None: not ended."""
    status = str(info.status)
    if status == "SUCCEEDED":
        return 0
    if status == "STOPPED":
        return STOPPED_EXIT_CODE
    if status != "FAILED":
        return None
    code = info.driver_exit_code
    return code if code is not None and 0 < code < 256 else 1


def job_record(info: Any) -> dict[str, Any]:
    """What ``--status`` tells about a job; times are Unix seconds."""
    seconds = {name: None if (t := getattr(info, name)) is None else t / 1000 for name in ("start_time", "end_time")}
    output = (info.metadata or {}).get("hedwig_output")
    return {
        "id": info.submission_id,
        "status": str(info.status),
        "exit_code": exit_code(info),
        "output": output,
        "entrypoint": info.entrypoint,
        "message": (info.message or "").split(", last available logs")[0].split("\n")[0],  # the log is shown already
        **seconds,
    }
