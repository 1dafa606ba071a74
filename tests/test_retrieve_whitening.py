"""Whitening: what it does to a covariance, to queries, and to a neighbour hidden under common directions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hedwig.retrieve.whitening import WHITENING_FILE, Whitening


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def cone(num: int, dim: int = 24, seed: int = 0) -> np.ndarray:
    """Unit vectors in a narrow cone, of very unequal variances along hidden axes."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(np.random.default_rng(9).standard_normal((dim, dim)))[0]
    return unit(5 * axes[0] + (rng.standard_normal((num, dim)) * np.geomspace(1, 0.1, dim)) @ axes)


def test_without_shrinkage_the_covariance_becomes_the_identity() -> None:
    x = cone(4000)
    w = Whitening.fit(x, shrinkage=0.0)
    flat = (x - w.mean) @ w.matrix  # before the norm
    np.testing.assert_allclose(np.cov(flat.T, bias=True), np.eye(24), atol=0.01)
    np.testing.assert_allclose(w(x), unit(flat), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(w(x), axis=1), 1, atol=1e-6)


def test_full_shrinkage_only_takes_the_mean_off() -> None:
    x = cone(500)
    y = Whitening.fit(x, shrinkage=1.0)(x)
    centred = unit(x - x.mean(axis=0))
    np.testing.assert_allclose(y @ y.T, centred @ centred.T, atol=1e-4)


def test_default_shrinkage_is_ledoit_and_wolfs() -> None:
    x = cone(60).astype(np.float64)
    c = x - x.mean(axis=0)
    s = c.T @ c / len(c)
    m = np.trace(s) / 24
    b = sum(((np.outer(row, row) - s) ** 2).sum() for row in c) / len(c) ** 2
    shrinkage = min(b / ((s - m * np.eye(24)) ** 2).sum(), 1.0)  # Ledoit & Wolf 2004, section 3
    assert 0.001 < shrinkage < 1
    np.testing.assert_allclose(Whitening.fit(x)(x), Whitening.fit(x, shrinkage=shrinkage)(x), atol=1e-4)


def test_a_place_hidden_under_common_directions_is_found() -> None:
    """Pictures of a place agree in weak directions and differ in strong ones (light, season)."""
    rng = np.random.default_rng(3)
    place = 0.15 * rng.standard_normal((200, 32))
    place[:, :6] = 0

    def pictures() -> np.ndarray:
        strong = np.zeros((200, 32))
        strong[:, :6] = rng.standard_normal((200, 6))
        return unit(np.eye(32)[0] * 3 + place + strong + 0.02 * rng.standard_normal((200, 32)))

    references, queries = pictures(), pictures()
    w = Whitening.fit(references)
    plain = (queries @ references.T).argmax(axis=1) == np.arange(200)
    whitened = (w(queries) @ w(references).T).argmax(axis=1) == np.arange(200)
    assert plain.mean() < 0.5
    assert whitened.mean() > 0.8


def test_fewer_axes_are_the_widest_and_frames_are_treated_alike() -> None:
    x = cone(600)
    w, short = Whitening.fit(x), Whitening.fit(x, dim=5)
    np.testing.assert_allclose(short.matrix, w.matrix[:, :5], rtol=1e-4, atol=1e-5)
    frames = x.reshape(100, 6, 24)
    np.testing.assert_allclose(short(frames).reshape(600, 5), short(x), atol=1e-6)
    np.testing.assert_allclose(Whitening.fit(frames).matrix, w.matrix, rtol=1e-4, atol=1e-4)


def test_a_row_alone_is_bit_for_bit_the_row_in_a_batch() -> None:
    w, x = Whitening.fit(cone(300, 64)), cone(33, 64, seed=1)
    together = w(x)
    for b in (0, 13, 32):
        assert w(x[b : b + 1]).tobytes() == together[b : b + 1].tobytes()
    assert not w(w.mean[None]).any()  # no direction, but no NaN


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    w = Whitening.fit(cone(100), dim=7)
    w.save(tmp_path)
    loaded = Whitening.load(tmp_path)
    np.testing.assert_array_equal(loaded.mean, w.mean)
    np.testing.assert_array_equal(loaded.matrix, w.matrix)
    (tmp_path / WHITENING_FILE).write_bytes(b"no tensors at all")
    with pytest.raises(ValueError, match=r"not a whitening.*hedwig index"):
        Whitening.load(tmp_path)
    (tmp_path / WHITENING_FILE).unlink()
    with pytest.raises(FileNotFoundError, match="hedwig index"):
        Whitening.load(tmp_path)


def test_what_cannot_be_whitened_is_refused() -> None:
    x = cone(30)
    for vectors, options, message in (
        (x[:1], {}, "two references"),
        (x, {"dim": 25}, "whiten_dim in 1..24"),
        (x, {"shrinkage": 1.5}, "whiten_shrinkage"),
        (np.ones((5, 3)), {"shrinkage": 0.5}, "equal"),
    ):
        with pytest.raises(ValueError, match=message):
            Whitening.fit(vectors, **options)
    with pytest.raises(ValueError, match="another encoder"):
        Whitening.fit(x)(x[:, :20])
