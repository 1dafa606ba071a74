"""Shares and groups against loops; Wilson intervals against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from hedwig.metrics import admin_accuracy, by_group, geoscore, wilson_interval


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (3, 10), (10, 10), (250, 1000)])
def test_wilson_against_scipy(hits: int, n: int) -> None:
    expected = stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(hits, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_a_region_is_right_only_in_the_right_country() -> None:
    truth = {
        "country": ["FR", "FR", "KE", "", "DE", None],
        "admin1": ["Centre", "Centre", "Central", "Central", "", "Central"],
    }
    answers = {
        "country": ["FR", "DE", "UG", "KE", "DE", "KE"],
        "admin1": ["Centre", "Centre", "Central", "Central", "", "Central"],
    }
    found = admin_accuracy(truth, answers)
    assert found["country"] == {
        "share": 0.5,
        "ci": pytest.approx(list(wilson_interval(2, 4))),
        "num_queries": 4,
        "num_unknown": 2,
    }
    # Row 2 names the right region of the wrong country; rows 3 to 5 have no known region of a known country.
    assert found["admin1"]["share"] == pytest.approx(1 / 3)
    assert (found["admin1"]["num_queries"], found["admin1"]["num_unknown"]) == (3, 3)
    assert admin_accuracy({"country": [""]}, {"country": ["FR"]})["country"]["share"] is None
    with pytest.raises(ValueError, match="levels"):
        admin_accuracy(truth, {"country": answers["country"]})
    with pytest.raises(ValueError, match="one per query"):
        admin_accuracy(truth, {"country": ["FR"], "admin1": ["x"]})


def test_groups_against_a_loop() -> None:
    rng = np.random.default_rng(0)
    errors = rng.exponential(400, size=301)
    group = rng.choice(np.array(["NO", "BR", "SG", "", None], dtype=object), size=301)
    found = by_group(errors, group, (25, 750))
    assert {row["group"] for row in found} == {"NO", "BR", "SG"}
    assert [row["num_queries"] for row in found] == sorted((row["num_queries"] for row in found), reverse=True)
    for row in found:
        mine = [e for e, g in zip(errors, group, strict=True) if g == row["group"]]
        assert row["num_queries"] == len(mine)
        assert row["median_km"] == pytest.approx(np.median(mine), rel=1e-12)
        assert row["geoscore"] == pytest.approx(geoscore(mine).mean())
        for t in (25, 750):
            hits = sum(e < t for e in mine)
            assert row[f"accuracy_at_{t}_km"] == hits / len(mine)
            assert row[f"accuracy_at_{t}_km_ci"] == pytest.approx(list(wilson_interval(hits, len(mine))))
    assert by_group([1.0], [None]) == []
    with pytest.raises(ValueError, match="one label"):
        by_group([1.0, 2.0], ["a"])
