"""The audit log: whatever is done to its lines afterwards shows."""

from __future__ import annotations

import json
import os
import stat

import pytest
from typer.testing import CliRunner

from hedwig import __version__
from hedwig.cli import app
from hedwig.serving.audit import AuditLog, verify


def written(folder, num=5):
    log = AuditLog(folder, "replica#1/x")
    for i in range(num):
        log.write(status=200, route="/v1/locate", request_id=f"r{i}", key_id="k", image_sha256="0" * 64, cell_id=i)
    return log


def test_a_line_holds_what_was_asked_and_nothing_else(tmp_path):
    log = written(tmp_path / "audit")
    log.close()
    records = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [r["event"] for r in records] == ["opened"] + ["answer"] * 5 + ["closed"]
    answer = records[3]
    assert set(answer) == {
        "n", "time", "replica", "version", "event", "key_id", "request_id", "route", "status", "image_sha256",
        "cell_id", "precision_km", "hash",
    }  # fmt: skip
    assert (answer["n"], answer["cell_id"], answer["version"]) == (3, 2, __version__)
    assert stat.S_IMODE(os.stat(log.path).st_mode) == 0o600
    found = verify([log.path])
    assert (found.num_lines, found.closed, found.last_hash) == (7, True, records[-1]["hash"])
    log.write(status=200, route="/", request_id="late")  # after the end: ignored, not a crash
    assert verify([log.path]) == found


def change(i, old, new):
    return lambda lines: [*lines[:i], lines[i].replace(old, new), *lines[i + 1 :]]


@pytest.mark.parametrize(
    "tamper",
    [
        change(2, '"status":200', '"status":404'),
        change(6, '"hash":"', '"hash":"0'),
        lambda lines: lines[:2] + lines[3:],
        lambda lines: lines[1:],
        lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]],
        lambda lines: [*lines[:3], lines[2], *lines[3:]],
        lambda lines: [*lines[:-1], lines[-1][:30]],
        lambda lines: [*lines, "{}\n"],
        lambda lines: ["not json\n"],
        lambda lines: [],
    ],
)
def test_every_change_shows(tmp_path, tamper):
    log = written(tmp_path)
    log.close()
    lines = log.path.read_text().splitlines(keepends=True)
    log.path.write_text("".join(tamper(lines)))
    with pytest.raises(ValueError, match="line"):
        verify([log.path])


def test_an_end_that_was_cut_off_shows_by_its_closing_line_or_a_hash_noted_before(tmp_path):
    log = written(tmp_path)
    log.close()
    whole = verify([log.path])
    lines = log.path.read_text().splitlines(keepends=True)
    log.path.write_text("".join(lines[:-2]))
    assert not verify([log.path]).closed
    with pytest.raises(ValueError, match="cut off"):
        verify([log.path], last_hash=whole.last_hash)


def test_rotation_keeps_the_chain(tmp_path):
    log = written(tmp_path)
    old = log.path.with_suffix(".1")
    log.path.rename(old)
    log.write(status=200, route="/v1/locate", request_id="after")
    log.close()
    assert verify([old]).num_lines == 6
    assert verify([old, log.path]).num_lines == 9
    for wrong in ([log.path], [log.path, old]):
        with pytest.raises(ValueError, match="line 1"):
            verify(wrong)


def test_two_replicas_write_two_files(tmp_path):
    logs = [AuditLog(tmp_path, name) for name in ("a", "b")]
    assert len({log.path for log in logs}) == 2
    for log in logs:
        log.close()
        assert verify([log.path]).num_lines == 2


def test_the_command_line_verifies(tmp_path):
    log = written(tmp_path)
    log.close()
    good = CliRunner().invoke(app, ["audit", "verify", str(log.path), "--json"])
    assert json.loads(good.stdout)["closed"] is True
    log.path.write_text(log.path.read_text().replace('"r3"', '"r9"'))
    bad = CliRunner().invoke(app, ["audit", "verify", str(log.path)])
    assert (bad.exit_code, "line 5" in bad.stderr) == (1, True)
