"""The search by the kernel and by FAISS, and candidates scored again."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
from index_world import DIM, NUM_CELLS, references, some_queries, unit

from hedwig.index import GeocellIndex, codecs, exact_search, kernel


@pytest.mark.parametrize("codec", ["fp16", "fp32"])
@pytest.mark.parametrize("available", [True, False])
def test_a_batch_is_what_its_queries_find_alone(monkeypatch: pytest.MonkeyPatch, codec: Any, available: bool) -> None:
    monkeypatch.setattr(kernel, "is_available", lambda: available)  # a processor that needs FAISS
    index = GeocellIndex.build(**references(900), num_cells=NUM_CELLS, codec=codec)
    queries, cells = some_queries(60)
    cells[3, 2:], cells[4] = -1, [1, 3, 5, 7, 9]  # odd cells are empty
    exact, exact_scores = exact_search(queries, cells, index.vectors(), index.cell_ids, 70)
    for num in (1, 5, 70):
        rows, scores = index.search_rows(queries, cells, num)
        np.testing.assert_array_equal(rows, exact[:, :num])
        np.testing.assert_allclose(scores, exact_scores[:, :num], atol=1e-6)
        for b in (0, 3, 4, 59):
            np.testing.assert_array_equal(index.search_rows(queries[b : b + 1], cells[b : b + 1], num)[0][0], rows[b])


@pytest.mark.parametrize("codec", ["sq8", "pq"])
@pytest.mark.parametrize("available", [True, False])
def test_codes_find_what_is_exact_when_enough_candidates_are_scored_again(
    monkeypatch: pytest.MonkeyPatch, codec: Any, available: bool
) -> None:
    monkeypatch.setattr(kernel, "is_available", lambda: available)
    data, rng = references(8000, dim=64), np.random.default_rng(3)
    queries = unit(data["vectors"][rng.integers(0, 8000, 300)] + 0.02 * rng.standard_normal((300, 64)))
    cells = some_queries(300)[1]
    index = GeocellIndex.build(**data, num_cells=NUM_CELLS, codec=codec)
    exact, exact_scores = exact_search(queries, cells, index.vectors(), index.cell_ids, 1)
    recall = {}
    for depth in (1, 20, 1600):
        rows, scores = index.search_rows(queries, cells, 1, rerank=depth)
        same = rows[:, 0] == exact[:, 0]
        recall[depth] = same.mean()
        np.testing.assert_allclose(scores[same], exact_scores[same], atol=1e-6)  # exact scores, not those of the codes
        assert (scores <= exact_scores + 1e-6).all()
    assert recall[1] < 1 if codec == "pq" else recall[1] > 0.9
    assert recall[1] <= recall[20] <= recall[1600]
    assert recall[20] > (0.98 if codec == "sq8" else 0.7)
    assert recall[1600] == 1
    one = np.concatenate([index.search_rows(queries[b : b + 1], cells[b : b + 1], 3)[0] for b in range(20)])
    np.testing.assert_array_equal(one, index.search_rows(queries[:20], cells[:20], 3)[0])


def test_codes_are_those_of_faiss() -> None:
    """sq8 within half a step of every component; pq the nearest centroid of every part."""
    vectors = references(700)["vectors"]
    low, high = vectors.min(axis=0), vectors.max(axis=0)
    book = codecs.fit("sq8", vectors, low, high)
    codes = codecs.encode("sq8", vectors, book)
    assert (codes.min(), codes.max()) == (0, 255)
    back = book[0] + book[1] * (codes + 0.5) / 255
    assert (np.abs(back - vectors) <= book[1] * 0.5001 / 255 + (codes == 255) * book[1] / 255).all()
    index = codecs.ivf("sq8", DIM, 1, book)
    np.testing.assert_allclose(index.sq.decode(codes), back, atol=1e-6)
    flat = codecs.fit("sq8", np.ones((3, 4), np.float32), np.ones(4, np.float32), np.ones(4, np.float32))
    assert codecs.encode("sq8", np.ones((3, 4), np.float32), flat).tolist() == [[0] * 4] * 3
    book = codecs.fit("pq", vectors, low, high)
    codes = codecs.encode("pq", vectors, book)
    assert book.shape == (4, 256, 8)
    for part in range(4):
        away = ((vectors[:, None, part * 8 : part * 8 + 8] - book[part][None]) ** 2).sum(axis=2)
        np.testing.assert_allclose(away[np.arange(700), codes[:, part]], away.min(axis=1), atol=1e-6)
    assert [codecs.code_bytes("pq", dim) for dim in (4, 8, 30, 768)] == [1, 1, 3, 96]


def test_memory_that_is_numpys_is_not_given_back_by_faiss() -> None:
    """The lists believe to have mapped a file; what they would unmap on the way out belongs to somebody else."""
    data = references(2000)
    for _ in range(5):
        index = GeocellIndex.build(**data, num_cells=NUM_CELLS, codec="pq")
        index.search_rows(data["vectors"][:1], [[0]], 1)
        codes = index._parts[0].segment.codes
        before = codes.copy()
        del index
        gc.collect()
        np.testing.assert_array_equal(codes, before)
