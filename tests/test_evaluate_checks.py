"""The sanity checks must fail what they are there for: each slip is made on purpose, and the check is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_evaluate_record import World

from hedwig.evaluate import join_predictions, sanity_checks, shuffled_labels
from hedwig.geocells import Geocells
from hedwig.index import GeocellIndex
from hedwig.models.geolocator import Geolocator, GeolocatorConfig
from hedwig.retrieve.build import build_index


def checks(change: Any = None, **world: Any) -> dict[str, Any]:
    made = World(**world)
    if change is not None:
        change(made.predictions, made.truth)
    return sanity_checks(join_predictions(made.truth, made.predictions))


def exchange(table: pd.DataFrame) -> None:
    lat, lon = table["lat"].to_numpy().copy(), table["lon"].to_numpy().copy()
    keep = np.abs(lon) <= 90  # elsewhere the exchanged pair is no position and the listing would have refused it
    table["lat"], table["lon"] = np.where(keep, lon, lat), np.where(keep, lat, lon)


def test_good_answers_pass_everything() -> None:
    found = checks()
    assert found["shuffled_labels"]["passed"] is True
    assert found["swapped_answers"]["passed"] is True
    assert found["shuffled_labels"]["median_km"] < found["shuffled_labels"]["shuffled_median_km"]


def test_labels_dealt_to_the_wrong_queries_fail() -> None:
    def slip(predictions: pd.DataFrame, truth: pd.DataFrame) -> None:
        predictions["pano_id"] = np.random.default_rng(1).permutation(predictions["pano_id"].to_numpy())

    assert checks(slip)["shuffled_labels"]["passed"] is False


def test_answers_all_alike_fail() -> None:
    def constant(predictions: pd.DataFrame, truth: pd.DataFrame) -> None:
        predictions["lat"], predictions["lon"] = 50.0, 20.0

    assert checks(constant)["shuffled_labels"]["passed"] is False


@pytest.mark.parametrize("side", ["answers", "truth"])
def test_exchanged_axes_fail_on_either_side(side: str) -> None:
    def swap(predictions: pd.DataFrame, truth: pd.DataFrame) -> None:
        exchange(predictions if side == "answers" else truth)

    found = checks(swap)["swapped_answers"]
    assert found["passed"] is False
    assert found["swapped_median_km"] < found["median_km"] / 2


def test_without_exchangeable_answers_nothing_is_claimed() -> None:
    def pacific(predictions: pd.DataFrame, truth: pd.DataFrame) -> None:
        predictions["lon"] = 150.0

    assert checks(pacific)["swapped_answers"] == {"num_queries": 0, "passed": None}


def test_the_record_holds_the_checks_and_a_slip_shows_in_it() -> None:
    world = World()
    assert world.evaluate(num_bootstrap=10)["checks"]["shuffled_labels"]["passed"] is True
    world.predictions["pano_id"] = np.random.default_rng(1).permutation(world.predictions["pano_id"].to_numpy())
    assert world.evaluate(num_bootstrap=10)["checks"]["shuffled_labels"]["passed"] is False


def test_shuffled_errors_are_those_of_some_permutation() -> None:
    world = World(num_queries=30)
    joined = join_predictions(world.truth, world.predictions)
    assert not np.allclose(shuffled_labels(joined), joined["error_km"])
    assert np.allclose(np.sort(shuffled_labels(joined, seed=3)), np.sort(shuffled_labels(joined, seed=3)))


def test_building_an_index_of_slipped_rows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage's own self-retrieval: positions rolled by one row while the index is made, nothing else touched."""
    rng, num = np.random.default_rng(0), 60
    lat, lon = rng.uniform(-50, 60, num), rng.uniform(-170, 170, num)
    cells = Geocells.from_membership(lat, lon, np.arange(num) % 6)
    vectors = rng.standard_normal((num, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = {
        "pano_id": np.array([f"t{i:02d}" for i in range(num)], dtype=object),
        "split": np.full(num, "train", dtype=object),
        "lat": lat,
        "lon": lon,
        "image_embedding": vectors,
        "text_embedding": np.zeros((num, 1), dtype=np.float32),
    }
    Geolocator(GeolocatorConfig(16, 1, False, 8, len(cells))).save(tmp_path / "head")
    keep = GeocellIndex.build

    def build(target: Path) -> dict[str, Any]:
        target.mkdir()
        return build_index(
            rows, cells, tmp_path / "head", target, embedding="image", codec="fp32", retrieve={"num_cells": 3}
        )

    def slipped(vectors: Any, members: Any, names: Any, lat: Any, lon: Any, **other: Any) -> Any:
        return keep(vectors, members, names, np.roll(lat, 1), np.roll(lon, 1), **other)

    assert build(tmp_path / "sound")["self_retrieval"] == 1.0
    monkeypatch.setattr(GeocellIndex, "build", slipped)
    with pytest.raises(ValueError, match="vectors and names have slipped"):
        build(tmp_path / "slipped")
