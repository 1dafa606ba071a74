"""What is loaded by version: two at a time, the right one for each request, and none for ever."""

from __future__ import annotations

import threading

import pytest

from hedwig.serving.versions import NotHere, Version, Versions, content_digest

ONE, TWO, THREE = (Version(f"/runs/{n}", n * 8) for n in "abc")


def test_a_version_is_loaded_once_and_both_stay_while_they_are_asked_for() -> None:
    now, loads = [0.0], []

    def load(version: Version) -> str:
        loads.append(version.folder)
        return f"from {version.folder}"

    versions = Versions(load, keep_s=10.0, clock=lambda: now[0])
    assert versions.ready(ONE) is None
    assert versions.get(ONE) == "from /runs/a"
    assert versions.get(TWO) == "from /runs/b"
    for now[0] in (6.0, 12.0, 18.0):
        assert versions.ready(ONE) == "from /runs/a"
    assert versions.digests == [ONE.digest, TWO.digest]  # the last that came stays, asked for or not
    now[0] = 29.0
    assert versions.digests == [TWO.digest]
    assert versions.get(ONE._replace(folder="/elsewhere")) == "from /elsewhere"  # the content counts, not the place
    assert loads == ["/runs/a", "/runs/b", "/elsewhere"]
    versions.get(TWO)  # as a rollback does
    now[0] = 99.0
    assert versions.digests == [TWO.digest]


def test_many_who_want_the_same_wait_for_one_load() -> None:
    loads, begun, go = [], threading.Event(), threading.Event()

    def load(version: Version) -> object:
        loads.append(version)
        begun.set()
        assert go.wait(10)
        return object()

    versions, found = Versions(load, keep_s=10.0), []
    threads = [threading.Thread(target=lambda: found.append(versions.get(ONE))) for _ in range(5)]
    for thread in threads:
        thread.start()
    assert begun.wait(10)
    assert versions.ready(ONE) is None
    go.set()
    for thread in threads:
        thread.join()
    assert (len(loads), len(set(map(id, found))), len(found)) == (1, 1, 5)


def test_storage_that_is_away_is_passing_and_damage_is_not() -> None:
    errors: list[Exception] = [OSError("no route"), ValueError("codes.bin is damaged")]

    def load(version: Version) -> str:
        if errors:
            raise errors.pop(0)
        return version.digest

    versions = Versions(load, keep_s=1.0)
    with pytest.raises(NotHere, match="no route"):
        versions.get(ONE)
    with pytest.raises(ValueError, match="damaged"):
        versions.get(ONE)
    assert versions.get(ONE) == ONE.digest
    assert content_digest({"a": 1, "b": {"c": None}}) == content_digest({"b": {"c": None}, "a": 1})
