"""Calibration numbers against loops, against worlds whose answer is known, and on inputs that must be refused."""

from __future__ import annotations

import numpy as np
import pytest

from hedwig.metrics import calibration_error, cell_nll, radius_coverage, wilson_interval


def slow_ece(confidence: np.ndarray, correct: np.ndarray, num_bins: int) -> float:
    """Fill bins one answer at a time, keeping equal confidences together."""
    order = np.argsort(confidence, kind="stable")
    edges = [confidence[order[k * len(order) // num_bins]] for k in range(1, num_bins)]
    total = 0.0
    for low, high in zip([-np.inf, *edges], [*edges, np.inf], strict=True):
        inside = [i for i in range(len(confidence)) if low <= confidence[i] < high]
        if inside:
            total += len(inside) * abs(np.mean(confidence[inside]) - np.mean(correct[inside]))
    return total / len(confidence)


@pytest.mark.parametrize("ties", [False, True])
def test_ece_against_a_loop_in_any_order(ties: bool) -> None:
    rng = np.random.default_rng(1)
    confidence = rng.uniform(0, 1, 143)
    if ties:
        confidence = np.round(confidence, 1)
    correct = rng.uniform(size=143) < confidence**2
    found = calibration_error(confidence, correct, num_bins=7)
    assert found["ece"] == pytest.approx(slow_ece(confidence, correct, 7))
    order = rng.permutation(143)
    assert calibration_error(confidence[order], correct[order], num_bins=7)["ece"] == pytest.approx(found["ece"])
    assert sum(found["bins"]["num_queries"]) == 143
    if not ties:
        assert set(found["bins"]["num_queries"]) <= {20, 21}  # equal mass
    for row in zip(*found["bins"].values(), strict=True):
        num, _, share, low, high = row
        assert (low, high) == wilson_interval(round(share * num), num)


def test_ece_of_known_worlds() -> None:
    rng = np.random.default_rng(2)
    confidence = rng.uniform(0, 1, 20000)
    honest = rng.uniform(size=20000) < confidence
    found = calibration_error(confidence, honest)
    assert found["ece"] == pytest.approx(found["ece_if_calibrated"], abs=0.006)
    assert calibration_error(confidence, np.zeros(20000, bool))["ece"] == pytest.approx(0.5, abs=0.01)
    assert calibration_error(np.full(10, 0.7), np.arange(10) < 4)["ece"] == pytest.approx(0.3)
    for bad in ([0.5, 1.5], [np.nan, 0.2], [-0.1, 0.2]):
        with pytest.raises(ValueError, match=r"0\.\.1"):
            calibration_error(bad, [True, False])
    with pytest.raises(ValueError, match="N > 0"):
        calibration_error([], [])


def test_radius_coverage_counts_the_rim_and_names_its_promise() -> None:
    found = radius_coverage([10.0, 20.0, 30.0], [10.0, 19.0, 40.0], 0.9)
    assert found == {
        "share": 2 / 3,
        "ci": list(wilson_interval(2, 3)),
        "nominal": 0.9,
        "median_radius_km": 19.0,
    }
    with pytest.raises(ValueError, match="finite radius"):
        radius_coverage([1.0, 2.0], [1.0, np.nan], 0.5)


def test_cell_nll_against_a_loop() -> None:
    rng = np.random.default_rng(3)
    num_cells, num = 9, 60
    full = rng.dirichlet(np.ones(num_cells), num)
    order = np.argsort(-full, axis=1)
    true = rng.integers(-1, num_cells, num)
    cells, probs = order[:, :4].copy(), np.take_along_axis(full, order[:, :4], axis=1)
    cells[::3, 3], probs[::3, 3] = -1, 99.0  # padding: whatever stands there does not count
    found = cell_nll(cells, probs, true, num_cells)
    slow, listed = [], 0
    for row in range(num):
        if true[row] < 0:
            continue
        known = {int(c): p for c, p in zip(cells[row], probs[row], strict=True) if c >= 0}
        rest = (1 - sum(known.values())) / (num_cells - len(known))
        listed += true[row] in known
        slow.append(-np.log(known.get(int(true[row]), rest)))
    assert found["mean_nats"] == pytest.approx(np.mean(slow))
    assert found["median_nats"] == pytest.approx(np.median(slow))
    assert found["num_queries"] == len(slow) == num - found["num_outside_cells"]
    assert found["share_listed"] == listed / len(slow)


def test_cell_nll_of_all_cells_is_the_full_likelihood_and_uniform_is_log_c() -> None:
    probs = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    cells = np.tile([0, 1, 2], (2, 1))
    assert cell_nll(cells, probs, [0, 1], 3)["mean_nats"] == pytest.approx(-np.log([0.7, 0.1]).mean())
    even = cell_nll(cells[:, :1], np.full((2, 1), 1 / 3), [2, 1], 3)
    assert even["mean_nats"] == pytest.approx(even["uniform_nats"]) == pytest.approx(np.log(3))
    sure_and_wrong = cell_nll([[0]], [[1.0]], [1], 5)["mean_nats"]
    assert sure_and_wrong == pytest.approx(-np.log(1e-12))
    assert cell_nll([[0]], [[0.5]], [-1], 5)["mean_nats"] is None
    with pytest.raises(ValueError, match=r"0\.\.1"):
        cell_nll([[0]], [[1.5]], [0], 5)
