"""Submission against a job server that lives in the test: what is sent, what is refused, what comes back."""

import logging
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from typer.testing import CliRunner

from hedwig.cli import app
from hedwig.config import load_experiment
from hedwig.pipelines import submit

SETTINGS = {"name": "tiny", "output": "s3://bucket/runs/tiny", "data": {"panoramas": "s3://bucket/p.parquet"}}


class Cluster:
    """Ray's JobSubmissionClient, as far as it is used; jobs are what the test says of them."""

    def __init__(self):
        self.jobs, self.files, self.stopped, self.tails = {}, {}, [], []

    def list_jobs(self):
        return list(self.jobs.values())

    def get_job_info(self, job):
        return self.jobs[job]

    def submit_job(self, *, entrypoint, submission_id, runtime_env, metadata):
        if submission_id in self.jobs:
            raise RuntimeError("already exists")
        folder = Path(runtime_env["working_dir"])
        self.files[submission_id] = {p.name: p.read_text() for p in folder.iterdir() if p.is_file()}
        self.runtime_env = runtime_env
        self.jobs[submission_id] = SimpleNamespace(
            submission_id=submission_id, status="RUNNING", entrypoint=entrypoint, metadata=metadata, message=None,
            start_time=1000, end_time=None, driver_exit_code=None,
        )  # fmt: skip

    def end(self, job, status, code=None):
        self.jobs[job].status, self.jobs[job].driver_exit_code = status, code

    def stop_job(self, job):
        self.stopped.append(job)
        return True

    async def tail_job_logs(self, job):
        for text in self.tails.pop(0):
            if isinstance(text, BaseException):
                raise text
            yield text
        if not self.tails:
            self.end(job, *self.ending)


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setattr(submit, "_RECONNECT_S", 0.0)
    return Cluster()


@pytest.fixture
def experiment(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    return path


def test_one_file_travels_and_reads_back_as_the_same_experiment(cluster, experiment, tmp_path):
    request = submit.prepare(str(experiment), ["training.epochs=7"])
    job, new = submit.submit(cluster, request)
    assert new
    assert cluster.jobs[job].entrypoint == "hedwig run experiment.yaml cluster.address=auto"
    assert list(cluster.files[job]) == ["experiment.yaml"]
    assert set(cluster.runtime_env) == {"working_dir"}  # nothing of the environment
    there = tmp_path / "there.yaml"
    there.write_text(cluster.files[job]["experiment.yaml"])
    wanted = load_experiment(experiment, ["training.epochs=7", "cluster.address=auto"])
    assert load_experiment(there) == wanted


def test_the_same_submission_is_the_same_job_until_it_has_ended(cluster, experiment):
    request = submit.prepare(str(experiment))
    first, _ = submit.submit(cluster, request)
    assert submit.submit(cluster, request) == (first, False)
    cluster.end(first, "FAILED", 1)
    second, new = submit.submit(cluster, request)
    assert new
    assert (first.rsplit("-", 1), second.rsplit("-", 1)) == ([request.name, "1"], [request.name, "2"])
    assert submit.latest_job(cluster, request.name) == second
    assert submit.latest_job(cluster, first) == first
    with pytest.raises(ValueError, match="no job 'other'"):
        submit.latest_job(cluster, "other")


def test_attempts_are_counted_not_sorted_as_text(cluster, experiment):
    request = submit.prepare(str(experiment))
    for number in range(1, 11):
        job, new = submit.submit(cluster, request)
        assert (new, job) == (True, f"{request.name}-{number}")
        cluster.end(job, "SUCCEEDED")
    assert submit.submit(cluster, request)[0].endswith("-11")


def test_other_settings_or_another_stage_are_another_job(experiment):
    names = {
        submit.prepare(str(experiment)).name,
        submit.prepare(str(experiment), ["training.epochs=7"]).name,
        submit.prepare(str(experiment), stage="embed").name,
    }
    assert len(names) == 3
    assert submit.prepare(str(experiment), stage="embed").entrypoint.endswith("--from embed --until embed")
    with pytest.raises(ValueError, match="Did you mean 'embed'"):
        submit.prepare(str(experiment), stage="embd")


def test_somebody_who_sends_the_same_at_the_same_moment_wins_once(cluster, experiment, monkeypatch):
    request = submit.prepare(str(experiment))
    listed = cluster.list_jobs
    answers = iter([[], None])  # nothing yet; then what there is
    monkeypatch.setattr(cluster, "list_jobs", lambda: listed() if (a := next(answers, None)) is None else a)
    other = Cluster()
    job, _ = submit.submit(other, request)
    cluster.jobs = other.jobs
    assert submit.submit(cluster, request) == (job, False)


@pytest.mark.parametrize("key", ["output", "data.panoramas", "data.image_root"])
def test_paths_that_die_with_the_job_are_refused(experiment, key):
    with pytest.raises(ValueError, match=rf"{key} is 'here/x'.*s3://BUCKET/here/x"):
        submit.prepare(str(experiment), [f"{key}=here/x"])
    submit.prepare(str(experiment), [f"{key}=/shared/x"])


def test_an_address_with_a_secret_is_refused_without_repeating_it(experiment):
    with pytest.raises(ValueError, match=r"data\.panoramas is an address with credentials") as refusal:
        submit.prepare(str(experiment), ["data.panoramas=s3://AKIA:hush@bucket/p.parquet"])
    assert "hush" not in str(refusal.value)
    submit.prepare(str(experiment), ["data.panoramas=s3://bucket/p@2.parquet"])


def test_a_working_dir_carries_the_file_and_the_overrides(cluster, experiment, tmp_path):
    request = submit.prepare(str(experiment), ["name=a b"], working_dir=str(tmp_path))
    job, _ = submit.submit(cluster, request)
    assert cluster.jobs[job].entrypoint == "hedwig run tiny.yaml 'name=a b' cluster.address=auto"
    assert cluster.runtime_env["working_dir"] == str(tmp_path)
    assert {".git", ".venv", "runs"} <= set(cluster.runtime_env["excludes"])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with pytest.raises(ValueError, match="is not in"):
        submit.prepare(str(experiment), working_dir=str(elsewhere))


def test_a_broken_connection_repeats_no_line_and_loses_none(cluster, experiment):
    job, _ = submit.submit(cluster, submit.prepare(str(experiment)))
    cluster.tails = [["one\ntw", RuntimeError("closed")], ["one\n", "two\nthree\n"]]
    cluster.ending = ("FAILED", 3)
    seen = []
    assert submit.follow(cluster, job, seen.append) == 3
    assert "".join(seen) == "one\ntwo\nthree\n"


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [("SUCCEEDED", 0, 0), ("STOPPED", None, 130), ("FAILED", 3, 3), ("FAILED", None, 1), ("FAILED", -9, 1),
     ("RUNNING", None, None), ("PENDING", None, None)],
)  # fmt: skip
def test_the_exit_code_is_the_jobs(status, code, expected):
    assert submit.exit_code(SimpleNamespace(status=status, driver_exit_code=code)) == expected


def test_the_given_address_counts_not_the_environments(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    with submit._without(("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")):
        assert "RAY_ADDRESS" not in os.environ
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:1"
    for wrong in ("head:8265", "auto", "ray://head:10001"):
        with pytest.raises(ValueError, match="looks like http://head:8265"):
            submit.connect(wrong)
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:9\b.*8265"):
        submit.connect("http://127.0.0.1:9")


@pytest.fixture
def run(cluster, monkeypatch):
    """``hedwig submit …`` against the fake cluster."""
    monkeypatch.setattr(submit, "connect", lambda address: cluster)
    logger = logging.getLogger("hedwig")
    before = logger.handlers, logger.level, logger.propagate
    yield lambda *arguments: CliRunner().invoke(app, ["submit", *map(str, arguments)])
    logger.handlers, logger.level, logger.propagate = before


def test_the_command_follows_and_ends_with_the_jobs_exit_code(run, cluster, experiment):
    cluster.tails, cluster.ending = [["log line\n"]], ("FAILED", 3)
    done = run(experiment, "--address", "http://127.0.0.1:8265")
    assert done.exit_code == 3
    assert "log line" in done.stdout
    (job,) = cluster.jobs
    assert "FAILED" in run("--status", job, "--address", "http://127.0.0.1:8265").stdout
    assert run("--cancel", job.rsplit("-", 1)[0], "--address", "http://127.0.0.1:8265").exit_code == 0
    assert cluster.stopped == [job]


def test_interrupting_leaves_the_job_and_says_how_to_go_on(run, cluster, experiment):
    cluster.tails = [["log line\n", KeyboardInterrupt()]]
    done = run(experiment, "--address", "http://127.0.0.1:8265")
    (job,) = cluster.jobs
    assert done.exit_code == 130
    assert cluster.stopped == []
    for way in ("--attach", "--cancel"):
        assert f"hedwig submit --address http://127.0.0.1:8265 {way} {job}" in done.stderr


def test_a_token_in_clear_text_is_warned_of_and_never_shown(run, cluster, experiment, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "canary-token")
    done = run(experiment, "--address", "http://head:8265", "--no-follow", "--json")
    assert done.exit_code == 0
    assert "clear text" in done.stderr
    assert "canary-token" not in done.stdout + done.stderr + str(cluster.files) + str(cluster.runtime_env)
    assert "warning" not in run("--status", "x", "--address", "https://head").stderr


@pytest.mark.parametrize("arguments", [(), ("a.yaml", "--status", "x"), ("--status", "x", "--cancel", "y")])
def test_one_thing_at_a_time(run, arguments):
    assert run(*arguments, "--address", "http://127.0.0.1:8265").exit_code == 2
