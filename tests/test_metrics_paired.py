"""Paired differences against resampling row by row, and what their p says when nothing or everything differs."""

from __future__ import annotations

import numpy as np
import pytest

from hedwig.metrics import geoscore, paired_difference_ci, summarise


def test_paired_difference_sees_what_separate_intervals_cannot() -> None:
    rng = np.random.default_rng(8)
    hard = rng.exponential(1000, size=150)
    better, worse = hard * 0.9, hard
    found = paired_difference_ci(better, worse, num_bootstrap=300, seed=1)
    assert found["median_km"]["difference"] == pytest.approx(-0.1 * np.median(hard))
    assert found["median_km"]["ci"][1] < 0 < found["geoscore"]["ci"][0]
    separate = summarise(better)["median_km_ci"], summarise(worse)["median_km_ci"]
    assert separate[0][1] > separate[1][0]
    again = np.random.default_rng(1)
    rows = [again.integers(0, 150, size=150) for _ in range(300)]
    slow = np.quantile([np.median(better[r]) - np.median(worse[r]) for r in rows], [0.025, 0.975])
    np.testing.assert_allclose(found["median_km"]["ci"], slow, rtol=1e-12)


def test_paired_difference_of_a_method_with_itself_is_zero() -> None:
    error_km = np.random.default_rng(0).exponential(100, size=40)
    found = paired_difference_ci(error_km, error_km, num_bootstrap=20)
    assert found["median_km"] == {"difference": 0.0, "ci": [0.0, 0.0], "p": 1.0}


def test_paired_difference_needs_the_same_queries() -> None:
    with pytest.raises(ValueError, match="same queries"):
        paired_difference_ci([1.0, 2.0], [1.0])


def test_accuracies_and_p_against_the_obvious_loop() -> None:
    rng = np.random.default_rng(3)
    a = rng.exponential(600, size=80)
    b = a * rng.uniform(0.5, 1.6, size=80)
    found = paired_difference_ci(a, b, thresholds_km=(25, 200, 750), num_bootstrap=400, seed=9)
    again = np.random.default_rng(9)
    drawn = [again.integers(0, 80, size=80) for _ in range(400)]
    differences = {
        "geoscore": [geoscore(a[r]).mean() - geoscore(b[r]).mean() for r in drawn],
        **{t: [(a[r] < t).mean() - (b[r] < t).mean() for r in drawn] for t in (25, 200, 750)},
    }
    for name, values in differences.items():
        row = found["geoscore"] if name == "geoscore" else found["accuracy_at_km"][str(name)]
        np.testing.assert_allclose(row["ci"], np.quantile(values, [0.025, 0.975]), atol=1e-9)
        below, above = sum(v <= 1e-12 for v in values), sum(v >= -1e-12 for v in values)
        assert row["p"] == pytest.approx(min(1.0, 2 * (min(below, above) + 1) / 401))
    assert found["accuracy_at_km"]["750"]["difference"] == pytest.approx((a < 750).mean() - (b < 750).mean())


def test_p_is_small_for_a_real_difference_and_uniform_for_none() -> None:
    rng = np.random.default_rng(5)
    errors = rng.exponential(500, size=200)
    assert paired_difference_ci(errors * 0.8, errors, num_bootstrap=499)["geoscore"]["p"] == 2 / 500
    small = 0
    for trial in range(200):
        a, b = rng.exponential(500, size=(2, 60))
        small += paired_difference_ci(a, b, num_bootstrap=199, seed=trial)["geoscore"]["p"] < 0.1
    assert 8 <= small <= 36  # 20 expected; binomial sd 4.2, and the percentile bootstrap is a little narrow
