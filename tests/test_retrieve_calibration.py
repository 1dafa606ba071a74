"""Coverage of radii and regions on new data, confidence that means what it says, and the file they are kept in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hedwig.retrieve.calibration import (
    Calibration,
    conformal_quantile,
    fit_confidence,
    fit_radius_scale,
    mass_before,
    region_cells,
)


def log_softmax(z: np.ndarray) -> np.ndarray:
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def test_quantile_is_the_corrected_order_statistic() -> None:
    values = np.random.default_rng(0).permutation(np.arange(1.0, 100.0))
    assert conformal_quantile(values, 0.9) == 90.0  # ceil(100 x 0.9) of 99
    assert conformal_quantile(values[values < 10], 0.9) == 9.0
    assert conformal_quantile([3.0, 5.0], 0.9) == 5.0  # too few for 90 %: the largest
    with pytest.raises(ValueError, match="coverage"):
        conformal_quantile([1.0], 1.0)


def test_radius_scale_is_the_conformal_order_statistic() -> None:
    error_km = np.arange(1, 100, dtype=float)  # 99 ratios 1..99: ceil(100 x 0.9) = the 90th
    assert fit_radius_scale(np.ones(99), error_km) == 90.0
    assert fit_radius_scale(np.full(99, 2.0), error_km, coverage=0.5) == 25.0
    assert fit_radius_scale([1.0, 1.0], [3.0, 4.0]) == 4.0  # too few for 90 %: the largest


@pytest.mark.parametrize("coverage", [0.5, 0.9])
def test_scaled_radius_covers_new_queries_as_often_as_promised(coverage: float) -> None:
    rng = np.random.default_rng(5)
    shares = []
    for _ in range(300):
        spread = rng.uniform(10, 1000, size=220)
        error = spread * rng.lognormal(0, 1, size=220)
        scale = fit_radius_scale(spread[:200], error[:200], coverage=coverage)
        shares.append((error[200:] <= scale * spread[200:]).mean())
    # 6000 trials: binomial sd 0.6 %, and 300 calibrations of sd 3.5 % add 0.2 %; expectation up to 1/201 more
    assert coverage - 0.02 < np.mean(shares) < coverage + 0.025


@pytest.mark.parametrize(
    ("spread", "error", "coverage"),
    [([], [], 0.9), ([1.0], [1.0, 2.0], 0.9), ([0.0], [1.0], 0.9), ([1.0], [np.nan], 0.9), ([1.0], [1.0], 1.0)],
)
def test_useless_calibration_data_is_refused(spread: list[float], error: list[float], coverage: float) -> None:
    with pytest.raises(ValueError, match=r"[Ss]pread"):
        fit_radius_scale(spread, error, coverage)


def test_regions_and_mass_before_are_those_of_the_obvious_loop() -> None:
    rng = np.random.default_rng(1)
    log_probs = log_softmax(2 * rng.standard_normal((40, 9)))
    log_probs[3] = np.log(1 / 9)  # all equal: by number
    cells = rng.integers(0, 9, 40)
    before = mass_before(log_probs, cells)
    regions = region_cells(log_probs, 0.6)
    for b in range(40):
        ranked = sorted(range(9), key=lambda c: -log_probs[b, c])
        mass, expected = 0.0, []
        for cell in ranked:
            if cell == cells[b]:
                assert before[b] == pytest.approx(mass, abs=1e-12)
            if mass <= 0.6:
                expected.append(cell)
            mass += np.exp(log_probs[b, cell])
        assert list(regions[b]) == expected
        assert sum(np.exp(log_probs[b, c]) for c in expected) > 0.6
    assert all(len(r) == 1 for r in region_cells(log_probs, 0.0))


@pytest.mark.parametrize("sharpness", [0.4, 1.0, 3.0])
def test_the_90_percent_region_holds_85_to_95_percent_of_new_truths(sharpness: float) -> None:
    """Whether the posterior is honest (1), far too flat or far too sharp; taken at its word it would not."""
    rng = np.random.default_rng(7)
    held, naive, halves = [], [], []
    for _ in range(40):
        z = 1.5 * rng.standard_normal((600, 60))
        truth = (log_softmax(z) + rng.gumbel(size=z.shape)).argmax(axis=1)  # drawn from softmax(z)
        log_probs = log_softmax(sharpness * z)
        before = mass_before(log_probs, truth)
        level, half = (conformal_quantile(before[:300], share) for share in (0.9, 0.5))
        for wanted, shares in ((level, held), (half, halves), (0.9, naive)):
            regions = region_cells(log_probs[300:], wanted)
            shares.append(np.mean([t in region for t, region in zip(truth[300:], regions, strict=True)]))
    assert 0.88 < np.mean(held) < 0.92
    assert 0.47 < np.mean(halves) < 0.53
    assert (np.abs(np.array(held) - 0.9) < 0.06).all()
    if sharpness != 1.0:
        assert abs(np.mean(naive) - 0.9) > 0.05


def test_confidence_is_the_share_of_good_answers() -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((20_000, 3)) * [2.0, 0.5, 10.0]
    true = 1 / (1 + np.exp(-(0.4 + x @ [1.0, -0.8, 0.0])))
    good = rng.random(20_000) < true
    weights = fit_confidence(x[:10_000], good[:10_000])
    np.testing.assert_allclose(weights, [0.4, 1.0, -0.8, 0.0], atol=0.08)
    found = Calibration(confidence_weights=weights).confidence(x[10_000:])
    for low in np.arange(0, 1, 0.1):
        here = (found >= low) & (found < low + 0.1)
        assert here.sum() > 200
        assert good[10_000:][here].mean() == pytest.approx(found[here].mean(), abs=0.07)


@pytest.mark.parametrize("good", [[True] * 30, [False] * 30, [True] * 15 + [False] * 15])
def test_confidence_stays_finite_and_modest_where_outcomes_are_separable(good: list[bool]) -> None:
    x = np.column_stack([np.linspace(3, -3, 30), np.zeros(30), np.ones(30)])
    weights = fit_confidence(x, good)
    found = Calibration(confidence_weights=weights).confidence(x)
    assert np.isfinite(weights).all()
    assert found.mean() == pytest.approx((sum(good) + 1) / 32, abs=0.04)
    assert found.min() > 0.005
    assert found.max() < 0.995


def test_what_is_saved_is_what_is_loaded_and_old_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    full = Calibration(2.5, 0.5, 0.8, 0.3, 100.0, (0.1, 1.0, -2.0, 3.0), 0.5, 0.2)
    full.save(path, {"num_calibration": 7, "tuning": [{"geoscore": 1.0}]})
    assert Calibration.load(path) == full
    assert json.loads(path.read_text())["tuning"] == [{"geoscore": 1.0}]
    path.write_text(json.dumps({"radius_scale": 3.0, "coverage": 0.9, "num_calibration": 12}))
    assert Calibration.load(path) == Calibration(radius_scale=3.0)


@pytest.mark.parametrize(
    "content",
    [
        '{"radius_scale": 0}',
        '{"radius_scale": "wide"}',
        '{"radius_scale": 1, "confidence_weights": [1, 2]}',
        '{"radius_scale": 1, "region_90_level": NaN}',
        "[",
    ],
)
def test_a_file_that_is_no_calibration_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"is not a calibration.*hedwig index"):
        Calibration.load(path)
