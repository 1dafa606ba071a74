"""The evaluation record against slow twins, and its verdict on predictions that are good, random and constant."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hedwig.evaluate import (
    Embedded,
    best_constants,
    brute_force_1nn,
    evaluate,
    join_predictions,
    self_retrieval,
    shuffled_labels,
)
from hedwig.geo import haversine_km
from hedwig.index import GeocellIndex
from hedwig.metrics import geoscore, summarise

NUM_CELLS, NUM_QUERIES, NUM_TRAIN = 20, 200, 600


class World:
    """Clusters on the sphere: training places, queries, and predictions of chosen quality."""

    def __init__(self, quality: str = "good", seed: int = 0, num_queries: int = NUM_QUERIES) -> None:
        rng = np.random.default_rng(seed)
        self.cell_lat, self.cell_lon = rng.uniform(-50, 65, NUM_CELLS), rng.uniform(-180, 180, NUM_CELLS)
        self.train_cell = rng.integers(0, NUM_CELLS, NUM_TRAIN)
        self.train_lat = self.cell_lat[self.train_cell] + rng.normal(0, 1, NUM_TRAIN)
        self.train_lon = self.cell_lon[self.train_cell] + rng.normal(0, 1, NUM_TRAIN)
        cell = rng.integers(0, NUM_CELLS, num_queries)
        ids = [f"q{i:04d}" for i in rng.permutation(num_queries)]
        self.truth = pd.DataFrame(
            {
                "pano_id": ids,
                "lat": self.cell_lat[cell] + rng.normal(0, 1, num_queries),
                "lon": self.cell_lon[cell] + rng.normal(0, 1, num_queries),
                "country": [("NO", "BR", None)[c % 3] for c in cell],
            }
        )
        guess = cell if quality == "good" else rng.integers(0, NUM_CELLS, num_queries)
        chosen = [int(rng.choice(np.flatnonzero(self.train_cell == c))) for c in guess]
        listed = [[int(c), int((c + 1) % NUM_CELLS), *range(3)] for c in guess]
        self.predictions = pd.DataFrame(
            {
                "pano_id": ids,
                "lat": self.train_lat[chosen],
                "lon": self.train_lon[chosen],
                "cell_ids": listed,
                "radius_km": rng.uniform(50, 400, num_queries),
                "confidence": 0.5,
            }
        ).sample(frac=1, random_state=seed)

    def assign(self, lat: np.ndarray, lon: np.ndarray) -> np.ndarray:
        return np.argmin(haversine_km(lat[:, None], lon[:, None], self.cell_lat, self.cell_lon), axis=1)

    def evaluate(self, **other: Any) -> dict[str, Any]:
        return evaluate(
            self.truth,
            self.predictions,
            **{
                "train_lat": self.train_lat,
                "train_lon": self.train_lon,
                "cell_lat": self.cell_lat,
                "cell_lon": self.cell_lon,
                "assign": self.assign,
                "num_bootstrap": 200,
                **other,
            },
        )


def test_every_method_against_its_slow_twin() -> None:
    world = World()
    found = world.evaluate()
    truth = world.truth.set_index("pano_id").sort_index()
    predicted = world.predictions.set_index("pano_id")
    errors: dict[str, list[float]] = {name: [] for name in ("hedwig", "top_cell", "perfect_cell", "nearest_training")}
    covered = in_first = in_five = 0
    for pano_id, row in truth.iterrows():
        answer = predicted.loc[pano_id]
        errors["hedwig"].append(float(haversine_km(row.lat, row.lon, answer.lat, answer.lon)))
        top = answer.cell_ids[0]
        errors["top_cell"].append(float(haversine_km(row.lat, row.lon, world.cell_lat[top], world.cell_lon[top])))
        to_cells = haversine_km(row.lat, row.lon, world.cell_lat, world.cell_lon)
        errors["perfect_cell"].append(float(to_cells.min()))
        errors["nearest_training"].append(float(haversine_km(row.lat, row.lon, world.train_lat, world.train_lon).min()))
        covered += errors["hedwig"][-1] <= answer.radius_km
        in_first += top == to_cells.argmin()
        in_five += to_cells.argmin() in answer.cell_ids
    for name, expected in errors.items():
        np.testing.assert_allclose(found["errors_km"][name], expected, rtol=1e-9)
        assert found["methods"][name] == summarise(found["errors_km"][name], num_bootstrap=200, seed=0)
    assert found["radius_coverage"]["share"] == covered / NUM_QUERIES
    assert found["radius_coverage"]["ci"][0] < covered / NUM_QUERIES < found["radius_coverage"]["ci"][1]
    assert found["cell_recall"] == {"1": in_first / NUM_QUERIES, "5": in_five / NUM_QUERIES}
    nearest = errors["nearest_training"]
    assert found["split"] == pytest.approx({"min_km": min(nearest), "median_km": np.median(nearest)})
    for row in found["countries"]:
        mine = [e for e, c in zip(errors["hedwig"], truth["country"], strict=True) if c == row["country"]]
        assert row["num_queries"] == len(mine)
        assert row["median_km"] == pytest.approx(np.median(mine))
        assert row["accuracy_at_750_km"] == np.mean([e < 750 for e in mine])
        assert row["accuracy_at_750_km_ci"][0] <= row["accuracy_at_750_km"] <= row["accuracy_at_750_km_ci"][1]
    assert [row["country"] for row in found["countries"]] in (["NO", "BR"], ["BR", "NO"])


def test_random_floor_is_a_training_place_per_query() -> None:
    world = World(num_queries=2000)
    found = world.evaluate(num_bootstrap=50)
    truth = world.truth.sort_values("pano_id")
    every = haversine_km(truth.lat.to_numpy()[:, None], truth.lon.to_numpy()[:, None], world.train_lat, world.train_lon)
    assert found["methods"]["random"]["median_km"] == pytest.approx(np.median(every), rel=0.05)
    nearest_pair = np.abs(every - found["errors_km"]["random"][:, None]).min(axis=1)
    assert nearest_pair.max() < 1e-9


def test_good_predictions_beat_the_floors_and_the_verdict_says_so() -> None:
    found = World().evaluate()
    assert found["better_than_floors"]
    assert found["verdict"].startswith("Better than every floor on 200 queries")
    assert found["paired"]["random"]["median_km"]["ci"][1] < 0
    assert found["paired"]["random"]["geoscore"]["ci"][0] > 0
    assert set(found["paired"]) == set(found["methods"]) - {"hedwig"}


def test_random_predictions_are_called_not_better() -> None:
    found = World("random").evaluate()
    assert not found["better_than_floors"]
    assert found["verdict"].startswith("NOT better than answering without looking")
    for floor in ("random (median", "constant (median", "random (GeoScore", "constant_geoscore (GeoScore"):
        assert floor in found["verdict"]


def test_answers_of_the_best_constant_tie_with_it() -> None:
    """A floor that is equalled is not beaten, however good it looks beside a random place."""
    world = World()
    lat, lon = best_constants(world.train_lat, world.train_lon)["constant"]
    world.predictions["lat"], world.predictions["lon"] = lat, lon
    found = world.evaluate()
    assert not found["better_than_floors"]
    assert "constant (median" in found["verdict"]
    assert found["methods"]["constant"] == found["methods"]["hedwig"]


def test_embeddings_answer_by_cosine_and_join_by_id() -> None:
    world = World()
    rng = np.random.default_rng(3)
    references = rng.standard_normal((NUM_TRAIN, 8)).astype(np.float32)
    target = rng.integers(0, NUM_TRAIN, NUM_QUERIES)
    order = rng.permutation(NUM_QUERIES)
    embedded = Embedded(
        query_ids=world.truth["pano_id"].to_numpy()[order],
        queries=3 * references[target][order],
        references=references * rng.uniform(0.1, 9, (NUM_TRAIN, 1)).astype(np.float32),  # lengths do not count
        lat=world.train_lat,
        lon=world.train_lon,
    )
    found = world.evaluate(embeddings={"clip_mean": embedded})
    expected = pd.Series(
        haversine_km(world.truth.lat, world.truth.lon, world.train_lat[target], world.train_lon[target]),
        index=world.truth.pano_id,
    ).sort_index()
    np.testing.assert_allclose(found["errors_km"]["clip_mean"], expected, rtol=1e-9)
    assert "Better than clip_mean" in found["verdict"]
    fewer = Embedded(embedded.query_ids[1:], embedded.queries[1:], references, world.train_lat, world.train_lon)
    with pytest.raises(ValueError, match="1 queries have no embedding for 'clip_mean'"):
        world.evaluate(embeddings={"clip_mean": fewer})


def test_equal_seeds_and_any_row_order_give_equal_records_and_json() -> None:
    world, again = World(), World()
    again.truth = again.truth.iloc[::-1]
    again.predictions = again.predictions.sort_values("pano_id")
    first, second = world.evaluate(), again.evaluate()
    errors = first.pop("errors_km"), second.pop("errors_km")
    assert json.dumps(first, allow_nan=False) == json.dumps(second, allow_nan=False)
    for name in errors[0]:
        np.testing.assert_array_equal(errors[0][name], errors[1][name])
    assert world.evaluate(seed=1)["methods"]["random"] != first["methods"]["random"]


def test_missing_and_double_predictions_are_refused_with_their_number() -> None:
    world = World()
    whole = world.predictions
    world.predictions = whole.iloc[:-3]
    with pytest.raises(ValueError, match="3 of 200 queries have no prediction"):
        world.evaluate()
    world.predictions = pd.concat([whole, whole.iloc[:2]])
    with pytest.raises(ValueError, match="2 pano_id occur more than once in the predictions"):
        world.evaluate()
    world.predictions = whole
    world.truth.loc[0, "lat"] = np.nan
    with pytest.raises(ValueError, match="1 of 200 queries have no position"):
        world.evaluate()
    world.truth = world.truth.iloc[:0]
    with pytest.raises(ValueError, match="no queries"):
        world.evaluate()


def test_predictions_of_other_geocells_are_refused() -> None:
    world = World()
    with pytest.raises(ValueError, match="other geocells"):
        world.evaluate(cell_lat=world.cell_lat[:3], cell_lon=world.cell_lon[:3], assign=lambda lat, lon: 0 * lat)


def test_lists_of_different_length_and_unused_predictions_and_uncovered_queries() -> None:
    world = World()
    world.predictions["cell_ids"] = [row[: 1 + i % 2] for i, row in enumerate(world.predictions["cell_ids"])]
    world.truth = world.truth.iloc[10:]
    found = world.evaluate(assign=lambda lat, lon: np.full(len(lat), -1))
    assert found["num_unused_predictions"] == 10
    assert found["num_outside_cells"] == found["num_queries"] == 190
    assert found["cell_recall"] == {"1": 0.0}
    assert found["methods"]["perfect_cell"]["median_km"] < 300  # the nearest centroid stands in


def test_join_is_by_id_and_names_both_positions() -> None:
    world = World()
    joined = join_predictions(world.truth, world.predictions)
    assert joined["pano_id"].is_monotonic_increasing
    back = world.predictions.set_index("pano_id").loc[joined["pano_id"]]
    np.testing.assert_array_equal(joined["pred_lat"], back["lat"])
    assert {"country", "confidence", "radius_km", "error_km"} <= set(joined.columns)


@pytest.mark.parametrize("name", ["constant", "constant_geoscore"])
def test_best_constant_against_a_fine_grid(name: str) -> None:
    rng = np.random.default_rng(2)
    lat = np.r_[rng.normal(50, 6, 300), rng.normal(-25, 6, 100)]
    lon = np.r_[rng.normal(15, 15, 300), rng.normal(140, 8, 100)]
    quality = {
        "constant": lambda a, b: -np.median(haversine_km(a, b, lat, lon)),
        "constant_geoscore": lambda a, b: geoscore(haversine_km(a, b, lat, lon)).mean(),
    }[name]
    found = quality(*best_constants(lat, lon)[name])
    grid = max(quality(a, b) for a in np.arange(30, 70, 1.0) for b in np.arange(-15, 45, 1.0))
    assert found >= grid - 0.003 * abs(grid)


def test_best_constant_of_one_place_is_that_place_also_across_the_date_line() -> None:
    for lat, lon in ((89.9, 0.0), (-18.0, 179.95)):
        for answer in best_constants(np.full(7, lat), np.full(7, lon)).values():
            assert haversine_km(lat, lon, *answer) < 1.0


def test_brute_force_in_chunks_is_the_loop() -> None:
    rng = np.random.default_rng(0)
    query, reference = rng.standard_normal((23, 6)), rng.standard_normal((50, 6)) * rng.uniform(0.1, 5, (50, 1))
    slow = [max(range(50), key=lambda n: q @ reference[n] / np.linalg.norm(reference[n])) for q in query]
    np.testing.assert_array_equal(brute_force_1nn(query, reference, chunk_rows=5), slow)
    assert brute_force_1nn(query[:0], reference).shape == (0,)
    with pytest.raises(ValueError, match="N > 0"):
        brute_force_1nn(query, reference[:0])
    with pytest.raises(ValueError, match="not finite"):
        brute_force_1nn(query * np.nan, reference)


def slipped_index(slip: int) -> dict[str, Any]:
    """Self-retrieval of an index whose positions were shifted by `slip` rows against its vectors."""
    world, rng = World(), np.random.default_rng(6)
    vectors = rng.standard_normal((NUM_TRAIN, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ids = [f"t{i:04d}" for i in range(NUM_TRAIN)]
    lat, lon = np.roll(world.train_lat, slip), np.roll(world.train_lon, slip)
    index = GeocellIndex.build(vectors, world.train_cell, ids, lat, lon, num_cells=NUM_CELLS)
    return self_retrieval(index, vectors, ids, world.train_lat, world.train_lon, num_queries=100)


def test_training_rows_find_themselves_unless_rows_slipped() -> None:
    assert slipped_index(0) == {"num_queries": 100, "share_at_0_km": 1.0, "max_km": 0.0}
    assert slipped_index(1)["share_at_0_km"] < 0.05


def test_shuffled_labels_are_as_bad_as_random() -> None:
    world = World()
    joined = join_predictions(world.truth, world.predictions)
    shuffled = np.median(shuffled_labels(joined))
    assert shuffled > 10 * joined["error_km"].median()
    assert shuffled == pytest.approx(world.evaluate()["methods"]["random"]["median_km"], rel=0.2)
