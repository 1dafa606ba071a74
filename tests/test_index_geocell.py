"""The geocell index against a naive loop: search, additions and removals, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from index_world import DIM, NUM_CELLS, digests, naive, references, some_queries, unit

from hedwig.index import GeocellIndex, exact_search


def test_fp32_index_and_exact_search_agree_with_the_naive_loop() -> None:
    data = references(600)
    queries, cells = some_queries(30)
    cells[3, 2:] = -1
    index = GeocellIndex.build(**data, num_cells=NUM_CELLS, codec="fp32")
    expected = naive(queries, cells, data["vectors"], data["cell_ids"], 4)
    rows, scores = index.search_rows(queries, cells, 4)
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
    rows, scores = index.search_rows(queries, cells, 1)
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


@pytest.mark.parametrize("memory_map", [False, True])
def test_what_is_saved_is_what_is_loaded(tmp_path: Path, memory_map: bool) -> None:
    index = GeocellIndex.build(**references(700), num_cells=NUM_CELLS)
    index.save(tmp_path)
    loaded = GeocellIndex.open(tmp_path, digests(tmp_path), memory_map=memory_map)
    queries, cells = some_queries(20)
    for before, after in zip(index.search_rows(queries, cells, 3), loaded.search_rows(queries, cells, 3), strict=True):
        np.testing.assert_array_equal(before, after)
    assert list(loaded.pano_ids) == list(index.pano_ids)
    np.testing.assert_array_equal(loaded.vectors(), index.vectors())


def test_empty_cells_and_too_few_neighbours_give_nothing() -> None:
    data = references(60)
    index = GeocellIndex.build(**data, num_cells=NUM_CELLS)
    query = data["vectors"][:1]
    rows, scores = index.search_rows(query, [[1, 3, -1]], 3)  # odd cells are empty
    assert rows.tolist() == [[-1, -1, -1]]
    assert np.isneginf(scores).all()
    cell = int(data["cell_ids"][0])
    size = int((data["cell_ids"] == cell).sum())
    rows, scores = index.search_rows(query, [[1, cell]], size + 2)
    assert (rows[0, :size] >= 0).all()
    assert (rows[0, size:] == -1).all()
    assert np.isneginf(scores[0, size:]).all()
    assert index.pano_ids[rows[0, 0]] == data["pano_ids"][0]
    exact = exact_search(query, [[1, cell]], data["vectors"], data["cell_ids"], size + 2)
    assert (exact[0] >= 0).sum() == size


def test_requests_with_different_numbers_of_cells_do_not_disturb_each_other() -> None:
    index = GeocellIndex.build(**references(500), num_cells=NUM_CELLS)
    queries, cells = some_queries(8, num_cells=6)
    alone = index.search_rows(queries, cells[:, :2], 2)
    index.search_rows(queries, cells, 2, num_threads=1)
    np.testing.assert_array_equal(index.search_rows(queries, cells[:, :2], 2)[0], alone[0])


def test_an_index_without_references_answers_nothing(tmp_path: Path) -> None:
    empty = {"vectors": np.empty((0, 4)), "cell_ids": np.empty(0, int), "pano_ids": [], "lat": [], "lon": []}
    GeocellIndex.build(**empty, num_cells=3).save(tmp_path)
    rows, _ = GeocellIndex.open(tmp_path).search_rows(np.ones((2, 4)), [[0], [2]], 2)
    assert rows.tolist() == [[-1, -1], [-1, -1]]
    assert GeocellIndex.open(tmp_path).search_rows(np.ones((0, 4)), np.empty((0, 1)), 2)[0].shape == (0, 2)


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
    index = GeocellIndex.build(**data, num_cells=NUM_CELLS, codec="fp32")
    queries, cells = several(20, asking, 6), some_queries(20)[1]
    cells[3, 2:], cells[4] = -1, [1, 3, 5, 7, 9]  # odd cells are empty
    for num in (1, 5, 40):
        rows, scores = index.search_rows(queries, cells, num)
        for b in range(20):
            members = [n for n in range(240) if data["cell_ids"][n] in cells[b]]
            best = {n: max(float(f @ q) for f in data["vectors"][n] for q in queries[b]) for n in members}
            expected = sorted(members, key=lambda n: -best[n])[:num]
            found = [data["pano_ids"].index(index.pano_ids[row]) for row in rows[b] if row >= 0]
            assert found == expected
            np.testing.assert_allclose(scores[b, : len(found)], [best[n] for n in expected], atol=1e-6)
            assert np.isneginf(scores[b, len(found) :]).all()
    assert (index.search_rows(queries, cells, 40)[0] < 0).any(axis=1).all()
    index.save(tmp_path)
    loaded = GeocellIndex.open(tmp_path, digests(tmp_path))
    assert (len(loaded), loaded.num_frames) == (240, num_frames)
    where = [data["pano_ids"].index(name) for name in loaded.pano_ids]
    np.testing.assert_array_equal(
        loaded.vectors(), data["vectors"][where].squeeze(1) if num_frames == 1 else data["vectors"][where]
    )
    np.testing.assert_array_equal(loaded.search_rows(queries, cells, 5)[0], index.search_rows(queries, cells, 5)[0])


def test_one_query_vector_asks_an_index_of_frames() -> None:
    data = references(60)
    data["vectors"] = several(60, 4, 7)
    index = GeocellIndex.build(**data, num_cells=NUM_CELLS)
    row, score = index.search_rows(data["vectors"][:, 2], data["cell_ids"][:, None], 1)
    assert [index.pano_ids[r] for r in row[:, 0]] == data["pano_ids"]
    np.testing.assert_allclose(score, 1, atol=2e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_queries_that_are_not_finite_are_refused(bad: float) -> None:
    data = references(50)
    index = GeocellIndex.build(**data, num_cells=NUM_CELLS)
    queries = data["vectors"][:3].copy()
    queries[1, 0] = bad
    with pytest.raises(ValueError, match="1 of 3 queries are not finite, first row 1"):
        index.search_rows(queries, [[0]] * 3, 1)


def test_wrong_requests_are_refused() -> None:
    index = GeocellIndex.build(**references(50), num_cells=NUM_CELLS)
    for cells in ([[NUM_CELLS]], np.array([[NUM_CELLS]]), np.array([[-2]])):
        with pytest.raises(ValueError, match="same geocells"):
            index.search_rows(np.zeros((1, DIM), dtype=np.float32), cells, 1)
    with pytest.raises(ValueError, match="1 of 1 queries are not finite"):
        index.search_rows(np.full((1, DIM), np.nan, dtype=np.float32), np.array([[0]]), 1)
    with pytest.raises(ValueError, match=f"must be \\(B, {DIM}\\)"):
        index.search_rows(np.zeros((1, DIM + 1)), [[0]], 1)
    with pytest.raises(ValueError, match="top_k"):
        index.search_rows(np.zeros((1, DIM)), [[0]], 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pano_ids": ["same"] * 50}, "unique"),
        ({"cell_ids": np.full(50, NUM_CELLS)}, "0..39"),
        ({"cell_ids": np.zeros(50)}, "integers"),
        ({"lat": np.full(50, np.nan)}, "without a position"),
        ({"vectors": np.full((50, DIM), np.nan)}, "not finite"),
        ({"lon": np.zeros(49)}, r"lon \(49,\)"),
        ({"codec": "int8"}, "fp16"),
    ],
)
def test_wrong_references_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GeocellIndex.build(**(references(50) | {"num_cells": NUM_CELLS} | change))


CODECS = ["fp16", "fp32", "sq8", "pq"]


def columns(data: dict[str, Any], which: Any) -> dict[str, Any]:
    return {
        name: [values[n] for n in which] if isinstance(values, list) else values[which] for name, values in data.items()
    }


def test_search_gives_names_and_none_where_there_are_no_more() -> None:
    data = references(60)
    index = GeocellIndex.build(**data)
    assert index.num_cells == max(data["cell_ids"]) + 1
    ids, scores = index.search(data["vectors"][:1], [[1, int(data["cell_ids"][0])]], 60)
    members = {p for p, c in zip(data["pano_ids"], data["cell_ids"], strict=True) if c == data["cell_ids"][0]}
    assert ids.dtype == object
    assert ids.shape == scores.shape == (1, 60)
    assert ids[0, 0] == data["pano_ids"][0]
    assert set(ids[0, : len(members)]) == members
    assert set(ids[0, len(members) :]) == {None}
    many, _ = index.search(data["vectors"], data["cell_ids"][:, None], 7)  # past the few that are read one by one
    assert many[:, 0].tolist() == data["pano_ids"]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("num_frames", [1, 3])
def test_what_is_added_and_removed_is_found_and_not_found(tmp_path: Path, codec: Any, num_frames: int) -> None:
    """Against a fresh index of what is left, before and after the disk."""
    data, rng = references(900), np.random.default_rng(2)
    if num_frames > 1:
        data["vectors"] = several(900, num_frames, 3)
    queries, cells = some_queries(40)
    first, second, third = np.arange(600), np.arange(600, 800), np.arange(800, 900)
    gone = rng.choice(800, 150, replace=False)
    names = [data["pano_ids"][n] for n in gone]
    index = GeocellIndex.build(**columns(data, first), num_cells=NUM_CELLS, codec=codec)
    changed = index.with_added(**columns(data, second)).with_removed(names).with_added(**columns(data, third))
    left = np.setdiff1d(np.arange(900), gone)
    assert len(changed) == len(left)
    assert len(index) == 600  # an index never changes
    assert (index.is_compact, changed.is_compact, changed.compacted().is_compact) == (True, False, True)
    fresh = GeocellIndex.build(**columns(data, left), num_cells=NUM_CELLS, codec=codec)
    changed.save(tmp_path / "changed")
    for some in (changed, GeocellIndex.open(tmp_path / "changed", digests(tmp_path / "changed"))):
        for num in (1, 6, 80):
            ids, scores = some.search(queries, cells, num, rerank=900)
            wanted, exact = fresh.search(queries, cells, num, rerank=900)
            np.testing.assert_array_equal(ids, wanted)
            np.testing.assert_allclose(scores, exact, atol=1e-6)
        assert not set(names) & set(some.search(data["vectors"], data["cell_ids"][:, None], 3)[0].ravel())
        some.compacted().save(tmp_path / "compacted")
        fresh.save(tmp_path / "fresh")
        assert digests(tmp_path / "compacted") == digests(tmp_path / "fresh")
    back = changed.with_added(**columns(data, gone[:1]))
    assert back.search(data["vectors"][gone[:1]], data["cell_ids"][gone[:1], None], 1)[0][0, 0] == names[0]
    streamed = GeocellIndex.build_streamed(back.batches(), tmp_path / "streamed", num_cells=NUM_CELLS, codec=codec)
    assert len(streamed) == len(left) + 1


def test_saving_a_changed_index_links_what_did_not_change(tmp_path: Path) -> None:
    data = references(300)
    GeocellIndex.build(**columns(data, np.arange(200)), num_cells=NUM_CELLS).save(tmp_path / "a")
    index = GeocellIndex.open(tmp_path / "a").with_added(**columns(data, np.arange(200, 300)))
    index.save(tmp_path / "b")
    assert (tmp_path / "b" / "codes.bin").samefile(tmp_path / "a" / "codes.bin")
    again = GeocellIndex.open(tmp_path / "b")
    again.save(tmp_path / "b")  # over itself, while it is mapped
    assert list(GeocellIndex.open(tmp_path / "b").pano_ids) == list(index.pano_ids)


def test_wrong_changes_are_refused() -> None:
    data = references(50)
    index = GeocellIndex.build(**columns(data, np.arange(40)), num_cells=NUM_CELLS)
    with pytest.raises(ValueError, match="1 of the added references are in the index"):
        index.with_added(**columns(data, np.arange(39, 50)))
    with pytest.raises(ValueError, match="1 of the names are not in the index, such as 'nobody'"):
        index.with_removed(["nobody", data["pano_ids"][0]])
    once = index.with_removed(data["pano_ids"][:1])
    with pytest.raises(ValueError, match="not in the index"):
        once.with_removed(data["pano_ids"][:1])
    wrong = columns(data, np.arange(40, 50)) | {"vectors": np.zeros((10, DIM + 1))}
    with pytest.raises(ValueError, match=f"\\(n, 1, {DIM}\\)"):
        index.with_added(**wrong)


@pytest.mark.parametrize("codec", CODECS)
def test_on_a_device_of_torch_the_answers_are_exact(codec: Any) -> None:
    data = references(500)
    queries, cells = some_queries(150)  # more than one group
    cells[3, 2:], cells[4] = -1, [1, 3, 5, 7, 9]  # odd cells are empty
    index = GeocellIndex.build(**data, num_cells=NUM_CELLS, codec=codec).on("cpu:0")
    rows, scores = index.search_rows(queries, cells, 30)
    exact, exact_scores = exact_search(queries, cells, index.vectors(), index.cell_ids, 30)
    np.testing.assert_array_equal(rows, exact)
    np.testing.assert_allclose(scores, exact_scores, atol=1e-6)
    assert index.search_rows(queries[:1], [[1]], 3)[0].tolist() == [[-1, -1, -1]]
    changed = index.with_removed([index.pano_ids[rows[0, 0]]])
    assert changed.search_rows(queries[:1], cells[:1], 1)[0][0, 0] == rows[0, 1]
