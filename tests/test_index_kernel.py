"""The compiled scan against NumPy: any width, any batch, any number of threads, any processor of the family."""

from __future__ import annotations

import platform
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hedwig.index import kernel, kernel_code
from hedwig.index.exact import exact_search

pytestmark = pytest.mark.skipif(not kernel.is_available(), reason="there is no kernel for this processor")
SIZES = np.array([0, 3, 0, 40, 1, 300, 17, 0])
STARTS = np.concatenate([[0], np.cumsum(SIZES)]).astype(np.int64)
NUM = int(STARTS[-1])


def world(dim: int, num_queries: int, dtype: Any, seed: int = 0) -> tuple[Any, ...]:
    """Vectors, queries, and four cells of eight for each query, some of them none."""
    rng = np.random.default_rng(seed)
    vectors = (40 * rng.random((NUM, dim)) if dtype is np.uint8 else rng.standard_normal((NUM, dim))).astype(dtype)
    queries = rng.standard_normal((num_queries, dim)).astype(np.float32)
    wanted = np.array([rng.permutation(len(SIZES))[:4] for _ in range(num_queries)], dtype=np.int64).reshape(-1, 4)
    wanted[rng.random(wanted.shape) < 0.2] = -1
    return vectors, queries, wanted


def owner() -> Any:
    return np.repeat(np.arange(len(SIZES)), SIZES)


@settings(max_examples=60, deadline=None)
@given(
    dim=st.sampled_from([1, 5, 16, 31, 32, 33, 96, 770]), num_queries=st.integers(0, 23), top_k=st.integers(1, 60),
    dtype=st.sampled_from([np.float16, np.float32, np.uint8]), num_threads=st.integers(1, 3), seed=st.integers(0, 9),
)  # fmt: skip
def test_it_finds_what_numpy_finds(
    dim: int, num_queries: int, top_k: int, dtype: Any, num_threads: int, seed: int
) -> None:
    vectors, queries, wanted = world(dim, num_queries, dtype, seed)
    numbers, scores = kernel.Scan(vectors, STARTS)(queries, wanted, top_k, num_threads=num_threads)
    exact, exact_scores = exact_search(queries, wanted, vectors, owner(), top_k)
    assert (numbers.shape, scores.shape) == (exact.shape, exact_scores.shape)
    np.testing.assert_array_equal(numbers < 0, exact < 0)
    np.testing.assert_allclose(scores, exact_scores, rtol=1e-4, atol=1e-3)
    theirs = np.einsum("bmd,bd->bm", vectors[numbers].astype(np.float32), queries)
    np.testing.assert_allclose(np.where(numbers < 0, -np.inf, theirs), scores, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.uint8])
def test_a_score_is_the_same_alone_in_a_batch_and_by_threads(monkeypatch: pytest.MonkeyPatch, dtype: Any) -> None:
    vectors, queries, wanted = world(200, 37, dtype)
    together = kernel.Scan(vectors, STARTS)(queries, wanted, 50)
    for b in range(37):
        alone = kernel.Scan(vectors, STARTS)(queries[b : b + 1], wanted[b : b + 1], 50)
        assert [a.tobytes() for a in alone] == [a[b : b + 1].tobytes() for a in together]
    monkeypatch.setattr(kernel, "_WORTH_A_THREAD", 1)
    threads = kernel.Scan(vectors, STARTS)(queries, wanted, 50, num_threads=3)
    assert [a.tobytes() for a in threads] == [a.tobytes() for a in together]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.uint8])
def test_the_short_way_of_one_query_gives_the_same_bytes_as_the_long_one(dtype: Any) -> None:
    vectors, queries, wanted = world(200, 37, dtype)
    scan = kernel.Scan(vectors, STARTS)
    for top_k in (1, 50, kernel.MOST):
        together = scan(queries, wanted, top_k)
        for b in range(37):
            alone = scan.one(queries[b : b + 1].astype(np.float64), wanted[b : b + 1].astype(np.int32), top_k)
            assert alone is not None
            assert [a.tobytes() for a in alone] == [a[b : b + 1].tobytes() for a in together]
            assert [a.dtype for a in alone] == [a.dtype for a in together]


def test_answers_of_the_short_way_belong_to_whoever_asked() -> None:
    vectors, queries, wanted = world(40, 64, np.float16)
    scan = kernel.Scan(vectors, STARTS)
    expected = scan(queries, wanted, 9)
    with ThreadPoolExecutor(8) as pool:
        which = list(range(64)) * 20
        found = list(pool.map(lambda b: scan.one(queries[b : b + 1], wanted[b : b + 1], 9), which))
    for b, alone in zip(which, found, strict=True):
        assert [a.tobytes() for a in alone] == [a[b : b + 1].tobytes() for a in expected]


def test_the_short_way_leaves_what_it_must_not_or_cannot_do() -> None:
    vectors, queries, wanted = world(33, 2, np.float16)
    scan, cells = kernel.Scan(vectors, STARTS), np.array([[3, -1, len(SIZES) - 1]])
    assert scan.one(queries[:1], cells, 3) is not None
    for place, bad in ((0, np.nan), (32, np.inf), (17, -np.inf)):
        spoilt = queries[:1].copy()
        spoilt[0, place] = bad
        assert scan.one(spoilt, cells, 3) is None
    for bad in (-2, len(SIZES), 1 << 62, -1 << 63):
        for place in range(3):
            beside = cells.copy()
            beside[0, place] = bad
            assert scan.one(queries[:1], beside, 3) is None
    for x, asked, top_k in (
        (queries, wanted, 3),
        (queries[:1, :32], cells, 3),
        (queries[0], cells, 3),
        (queries[:1], cells[0], 3),
        (queries[:1], np.repeat(cells, 2, axis=0), 3),
        (queries[:1], np.repeat(cells, 100, axis=1), 3),
        (queries[:1], cells, 0),
        (queries[:1], cells, kernel.MOST + 1),
    ):
        assert scan.one(x, asked, top_k) is None


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="compares processors of the x86 family")
def test_a_score_is_the_same_on_a_processor_with_narrower_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, queries, wanted = world(205, 21, np.float16)
    here = kernel.Scan(vectors, STARTS)(queries, wanted, 20)
    haswell = kernel._compile("float16", "haswell")
    assert haswell is not kernel._compile("float16")
    monkeypatch.setattr(kernel, "_compiled", lambda _: haswell)
    assert [a.tobytes() for a in kernel.Scan(vectors, STARTS)(queries, wanted, 20)] == [a.tobytes() for a in here]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.uint8])
def test_vectors_that_are_named_have_the_scores_that_a_scan_gives_them(dtype: Any) -> None:
    vectors, queries, wanted = world(101, 9, dtype)
    scan = kernel.Scan(vectors, STARTS)
    numbers, scores = scan(queries, wanted, 400)
    assert (numbers < 0).any()
    assert scan.scores(queries, numbers).tobytes() == scores.tobytes()
    assert scan.scores(queries[2:3], numbers[2:3, 3:5]).tobytes() == scores[2:3, 3:5].tobytes()
    assert scan.scores(queries, numbers[:, :0]).shape == (9, 0)


def test_equal_scores_go_by_number_in_whatever_order_cells_are_asked() -> None:
    vectors = np.ones((NUM, 40), dtype=np.float16)
    queries = np.ones((3, 40), dtype=np.float32)
    wanted = np.array([[6, 5, 3, 1], [3, 6, 1, 5], [1, -1, 2, 4]], dtype=np.int64)
    numbers, scores = kernel.Scan(vectors, STARTS)(queries, wanted, 6)
    assert numbers.tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], [0, 1, 2, 43, -1, -1]]
    assert scores[0].tolist() == [40.0] * 6
    assert scores[2].tolist() == [40.0] * 4 + [-np.inf] * 2


def test_halves_of_every_size_are_read_as_they_are() -> None:
    """Normal, subnormal, the largest, zeros of both signs: each alone in a vector."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    cells = len(halves) // 256
    vectors = np.zeros((len(halves), 32), dtype=np.float16)
    vectors[:, 7] = halves
    queries = np.zeros((cells, 32), dtype=np.float32)
    queries[:, 7] = 1
    starts, wanted = np.arange(0, len(halves) + 1, 256), np.arange(cells)[:, None]
    assert starts[-1] == len(halves)
    numbers, scores = kernel.Scan(vectors, starts)(queries, wanted, 256)
    np.testing.assert_array_equal(np.sort(scores), np.sort(halves.astype(np.float32).reshape(cells, 256)))
    np.testing.assert_array_equal(halves[numbers].astype(np.float32), scores)
    np.testing.assert_array_equal(np.sort(numbers), np.arange(len(halves)).reshape(cells, 256))


def test_what_is_not_in_the_form_of_its_memory_is_refused() -> None:
    vectors, queries, wanted = world(33, 2, np.float16)
    scan = kernel.Scan(vectors, STARTS)
    for x, cells in (
        (queries[:, :32], wanted),
        (queries.astype(np.float64), wanted),
        (queries, wanted.astype(np.int32)),
        (queries, wanted[:1]),
        (queries[0], wanted[0]),
    ):
        with pytest.raises(ValueError, match="must be"):
            scan(x, cells, 3)


@settings(max_examples=40, deadline=None)
@given(
    num=st.sampled_from([1, 7, 300]), dim=st.sampled_from([1, 31, 64, 770]), num_queries=st.integers(0, 11),
    dtype=st.sampled_from([np.float16, np.float32]), seed=st.integers(0, 9),
)  # fmt: skip
def test_products_with_every_row_are_those_of_numpy(
    num: int, dim: int, num_queries: int, dtype: Any, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((num, dim)).astype(dtype)
    x = rng.standard_normal((num_queries, dim)).astype(np.float32)
    products = kernel.Products(rows)
    found = products(x)
    np.testing.assert_allclose(found, x @ rows.astype(np.float32).T, rtol=1e-4, atol=1e-3)
    alone = [products(x[b : b + 1]) for b in range(num_queries)]
    assert b"".join(one.tobytes() for one in alone) == found.tobytes()
    assert products(x[::-1]).tobytes() == found[::-1].tobytes()


@pytest.mark.parametrize("x", [np.zeros((2, 32)), np.zeros((2, 31), np.float32), np.zeros(32, np.float32)])
def test_products_refuse_other_shapes_and_types(x: Any) -> None:
    with pytest.raises(ValueError, match="must be"):
        kernel.Products(np.zeros((3, 32), dtype=np.float16))(x)


def test_the_program_asks_for_memory_ahead_and_is_written_for_every_type() -> None:
    for stored in ("float16", "float32", "uint8"):
        text = str(kernel_code.module_of(stored))
        assert "llvm.prefetch" in text
        assert ("half" in text) == (stored == "float16")
