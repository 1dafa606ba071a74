"""Metrics against published figures, scipy, slow loops and closed forms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from hedwig.geo import EARTH_RADIUS_KM, haversine_km
from hedwig.metrics import (
    THRESHOLDS_KM,
    accuracy_at_km,
    cell_recall_at_k,
    geoscore,
    summarise,
)


@pytest.mark.parametrize("suffix", ["", "_base"])
def test_published_distances_and_scores_are_reproduced(shared: Path, suffix: str) -> None:
    rows = pd.read_csv(shared / "data" / "osv5m" / "select.csv")
    error_km = haversine_km(rows[f"pred_lat{suffix}"], rows[f"pred_lon{suffix}"], rows.true_lat, rows.true_lon)
    published = rows[f"distance{suffix}"].to_numpy()
    # They use R = 6371 km, we 6371.0088: every distance differs by exactly that ratio, 1.38e-6.
    np.testing.assert_allclose(error_km / published, EARTH_RADIUS_KM / 6371.0, rtol=1e-11)
    np.testing.assert_allclose(geoscore(published), rows[f"score{suffix}"], atol=1e-9)
    # and a score by at most 5000/e x 1.38e-6 = 0.00254 points, where d = 1492.7 km.
    assert np.abs(geoscore(error_km) - rows[f"score{suffix}"]).max() <= 5000 / np.e * (EARTH_RADIUS_KM / 6371.0 - 1)


def test_geoscore_is_elementwise_and_unrounded() -> None:
    np.testing.assert_allclose(geoscore([[0.0, 1492.7]]), [[5000.0, 5000 / np.e]], rtol=1e-15)


def test_accuracy_is_strictly_below_the_threshold() -> None:
    assert accuracy_at_km([0.0, 25.0, 25.1, 24.9], [25, 0, 0.5]) == {"25": 0.5, "0": 0.0, "0.5": 0.25}


def test_cell_recall_counts_padding_and_uncovered_truth_as_missed() -> None:
    cells = np.array([[3, 1, -1], [2, -1, -1], [5, 4, 0], [-1, -1, -1]])
    assert cell_recall_at_k(cells, [1, 2, 0, -1], ks=(1, 2, 3)) == {"1": 0.25, "2": 0.5, "3": 0.75}
    with pytest.raises(ValueError, match="there are 3"):
        cell_recall_at_k(cells, [1, 2, 0, -1], ks=(5,))


def test_summary_against_slow_twins() -> None:
    error_km = np.random.default_rng(1).gamma(0.7, 1500, size=137)
    found = summarise(error_km, num_bootstrap=50)
    assert found["num_queries"] == 137
    assert found["mean_km"] == pytest.approx(error_km.mean())
    assert found["trimmed_mean_km"] == pytest.approx(stats.trim_mean(error_km, 0.1))
    assert found["std_km"] == pytest.approx(np.sqrt(np.mean((error_km - error_km.mean()) ** 2)))
    assert [found[k] for k in ("q1_km", "median_km", "q3_km")] == pytest.approx(np.percentile(error_km, [25, 50, 75]))
    assert found["geoscore"] == pytest.approx(np.mean([5000 * np.exp(-e / 1492.7) for e in error_km]))
    for t in THRESHOLDS_KM:
        assert found["accuracy_at_km"][str(t)] == sum(e < t for e in error_km) / 137
        low, high = found["accuracy_ci"][str(t)]
        assert 0 <= low <= found["accuracy_at_km"][str(t)] <= high <= 1


def test_bootstrap_against_the_obvious_loop() -> None:
    """The counts trick must give what resampling rows one by one gives, from the same random numbers."""
    error_km = np.sort(np.random.default_rng(2).exponential(800, size=31))
    rng = np.random.default_rng(7)
    drawn = [error_km[rng.integers(0, 31, size=31)] for _ in range(200)]
    found = summarise(error_km, num_bootstrap=200, seed=7)
    expected = np.quantile([[d.mean(), np.median(d), geoscore(d).mean()] for d in drawn], [0.025, 0.975], axis=0)
    for i, key in enumerate(("mean_km_ci", "median_km_ci", "geoscore_ci")):
        np.testing.assert_allclose(found[key], expected[:, i], rtol=1e-12)
    shares = np.quantile([(d < 750).mean() for d in drawn], [0.025, 0.975])
    np.testing.assert_allclose(found["accuracy_ci"]["750"], shares, rtol=1e-12)


def test_bootstrap_of_a_share_is_the_binomial_quantile() -> None:
    """Closed form: the resampled hit count is Binomial(N, p) exactly, whatever the errors are."""
    error_km = np.r_[np.full(120, 10.0), np.full(280, 5000.0)]
    low, high = summarise(error_km, num_bootstrap=4000, seed=3)["accuracy_ci"]["25"]
    assert low == pytest.approx(stats.binom.ppf(0.025, 400, 0.3) / 400, abs=0.006)
    assert high == pytest.approx(stats.binom.ppf(0.975, 400, 0.3) / 400, abs=0.006)


def test_bootstrap_intervals_cover_the_truth() -> None:
    """On exponential errors of known mean, median and GeoScore the 95 % intervals hold 95 % of the time, roughly."""
    scale, rng = 1000.0, np.random.default_rng(11)
    truth = {
        "mean_km_ci": scale,
        "median_km_ci": scale * np.log(2),
        "geoscore_ci": 5000 / (1 + scale / 1492.7),  # the Laplace transform of the exponential
    }
    inside = dict.fromkeys(truth, 0)
    for trial in range(200):
        found = summarise(rng.exponential(scale, size=120), num_bootstrap=300, seed=trial)
        for key, value in truth.items():
            inside[key] += found[key][0] <= value <= found[key][1]
    for key, count in inside.items():
        assert 178 <= count <= 199, (key, count)  # 190 expected; binomial sd 3.1, percentile bootstrap is a bit narrow


def test_same_seed_same_interval_in_any_row_order_and_chunking(monkeypatch: pytest.MonkeyPatch) -> None:
    error_km = np.random.default_rng(4).exponential(500, size=90)
    first = summarise(error_km, num_bootstrap=101, seed=5)
    assert summarise(error_km[::-1], num_bootstrap=101, seed=5) == first
    assert summarise(error_km, num_bootstrap=101, seed=6)["median_km_ci"] != first["median_km_ci"]
    monkeypatch.setattr("hedwig.metrics.bootstrap._CHUNK_ELEMENTS", 90 * 7)
    assert summarise(error_km, num_bootstrap=101, seed=5)["median_km_ci"] == first["median_km_ci"]


@pytest.mark.parametrize("bad", [[], [np.nan, 1.0], [-1.0], [np.inf], [[1.0]]])
def test_errors_that_are_not_distances_are_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match=r"[Ee]rrors"):
        summarise(bad)
