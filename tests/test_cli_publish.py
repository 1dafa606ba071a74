"""``hedwig publish``, ``rollback``, ``gc`` and ``plan-run`` as a user calls them; in this process, for speed."""

import json

import pytest
from typer.testing import CliRunner

from hedwig import storage
from hedwig.cli import app

runner = CliRunner()


def make(folder, num):
    for name in ("embeddings", "index"):
        storage.write_bytes(str(folder / name / "part-0.bin"), b"x" * num)
        storage.publish(str(folder / name), kind=name, config={}, inputs={}, num_in=num, num_out=num)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run and a newer version, of which the retriever is believed to open both."""
    monkeypatch.setattr("hedwig.retrieve.load_retriever", lambda folder: None)
    make(tmp_path, 3)
    assert runner.invoke(app, ["publish", str(tmp_path)]).exit_code == 0
    make(tmp_path / "versions" / "0002", 5)
    return tmp_path


def test_publish_rollback_and_gc(run):
    done = runner.invoke(app, ["publish", str(run), "--json"])
    record = json.loads(done.stdout)
    assert record["current"]["version"] == "versions/0002"
    assert record["folder"] == str(run / "versions" / "0002")
    assert json.loads((run / "published.json").read_text())["current"]["num_panoramas"] == 5
    done = runner.invoke(app, ["rollback", str(run)])
    assert "Rolled back to . of" in done.stdout
    done = runner.invoke(app, ["gc", str(run), "--dry-run", "--json"])
    listed = json.loads(done.stdout)
    assert [g["version"] for g in listed["garbage"]] == ["versions/0002"]
    assert (run / "versions" / "0002").exists()
    done = runner.invoke(app, ["gc", str(run)])
    assert "rolled back" in done.stdout
    assert "deleted" in done.stdout
    assert not (run / "versions" / "0002").exists()
    assert (run / "index" / "part-0.bin").exists()


def test_parts_of_mixed_versions_are_refused(tmp_path):
    make(tmp_path, 3)  # the real retriever looks: there is no head and no geocells
    done = runner.invoke(app, ["publish", str(tmp_path)])
    assert done.exit_code == 2
    assert not (tmp_path / "published.json").exists()
