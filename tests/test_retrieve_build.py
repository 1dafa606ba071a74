"""An index built from embeddings of a simulated world: what its calibration promises is kept on new queries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hedwig.geo import haversine_km
from hedwig.geocells import Geocells
from hedwig.index import INDEX_FILE, ROWS_FILE, GeocellIndex
from hedwig.models.geolocator import Geolocator, GeolocatorConfig
from hedwig.retrieve import Calibration, Retriever, build_index
from hedwig.retrieve.calibration import CALIBRATION_FILE
from hedwig.retrieve.prototypes import PROTOTYPES_FILE, Prototypes
from hedwig.retrieve.whitening import WHITENING_FILE, Whitening

DIM, NUM_CELLS, NUM_TRAIN, NUM_VAL, NUM_TEST = 24, 24, 600, 1000, 1500


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


class World:
    """Places in cells; a picture looks like its cell, a little like its place, and is noisy, some much more so."""

    def __init__(self, folder: Path) -> None:
        rng = np.random.default_rng(11)
        num = NUM_TRAIN + NUM_VAL + NUM_TEST
        centre_lat, centre_lon = np.repeat([-40.0, 0.0, 40.0], 8), np.tile(np.linspace(-150, 160, 8), 3)
        looks = rng.standard_normal((NUM_CELLS, DIM))
        looks[1::2] = looks[::2] + 0.6 * rng.standard_normal((NUM_CELLS // 2, DIM))  # neighbours look alike
        cell = rng.integers(0, NUM_CELLS, num)
        lat, lon = centre_lat[cell] + rng.uniform(-6, 6, num), centre_lon[cell] + rng.uniform(-6, 6, num)
        noise = rng.choice([0.4, 1.2], num)[:, None] * rng.standard_normal((num, DIM))
        offsets = np.stack([lat - centre_lat[cell], lon - centre_lon[cell]], axis=1) / 6
        image = unit(looks[cell] + 0.8 * offsets @ rng.standard_normal((2, DIM)) + noise)
        split = np.repeat(["train", "val", "test"], [NUM_TRAIN, NUM_VAL, NUM_TEST]).astype(object)
        self.all: dict[str, Any] = {
            "pano_id": np.array([f"p{i:05d}" for i in rng.permutation(num)], dtype=object),
            "lat": lat, "lon": lon, "split": split, "image_embedding": image,
            "text_embedding": np.zeros((num, 1), np.float32),
        }  # fmt: skip
        train = split == "train"
        self.cells = Geocells.from_membership(lat[train], lon[train], cell[train])
        owner = self.cells.assign(centre_lat, centre_lon)
        form = GeolocatorConfig(DIM, 1, use_text=False, projection_dim=DIM, num_cells=NUM_CELLS)
        head = Geolocator(form)
        with torch.no_grad():
            head.projection.weight.copy_(torch.eye(DIM))
            head.projection.bias.zero_()
            head.classifier.weight[torch.tensor(owner).long()] = torch.tensor(12 * unit(looks))
            head.classifier.bias.zero_()
        self.head = folder / "head"
        head.save(self.head)

    def rows(self, *splits: str, only: int | None = None) -> dict[str, Any]:
        chosen = np.flatnonzero(np.isin(self.all["split"], splits))
        if only is not None:
            val = chosen[self.all["split"][chosen] == "val"]
            chosen = np.setdiff1d(chosen, val[only:])
        return {name: column[chosen] for name, column in self.all.items()}

    def build(self, folder: Path, **options: Any) -> dict[str, Any]:
        only = options.pop("only", None)
        given: dict[str, Any] = {"embedding": "image", "codec": "fp16", "retrieve": {"num_cells": 6}, **options}
        folder.mkdir(parents=True, exist_ok=True)
        return build_index(self.rows("train", "val", only=only), self.cells, self.head, folder, **given)

    def ask(self, folder: Path, **knobs: Any) -> tuple[list[Any], np.ndarray]:
        """Predictions of the test rows by what was written, and their errors."""
        table, rows = self.cells.table, self.rows("test")
        retriever = Retriever(
            Geolocator.load(self.head), GeocellIndex.open(folder), table["lat"], table["lon"],
            cell_radius_km=table["radius_km"], calibration=Calibration.load(folder / CALIBRATION_FILE),
            **{"embedding": "image", "num_cells": 6, **knobs},
        )  # fmt: skip
        found = retriever.predict(rows["image_embedding"], rows["text_embedding"], rows["pano_id"].tolist())
        error_km = haversine_km(rows["lat"], rows["lon"], [p.lat for p in found], [p.lon for p in found])
        return found, error_km


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def test_radii_regions_and_confidence_keep_their_promises_on_new_queries(world: World, tmp_path: Path) -> None:
    """1000 calibrating rows: sd of the coverage is 1 % for 90 %, 1.6 % for 50 %; of 1500 queries 0.8 % and 1.3 %."""
    details = world.build(tmp_path, confidence_km=500.0)
    assert (details["num_vectors"], details["num_calibration"], details["num_tuning"]) == (NUM_TRAIN, NUM_VAL, 0)
    assert details["self_retrieval"] > 0.99
    found, error_km = world.ask(tmp_path, regions=True)
    truth = world.cells.assign(world.rows("test")["lat"], world.rows("test")["lon"])
    radius = np.array([p.radius_km for p in found])
    assert 0.85 < (error_km <= radius).mean() < 0.95
    assert 0.43 < (error_km <= np.array([p.radius_50_km for p in found])).mean() < 0.57
    assert 0.85 < np.mean([t in p.region_90 for t, p in zip(truth, found, strict=True)]) < 0.95
    assert np.mean([len(p.region_50) for p in found]) < np.mean([len(p.region_90) for p in found]) < NUM_CELLS / 2
    # Radii follow the row: where they are small, errors are.
    narrow = radius < np.median(radius)
    assert np.median(error_km[narrow]) < 0.7 * np.median(error_km[~narrow])
    confidence, good = np.array([p.confidence for p in found]), error_km <= 500
    assert 0.1 < good.mean() < 0.9
    order = np.argsort(confidence)
    for part in np.array_split(order, 5):
        assert good[part].mean() == pytest.approx(confidence[part].mean(), abs=0.1)
    assert good[order[-300:]].mean() > good[order[:300]].mean() + 0.2


def test_tuning_records_its_grid_and_is_no_worse_than_the_paper(world: World, tmp_path: Path) -> None:
    details = world.build(tmp_path, tune=True)
    written = json.loads((tmp_path / CALIBRATION_FILE).read_text())
    assert (details["num_tuning"], details["num_calibration"]) == (NUM_VAL / 2, NUM_VAL / 2)
    grid = written["tuning"]
    assert [row["log_prob_weight"] for row in grid] == [0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
    best = max(grid, key=lambda row: row["geoscore"])
    assert details["log_prob_weight"] == written["log_prob_weight"] == best["log_prob_weight"] > 0
    found, error_km = world.ask(tmp_path)
    _, plain_km = world.ask(tmp_path, log_prob_weight=0.0)
    assert np.exp(-error_km / 1492.7).mean() > np.exp(-plain_km / 1492.7).mean()
    assert 0.85 < (error_km <= np.array([p.radius_km for p in found])).mean() < 0.95
    world.build(tmp_path / "median", tune=True, tune_for="median")
    other = json.loads((tmp_path / "median" / CALIBRATION_FILE).read_text())
    assert other["log_prob_weight"] == min(other["tuning"], key=lambda row: row["median_km"])["log_prob_weight"]


def test_what_is_settled_is_not_tuned(world: World, tmp_path: Path) -> None:
    settings = {"num_cells": 6, "log_prob_weight": 0.03, "score_temperature": None}
    details = world.build(tmp_path / "given", tune=True, retrieve=settings)
    assert details["log_prob_weight"] == 0.03
    mean = world.build(tmp_path / "mean", tune=True, retrieve={**settings, "refine": "mean"})
    written = json.loads((tmp_path / "mean" / CALIBRATION_FILE).read_text())
    assert mean["log_prob_weight"] == 0.03
    assert sorted(row["score_temperature"] for row in written["tuning"]) == [0.25, 0.5, 1.0, 2.0, 4.0]
    assert {row["log_prob_weight"] for row in written["tuning"]} == {0.03}
    cell = world.build(tmp_path / "cell", tune=True, retrieve={"refine": "cell"})
    assert (cell["num_tuning"], cell["log_prob_weight"]) == (0, 0.0)


def test_few_validation_rows_calibrate_and_do_not_tune_and_none_promise_nothing(world: World, tmp_path: Path) -> None:
    few = world.build(tmp_path / "few", tune=True, only=15)
    assert (few["num_tuning"], few["num_calibration"]) == (0, 15)
    known = Calibration.load(tmp_path / "few" / CALIBRATION_FILE)
    assert known.confidence_weights is None
    assert known.radius_50_scale is not None
    assert known.radius_50_scale <= known.radius_scale
    none = world.build(tmp_path / "none", tune=True, only=0)
    assert (none["num_calibration"], none["radius_scale"]) == (0, 1.0)
    assert Calibration.load(tmp_path / "none" / CALIBRATION_FILE) == Calibration()


def test_a_whitened_index_carries_its_whitening(world: World, tmp_path: Path) -> None:
    world.build(tmp_path, embedding="whitened", whiten_dim=12)
    whitening = Whitening.load(tmp_path)
    assert whitening.matrix.shape == (DIM, 12)
    assert GeocellIndex.open(tmp_path).dim == 12
    found, error_km = world.ask(tmp_path, embedding="whitened", whitening=whitening)
    assert 0.85 < (error_km <= np.array([p.radius_km for p in found])).mean() < 0.95
    train = world.rows("train")["image_embedding"]
    np.testing.assert_allclose(whitening.mean, train.mean(axis=0), atol=1e-6)  # validation rows teach nothing here


def test_prototypes_are_built_where_they_are_asked_for(world: World, tmp_path: Path) -> None:
    world.build(tmp_path / "plain")
    names = {path.name for path in (tmp_path / "plain").iterdir()}
    assert names == {"index.json", INDEX_FILE, ROWS_FILE, CALIBRATION_FILE}
    world.build(tmp_path, retrieve={"num_cells": 6, "refine": "prototype"}, prototype_min_samples=5, tune=True)
    assert (tmp_path / PROTOTYPES_FILE).is_file()
    assert not (tmp_path / WHITENING_FILE).exists()
    prototypes = Prototypes.load(tmp_path)
    assert len(prototypes.clusters) == NUM_TRAIN
    found, error_km = world.ask(tmp_path, refine="prototype", prototypes=prototypes)
    assert 0.85 < (error_km <= np.array([p.radius_km for p in found])).mean() < 0.95


def test_any_row_order_builds_the_same_bytes(world: World, tmp_path: Path) -> None:
    rows = world.rows("train", "val")
    order = np.random.default_rng(0).permutation(len(rows["lat"]))
    for name, these in (("a", rows), ("b", {k: v[order] for k, v in rows.items()})):
        (tmp_path / name).mkdir()
        build_index(
            these, world.cells, world.head, tmp_path / name, embedding="whitened", codec="fp16", tune=True,
            retrieve={"refine": "prototype"},
        )  # fmt: skip
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_useless_requests_are_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"index\.embedding=image"):
        world.build(tmp_path, embedding="projected", each_frame=True)
    with pytest.raises(ValueError, match="tune_for='mode'"):
        world.build(tmp_path, tune=True, tune_for="mode")
    rows = world.rows("val")
    with pytest.raises(ValueError, match="nothing to search"):
        build_index(rows, world.cells, world.head, tmp_path, embedding="image", codec="fp16", retrieve={})


def test_frames_may_be_whitened_too(world: World, tmp_path: Path) -> None:
    """max_sim: every frame is whitened alike, and a training panorama still finds itself by its own frames."""
    rows, rng = world.rows("train", "val"), np.random.default_rng(3)
    frames = unit(rows["image_embedding"][:, None] + 0.2 * rng.standard_normal((len(rows["lat"]), 3, DIM)))
    rows["frame_embeddings"] = frames.reshape(len(frames), -1)
    details = build_index(
        rows, world.cells, world.head, tmp_path, embedding="whitened", codec="fp16", each_frame=True,
        retrieve={"num_cells": NUM_CELLS, "refine": "prototype"}, tune=True,
    )  # fmt: skip
    assert details["self_retrieval"] == 1.0
    index, whitening = GeocellIndex.open(tmp_path), Whitening.load(tmp_path)
    assert (index.num_frames, index.dim) == (3, DIM)
    table = world.cells.table
    retriever = Retriever(
        Geolocator.load(world.head), index, table["lat"], table["lon"], embedding="whitened", whitening=whitening,
        num_cells=NUM_CELLS,
    )  # fmt: skip
    train = np.flatnonzero(rows["split"] == "train")[:50]
    found = retriever.predict(
        rows["image_embedding"][train],
        rows["text_embedding"][train],
        rows["pano_id"][train].tolist(),
        frames=rows["frame_embeddings"][train],
    )
    assert [p.neighbour_ids[0] for p in found] == rows["pano_id"][train].tolist()
