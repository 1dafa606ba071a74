"""The geocell index against a naive loop, and against damaged, foreign and hostile files."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest

from hedwig.index import INDEX_FILE, ROWS_FILE, GeocellIndex, exact_search

NUM_CELLS, DIM = 40, 32


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def references(num: int = 3000, dim: int = DIM, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    cells = rng.integers(0, NUM_CELLS // 2, num) * 2  # odd cells stay empty
    return {
        "vectors": unit(rng.standard_normal((num, dim)) + rng.standard_normal((NUM_CELLS, dim))[cells]),
        "cell_ids": cells,
        "pano_ids": [f"p{i:05d}" for i in rng.permutation(num)],
        "lat": rng.uniform(-80, 80, num),
        "lon": rng.uniform(-180, 180, num),
    }


def naive(queries: np.ndarray, cells: np.ndarray, vectors: np.ndarray, owner: np.ndarray, num: int) -> np.ndarray:
    """The obvious way: per query, all rows of its cells, sorted by cosine."""
    rows = np.full((len(queries), num), -1)
    for b in range(len(queries)):
        members = [n for n in range(len(vectors)) if owner[n] in cells[b] and owner[n] >= 0]
        members.sort(key=lambda n: -float(queries[b] @ vectors[n]))
        rows[b, : len(members[:num])] = members[:num]
    return rows


def some_queries(num: int, dim: int = DIM, num_cells: int = 5, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    cells = np.stack([rng.permutation(NUM_CELLS)[:num_cells] for _ in range(num)])
    return unit(rng.standard_normal((num, dim))), cells


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_fp32_index_and_exact_search_agree_with_the_naive_loop() -> None:
    data = references(600)
    queries, cells = some_queries(30)
    cells[3, 2:] = -1
    index = GeocellIndex.build(**data, num_cells=NUM_CELLS, storage="fp32")
    expected = naive(queries, cells, data["vectors"], data["cell_ids"], 4)
    rows, scores = index.search(queries, cells, 4)
    assert (expected < 0).all(axis=1).any()  # some query has only empty cells
    found, wanted = (
        [[ids[n] if n >= 0 else None for n in row] for row in table]
        for ids, table in ((index.pano_ids, rows), (data["pano_ids"], expected))
    )
    assert found == wanted
    cosines = np.einsum("bd,bmd->bm", queries, data["vectors"][expected])
    np.testing.assert_allclose(scores, np.where(expected < 0, -np.inf, cosines), atol=1e-6)
    exact_rows, exact_scores = exact_search(queries, cells, data["vectors"], data["cell_ids"], 4)
    np.testing.assert_array_equal(exact_rows, expected)
    np.testing.assert_allclose(exact_scores, scores, atol=1e-6)


def test_fp16_answers_are_the_exact_ones() -> None:
    """recall@1 >= 0.999 inside the cells, on queries near references, as in use."""
    data = references(8000, dim=256)
    rng = np.random.default_rng(3)
    queries = unit(data["vectors"][rng.integers(0, 8000, 2000)] + 0.02 * rng.standard_normal((2000, 256)))
    cells = some_queries(2000)[1]
    index = GeocellIndex.build(**data, num_cells=NUM_CELLS)
    rows, scores = index.search(queries, cells, 1)
    exact_rows, exact_scores = exact_search(queries, cells, data["vectors"], data["cell_ids"], 1)
    same = np.array(data["pano_ids"], dtype=object)[exact_rows[:, 0]] == index.pano_ids[rows[:, 0]]
    answered = exact_rows[:, 0] >= 0
    assert answered.mean() > 0.9
    assert same[answered].mean() >= 0.999
    np.testing.assert_array_equal(rows[~answered], -1)
    np.testing.assert_allclose(scores, exact_scores, atol=1e-3)


def test_rows_keep_their_own_position_and_cell() -> None:
    data = references(500)
    index = GeocellIndex.build(**data, num_cells=NUM_CELLS)
    where = {p: i for i, p in enumerate(data["pano_ids"])}
    back = [where[p] for p in index.pano_ids]
    for name, column in (("lat", index.lat), ("lon", index.lon), ("cell_ids", index.cell_ids)):
        np.testing.assert_array_equal(np.asarray(data[name])[back], column)
    np.testing.assert_array_equal(index.vectors(), data["vectors"][back].astype(np.float16).astype(np.float32))
    assert sorted(zip(index.cell_ids, index.pano_ids, strict=True)) == list(
        zip(index.cell_ids, index.pano_ids, strict=True)
    )


@pytest.mark.parametrize("storage", ["fp16", "fp32"])
def test_any_row_order_gives_the_same_bytes(tmp_path: Path, storage: Any) -> None:
    data = references(400)
    order = np.random.default_rng(9).permutation(400)
    shuffled = {k: [v[i] for i in order] for k, v in data.items()}
    for name, columns in (("a", data), ("b", shuffled)):
        GeocellIndex.build(**columns, num_cells=NUM_CELLS, storage=storage).save(tmp_path / name)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


@pytest.mark.parametrize("memory_map", [False, True])
def test_what_is_saved_is_what_is_loaded(tmp_path: Path, memory_map: bool) -> None:
    index = GeocellIndex.build(**references(700), num_cells=NUM_CELLS)
    index.save(tmp_path)
    loaded = GeocellIndex.load(tmp_path, digests(tmp_path), memory_map=memory_map)
    queries, cells = some_queries(20)
    for before, after in zip(index.search(queries, cells, 3), loaded.search(queries, cells, 3), strict=True):
        np.testing.assert_array_equal(before, after)
    assert list(loaded.pano_ids) == list(index.pano_ids)
    np.testing.assert_array_equal(loaded.vectors(), index.vectors())


def test_loading_leaves_the_process_limit_as_it_was(tmp_path: Path) -> None:
    GeocellIndex.build(**references(50), num_cells=NUM_CELLS).save(tmp_path)
    before = faiss.get_deserialization_vector_byte_limit()
    GeocellIndex.load(tmp_path)
    assert faiss.get_deserialization_vector_byte_limit() == before


def test_empty_cells_and_too_few_neighbours_give_nothing() -> None:
    data = references(60)
    index = GeocellIndex.build(**data, num_cells=NUM_CELLS)
    query = data["vectors"][:1]
    rows, scores = index.search(query, [[1, 3, -1]], 3)  # odd cells are empty
    assert rows.tolist() == [[-1, -1, -1]]
    assert np.isneginf(scores).all()
    cell = int(data["cell_ids"][0])
    size = int((data["cell_ids"] == cell).sum())
    rows, scores = index.search(query, [[1, cell]], size + 2)
    assert (rows[0, :size] >= 0).all()
    assert (rows[0, size:] == -1).all()
    assert np.isneginf(scores[0, size:]).all()
    assert index.pano_ids[rows[0, 0]] == data["pano_ids"][0]
    exact = exact_search(query, [[1, cell]], data["vectors"], data["cell_ids"], size + 2)
    assert (exact[0] >= 0).sum() == size


def test_requests_with_different_numbers_of_cells_do_not_disturb_each_other() -> None:
    index = GeocellIndex.build(**references(500), num_cells=NUM_CELLS)
    queries, cells = some_queries(8, num_cells=6)
    alone = index.search(queries, cells[:, :2], 2)
    index.search(queries, cells, 2, num_threads=1)
    np.testing.assert_array_equal(index.search(queries, cells[:, :2], 2)[0], alone[0])


def test_an_index_without_references_answers_nothing(tmp_path: Path) -> None:
    empty = {"vectors": np.empty((0, 4)), "cell_ids": np.empty(0, int), "pano_ids": [], "lat": [], "lon": []}
    GeocellIndex.build(**empty, num_cells=3).save(tmp_path)
    rows, _ = GeocellIndex.load(tmp_path).search(np.ones((2, 4)), [[0], [2]], 2)
    assert rows.tolist() == [[-1, -1], [-1, -1]]
    assert GeocellIndex.load(tmp_path).search(np.ones((0, 4)), np.empty((0, 1)), 2)[0].shape == (0, 2)


def several(num: int, num_frames: int, seed: int) -> np.ndarray:
    """(num, V, D) unit vectors; the frames of one panorama resemble each other, so that lists are crowded by few."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal((num, 1, DIM))
    frames = 1.5 * common + rng.standard_normal((num, num_frames, DIM))
    return (frames / np.linalg.norm(frames, axis=2, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(("num_frames", "asking"), [(4, 4), (8, 3), (1, 5), (3, 1)])
def test_the_best_pair_of_frames_decides_and_exactly(tmp_path: Path, num_frames: int, asking: int) -> None:
    """Against all pairs in a loop; a cell of few references is emptied, so lists run out too."""
    data = references(240)
    data["vectors"] = several(240, num_frames, 5)
    index = GeocellIndex.build(**data, num_cells=NUM_CELLS, storage="fp32")
    queries, cells = several(20, asking, 6), some_queries(20)[1]
    cells[3, 2:], cells[4] = -1, [1, 3, 5, 7, 9]  # odd cells are empty
    for num in (1, 5, 40):
        rows, scores = index.search(queries, cells, num)
        for b in range(20):
            members = [n for n in range(240) if data["cell_ids"][n] in cells[b]]
            best = {n: max(float(f @ q) for f in data["vectors"][n] for q in queries[b]) for n in members}
            expected = sorted(members, key=lambda n: -best[n])[:num]
            found = [data["pano_ids"].index(index.pano_ids[row]) for row in rows[b] if row >= 0]
            assert found == expected
            np.testing.assert_allclose(scores[b, : len(found)], [best[n] for n in expected], atol=1e-6)
            assert np.isneginf(scores[b, len(found) :]).all()
    assert (index.search(queries, cells, 40)[0] < 0).any(axis=1).all()
    index.save(tmp_path)
    loaded = GeocellIndex.load(tmp_path, digests(tmp_path))
    assert (len(loaded), loaded.num_frames) == (240, num_frames)
    where = [data["pano_ids"].index(name) for name in loaded.pano_ids]
    np.testing.assert_array_equal(
        loaded.vectors(), data["vectors"][where].squeeze(1) if num_frames == 1 else data["vectors"][where]
    )
    np.testing.assert_array_equal(loaded.search(queries, cells, 5)[0], index.search(queries, cells, 5)[0])


def test_one_query_vector_asks_an_index_of_frames() -> None:
    data = references(60)
    data["vectors"] = several(60, 4, 7)
    index = GeocellIndex.build(**data, num_cells=NUM_CELLS)
    row, score = index.search(data["vectors"][:, 2], data["cell_ids"][:, None], 1)
    assert [index.pano_ids[r] for r in row[:, 0]] == data["pano_ids"]
    np.testing.assert_allclose(score, 1, atol=2e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_queries_that_are_not_finite_are_refused(bad: float) -> None:
    data = references(50)
    index = GeocellIndex.build(**data, num_cells=NUM_CELLS)
    queries = data["vectors"][:3].copy()
    queries[1, 0] = bad
    with pytest.raises(ValueError, match="1 of 3 queries are not finite, first row 1"):
        index.search(queries, [[0]] * 3, 1)


def test_wrong_requests_are_refused() -> None:
    index = GeocellIndex.build(**references(50), num_cells=NUM_CELLS)
    with pytest.raises(ValueError, match="same geocells"):
        index.search(np.zeros((1, DIM)), [[NUM_CELLS]], 1)
    with pytest.raises(ValueError, match=f"must be \\(B, {DIM}\\)"):
        index.search(np.zeros((1, DIM + 1)), [[0]], 1)
    with pytest.raises(ValueError, match="num_neighbours"):
        index.search(np.zeros((1, DIM)), [[0]], 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pano_ids": ["same"] * 50}, "unique"),
        ({"cell_ids": np.full(50, NUM_CELLS)}, "0..39"),
        ({"cell_ids": np.zeros(50)}, "integers"),
        ({"lat": np.full(50, np.nan)}, "without a position"),
        ({"vectors": np.full((50, DIM), np.nan)}, "not finite"),
        ({"lon": np.zeros(49)}, r"lon \(49,\)"),
        ({"storage": "int8"}, "fp16"),
    ],
)
def test_wrong_references_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GeocellIndex.build(**(references(50) | {"num_cells": NUM_CELLS} | change))


@pytest.mark.parametrize("name", [INDEX_FILE, ROWS_FILE])
def test_one_flipped_bit_anywhere_is_refused_by_its_digest(tmp_path: Path, name: str) -> None:
    GeocellIndex.build(**references(200), num_cells=NUM_CELLS).save(tmp_path)
    good, path = digests(tmp_path), tmp_path / name
    original = path.read_bytes()
    for position in np.linspace(0, len(original) - 1, 50).astype(int):
        damaged = bytearray(original)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{name} is damaged.*hedwig index"):
            GeocellIndex.load(tmp_path, good)
    path.write_bytes(original)
    assert len(GeocellIndex.load(tmp_path, good)) == 200


def test_a_file_the_manifest_does_not_list_is_refused(tmp_path: Path) -> None:
    GeocellIndex.build(**references(20), num_cells=NUM_CELLS).save(tmp_path)
    known = digests(tmp_path)
    del known[ROWS_FILE]
    with pytest.raises(ValueError, match=r"no digest for .*rows\.parquet"):
        GeocellIndex.load(tmp_path, known)
    (tmp_path / INDEX_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=r"index\.faiss is missing.*hedwig index"):
        GeocellIndex.load(tmp_path)


def test_a_small_file_that_asks_for_gigabytes_is_an_error(tmp_path: Path) -> None:
    """A flat index whose header promises 2 GiB of vectors; without the limit FAISS allocates them."""
    GeocellIndex.build(**references(20), num_cells=NUM_CELLS).save(tmp_path)
    flat = faiss.serialize_index(faiss.IndexFlatIP(DIM)).tobytes()
    size_at = len(flat) - 8  # the vector's length is the last field of an empty flat index
    assert struct.unpack("<Q", flat[size_at:])[0] == 0
    (tmp_path / INDEX_FILE).write_bytes(flat[:size_at] + struct.pack("<Q", 1 << 29) + b"\0" * 2000)
    with pytest.raises(ValueError, match=r"index\.faiss is not an index FAISS can read.*limit.*hedwig index"):
        GeocellIndex.load(tmp_path)


def test_foreign_and_mixed_files_are_refused(tmp_path: Path) -> None:
    GeocellIndex.build(**references(50), num_cells=NUM_CELLS).save(tmp_path / "a")
    GeocellIndex.build(**references(60), num_cells=NUM_CELLS).save(tmp_path / "b")
    table = pq.read_table(tmp_path / "a" / ROWS_FILE)
    (tmp_path / "a" / ROWS_FILE).write_bytes((tmp_path / "b" / ROWS_FILE).read_bytes())
    with pytest.raises(ValueError, match=r"50 vectors.*60 rows.*same build"):
        GeocellIndex.load(tmp_path / "a")
    pq.write_table(table.drop_columns(["lat"]), tmp_path / "a" / ROWS_FILE)
    with pytest.raises(ValueError, match="columns"):
        GeocellIndex.load(tmp_path / "a")
    (tmp_path / "a" / ROWS_FILE).write_bytes(b"not parquet")
    with pytest.raises(ValueError, match="not a readable table"):
        GeocellIndex.load(tmp_path / "a")
    faiss.write_index(faiss.IndexFlatIP(4), str(tmp_path / "b" / INDEX_FILE))
    with pytest.raises(ValueError, match=r"IndexFlat.*not a geocell index"):
        GeocellIndex.load(tmp_path / "b")
