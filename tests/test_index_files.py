"""Damaged, foreign and hostile index folders: refused by the name of the file, fast, and without allocating."""

from __future__ import annotations

import hashlib
import json
import resource
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest
from index_world import DIM, NUM_CELLS, digests, references

from hedwig.index import INDEX_FILE, ROWS_FILE, GeocellIndex, files
from hedwig.index.files import CODEBOOK_FILE, HEADER_FILE, ORIGINALS_FILE, REMOVED_FILE

EVERY_FILE = [HEADER_FILE, INDEX_FILE, ORIGINALS_FILE, CODEBOOK_FILE, ROWS_FILE, REMOVED_FILE, f"added/{INDEX_FILE}"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index that has every kind of file."""
    folder = tmp_path_factory.mktemp("index")
    data, more = references(200), references(20, seed=1)
    index = GeocellIndex.build(**data, num_cells=NUM_CELLS, codec="sq8")
    more["pano_ids"] = [f"later-{name}" for name in more["pano_ids"]]
    index.with_added(**more).with_removed(data["pano_ids"][:3]).save(folder)
    return folder


def rewritten(folder: Path, **changes: Any) -> None:
    """The header with other numbers and a digest that fits: what somebody makes who means harm."""
    content = json.loads((folder / HEADER_FILE).read_text())
    content.pop("format"), content.pop("sha256")
    content |= changes
    content["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    (folder / HEADER_FILE).write_text(json.dumps({"format": 1, **content}))


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("name", EVERY_FILE)
def test_one_flipped_bit_anywhere_is_refused_by_the_name_of_the_file(whole: Path, name: str, manifest: bool) -> None:
    good, path = digests(whole) if manifest else None, whole / name
    original = path.read_bytes()
    try:
        for position in np.linspace(0, len(original) - 1, 50).astype(int):
            damaged = bytearray(original)
            damaged[position] ^= 1 << (position % 8)
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=f"{name}.*hedwig index"):
                GeocellIndex.open(whole, good)
    finally:
        path.write_bytes(original)
    assert len(GeocellIndex.open(whole, good)) == 217


def test_every_chunk_of_a_file_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(files, "_BUFFER_BYTES", 300)
    index = GeocellIndex.build(**references(200), num_cells=NUM_CELLS)
    index.save(tmp_path)
    header = json.loads((tmp_path / HEADER_FILE).read_text())
    content = (tmp_path / INDEX_FILE).read_bytes()
    wanted = [hashlib.sha256(content[at : at + 1000]).hexdigest() for at in range(0, len(content), 1000)]
    assert header["files"][INDEX_FILE]["sha256"] == wanted
    assert len(wanted) == 13
    np.testing.assert_array_equal(GeocellIndex.open(tmp_path).vectors(), index.vectors())
    for position in (0, 999, 1000, 6500, len(content) - 1):
        (tmp_path / INDEX_FILE).write_bytes(
            content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :]
        )
        with pytest.raises(ValueError, match=f"{INDEX_FILE} is damaged.*bytes {position // 1000 * 1000} to"):
            GeocellIndex.open(tmp_path)


def test_a_file_the_manifest_does_not_list_is_refused(tmp_path: Path) -> None:
    GeocellIndex.build(**references(20), num_cells=NUM_CELLS).save(tmp_path)
    known = digests(tmp_path)
    for name in (HEADER_FILE, ROWS_FILE):
        with pytest.raises(ValueError, match=f"no digest for .*{name}"):
            GeocellIndex.open(tmp_path, {n: d for n, d in known.items() if n != name})
    for name in (INDEX_FILE, HEADER_FILE):
        (tmp_path / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"{name} is missing.*hedwig index"):
            GeocellIndex.open(tmp_path)


def test_a_small_file_that_asks_for_gigabytes_is_an_error_at_once(tmp_path: Path) -> None:
    GeocellIndex.build(**references(20), num_cells=NUM_CELLS).save(tmp_path)
    good = (tmp_path / HEADER_FILE).read_bytes()
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    for changes in (
        {"num_rows": 1 << 40},
        {"num_frames": 1 << 40},
        {"dim": 1 << 40},
        {"num_cells": 1 << 40},
        {"num_cells": -1},
        {"num_rows": "20"},
        {"dim": 0},
        {"codec": "sq8"},
        {"codec": "int4"},
        {"files": {}},
        {"files": {INDEX_FILE: {"num_bytes": 10, "chunk_bytes": 0, "sha256": []}}},
        {"files": {"../secret": {"num_bytes": 1, "chunk_bytes": 1, "sha256": [""]}}},
        {"more": 1},
    ):
        rewritten(tmp_path, **changes)
        with pytest.raises(ValueError, match=r"hedwig index|Unknown codec"):
            GeocellIndex.open(tmp_path)
        (tmp_path / HEADER_FILE).write_bytes(good)
    for text in (
        b"",
        b"[" * 100_000,
        b"\xff",
        b"[]",
        b'{"format": 1, "sha256": ""}',
        faiss.serialize_index(faiss.IndexFlatIP(DIM)).tobytes(),
    ):
        (tmp_path / HEADER_FILE).write_bytes(text)
        with pytest.raises(ValueError, match=f"{HEADER_FILE} is.*hedwig index"):
            GeocellIndex.open(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB
    assert time.perf_counter() - start < 10


def test_foreign_and_mixed_files_are_refused(tmp_path: Path) -> None:
    for name, num in (("a", 50), ("b", 60)):
        GeocellIndex.build(**references(num), num_cells=NUM_CELLS).save(tmp_path / name)
    (tmp_path / "a" / INDEX_FILE).write_bytes((tmp_path / "b" / INDEX_FILE).read_bytes())
    with pytest.raises(ValueError, match=rf"{INDEX_FILE} is damaged or from another build.*3840 bytes.*3200"):
        GeocellIndex.open(tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop_columns(["lat"]), "columns"),
        (lambda t: t.slice(1), "49 rows instead of 50"),
        (lambda t: t.take(list(range(49, -1, -1))), "not sorted by cells"),
    ],
)
def test_rows_that_do_not_fit_are_refused_even_with_digests_that_do(tmp_path: Path, change: Any, message: str) -> None:
    GeocellIndex.build(**references(50), num_cells=NUM_CELLS).save(tmp_path)
    pq.write_table(change(pq.read_table(tmp_path / ROWS_FILE)), tmp_path / ROWS_FILE)
    content = (tmp_path / ROWS_FILE).read_bytes()
    listed = json.loads((tmp_path / HEADER_FILE).read_text())["files"]
    listed[ROWS_FILE] |= {"num_bytes": len(content), "sha256": [hashlib.sha256(content).hexdigest()]}
    rewritten(tmp_path, files=listed)
    with pytest.raises(ValueError, match=message):
        GeocellIndex.open(tmp_path)
