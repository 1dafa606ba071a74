import os

import pytest

from hedwig import storage
from hedwig.publishing import collect_garbage, find_garbage, publish, published_folder, read_pointer, rollback
from hedwig.publishing.pointer import growing_version


def make(run, version, num=3):
    folder = run if version == "." else run / version
    for name in ("embeddings", "index"):
        storage.write_bytes(str(folder / name / "part-0.parquet"), b"x" * num)
        storage.publish(str(folder / name), kind=name, config={}, inputs={}, num_in=num, num_out=num)


def versions_of(garbage):
    return sorted({g.version for g in garbage if g.version})


@pytest.fixture
def run(tmp_path):
    """Three versions were published one after the other, and a fourth is growing."""
    for version in (".", "versions/0002", "versions/0003"):
        make(tmp_path, version)
        publish(str(tmp_path), lambda folder: None)
    make(tmp_path, "versions/0004")
    return tmp_path


def test_what_the_pointer_names_and_what_grows_stays(run):
    assert find_garbage(str(run)) == []
    assert growing_version(str(run)) == "versions/0004"


def test_old_versions_go_when_only_one_is_kept(run):
    garbage = find_garbage(str(run), keep=1)
    assert versions_of(garbage) == ["."]
    assert sorted(g.path for g in garbage) == [str(run / "embeddings"), str(run / "index")]
    assert all(g.num_bytes > 3 for g in garbage)
    assert (run / "index" / "part-0.parquet").exists()  # listing deletes nothing
    collect_garbage(str(run), garbage)
    assert not (run / "index").exists()
    assert [p.version for p in read_pointer(str(run)).history] == ["versions/0002"]
    assert published_folder(str(run)) == str(run / "versions" / "0003")
    rollback(str(run))  # what is kept is whole
    assert published_folder(str(run)) == str(run / "versions" / "0002")


def test_what_was_rolled_back_or_overtaken_goes(run):
    rollback(str(run))
    make(run, "versions/0005")
    garbage = find_garbage(str(run))
    assert versions_of(garbage) == ["versions/0003", "versions/0004"]
    reasons = {g.version: g.why for g in garbage}
    assert "rolled back" in reasons["versions/0003"]
    assert "never published, and versions/0005 is newer" in reasons["versions/0004"]
    collect_garbage(str(run), garbage)
    assert find_garbage(str(run)) == []
    assert (run / "versions" / "0005" / "index" / "manifest.json").exists()


def test_a_version_published_since_is_not_deleted(run):
    make(run, "versions/0005")
    garbage = find_garbage(str(run))
    assert versions_of(garbage) == ["versions/0004"]
    publish(str(run), lambda folder: None, "versions/0004")
    with pytest.raises(ValueError, match="is published by now"):
        collect_garbage(str(run), garbage)
    assert published_folder(str(run)) == str(run / "versions" / "0004")


def test_leftovers_of_finished_artefacts_go_and_those_of_running_work_stay(tmp_path):
    make(tmp_path, ".")
    kept = ["part-0.parquet", "manifest.json", "rejected/part-1.parquet", "notes.txt"]
    stray = [".staging/a.parquet", ".checkpoint/b.parquet", "part-9.parquet"]
    for name in [*kept[2:], *stray]:
        storage.write_bytes(str(tmp_path / "embeddings" / name), b"left")
    storage.write_bytes(str(tmp_path / "captions" / ".staging" / "a.parquet"), b"under way: no manifest")
    assert find_garbage(str(tmp_path)) == []  # all of it is young
    for path in tmp_path.rglob("*"):
        os.utime(path, (0, 0))
    garbage = find_garbage(str(tmp_path))
    assert [os.path.relpath(g.path, tmp_path / "embeddings") for g in sorted(garbage, key=lambda g: g.path)] == [
        ".checkpoint", ".staging", "part-9.parquet",
    ]  # fmt: skip
    assert [g.num_bytes for g in garbage] == [4, 4, 4]
    collect_garbage(str(tmp_path), garbage)
    assert sorted(
        str(p.relative_to(tmp_path / "embeddings")) for p in (tmp_path / "embeddings").rglob("*.*")
    ) == sorted(kept)
    assert (tmp_path / "captions" / ".staging" / "a.parquet").exists()


def test_keep_must_be_a_count(run):
    with pytest.raises(ValueError, match="keep is -1"):
        find_garbage(str(run), keep=-1)
