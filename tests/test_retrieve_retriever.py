"""The retrieval algorithm against an obvious loop, and each of its knobs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hedwig.geo import haversine_km, spherical_mean
from hedwig.index import GeocellIndex
from hedwig.models.geolocator import Geolocator, GeolocatorConfig
from hedwig.retrieve import Retriever

NUM_CELLS, DIM = 12, 16


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


class World:
    """Cells on a ring around the Earth, 20 references each (none in cell 5), and queries with logits."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.cell_lat, self.cell_lon = rng.uniform(-60, 60, NUM_CELLS), np.linspace(-170, 170, NUM_CELLS)
        cells = np.repeat([c for c in range(NUM_CELLS) if c != 5], 20)
        self.lat = self.cell_lat[cells] + rng.uniform(-1, 1, len(cells))
        self.lon = self.cell_lon[cells] + rng.uniform(-1, 1, len(cells))
        self.cells, self.ids = cells, [f"r{i:04d}" for i in rng.permutation(len(cells))]
        self.vectors = unit(rng.standard_normal((len(cells), DIM)))
        self.index = GeocellIndex.build(
            self.vectors, cells, self.ids, self.lat, self.lon, num_cells=NUM_CELLS, storage="fp32"
        )
        self.queries = unit(rng.standard_normal((25, DIM)))
        self.logits = rng.standard_normal((25, NUM_CELLS)) * 2
        self.names = [f"q{i}" for i in range(25)]

    def retriever(self, **knobs: Any) -> Retriever:
        return Retriever(None, self.index, self.cell_lat, self.cell_lon, **knobs)

    def retrieve(self, **knobs: Any) -> list[Any]:
        return self.retriever(**knobs).retrieve(self.queries, self.logits, self.names)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


@pytest.mark.parametrize("weight", [0.0, 0.1, 5.0])
@pytest.mark.parametrize("mass", [None, 0.6])
def test_answers_are_those_of_the_obvious_loop(weight: float, mass: float | None) -> None:
    world = World()
    found = world.retrieve(num_cells=4, cell_mass=mass, num_neighbours=3, log_prob_weight=weight)
    num_cells_seen = set()
    for b, prediction in enumerate(found):
        probs = softmax(world.logits[b])
        cells: list[int] = []
        for cell in sorted(range(NUM_CELLS), key=lambda c: -probs[c])[:4]:
            if mass is not None and sum(probs[c] for c in cells) >= mass:
                break
            cells.append(cell)
        num_cells_seen.add(len(cells))
        members = [n for n in range(len(world.cells)) if world.cells[n] in cells]
        scores = {n: world.queries[b] @ world.vectors[n] + weight * np.log(probs[world.cells[n]]) for n in members}
        best = sorted(members, key=lambda n: -scores[n])[:3]
        assert prediction.pano_id == f"q{b}"
        assert list(prediction.cell_ids) == cells
        np.testing.assert_allclose(prediction.cell_probs, [probs[c] for c in cells], rtol=1e-9)
        assert list(prediction.neighbour_ids) == [world.ids[n] for n in best]
        np.testing.assert_allclose(prediction.neighbour_scores, [scores[n] for n in best], atol=1e-6)
        assert (prediction.lat, prediction.lon) == (world.lat[best[0]], world.lon[best[0]])
        assert prediction.confidence == pytest.approx(probs[world.cells[best[0]]])
        distance = [
            float(haversine_km(prediction.lat, prediction.lon, world.cell_lat[c], world.cell_lon[c])) for c in cells
        ]
        expected = np.average(distance, weights=[probs[c] for c in cells]) + 1.0
        assert prediction.radius_km == pytest.approx(expected)
    assert num_cells_seen == {4} if mass is None else len(num_cells_seen) > 1


def test_the_combined_winner_may_be_far_down_the_list_by_cosine() -> None:
    """A cosine shortlist re-ranked by log p would miss it: here 30 better cosines stand before the winner."""
    vectors = unit(np.r_[np.tile([1.0, 0.0], (30, 1)), [[0.8, 0.6]]])
    ids = [f"p{i:02d}" for i in range(31)]
    index = GeocellIndex.build(vectors, [0] * 30 + [1], ids, np.zeros(31), np.arange(31.0), num_cells=2)
    retriever = Retriever(None, index, [0, 0], [0, 30], num_neighbours=2, log_prob_weight=1.0)
    found = retriever.retrieve([[1.0, 0.0]], np.log([[0.1, 0.9]]), ["q"])[0]
    assert found.neighbour_ids[0] == "p30"
    assert found.neighbour_scores[0] == pytest.approx(0.8 + np.log(0.9), abs=1e-3)
    assert found.confidence == pytest.approx(0.9)


def test_empty_cells_fall_back_to_the_best_centroid() -> None:
    world = World()
    world.logits[:, 5] = 50.0
    found = world.retrieve(num_cells=1)
    for prediction in found:
        assert prediction.neighbour_ids == ()
        assert prediction.neighbour_scores == prediction.neighbour_lat == ()
        assert (prediction.lat, prediction.lon) == (world.cell_lat[5], world.cell_lon[5])
        assert prediction.confidence == pytest.approx(1.0)
        assert prediction.radius_km == pytest.approx(1.0)


def test_refine_cell_is_the_centroid_and_still_lists_neighbours() -> None:
    world = World()
    for b, prediction in enumerate(world.retrieve(refine="cell")):
        top = int(np.argmax(world.logits[b]))
        assert (prediction.lat, prediction.lon) == (world.cell_lat[top], world.cell_lon[top])
        assert prediction.confidence == pytest.approx(softmax(world.logits[b])[top])
        assert len(prediction.neighbour_ids) == 5


def test_refine_mean_averages_near_neighbours_only() -> None:
    world = World()
    plain, mean = world.retrieve(num_neighbours=6), world.retrieve(num_neighbours=6, refine="mean")
    moved = 0
    for a, b in zip(plain, mean, strict=True):
        near = [m for m in range(6) if haversine_km(a.lat, a.lon, a.neighbour_lat[m], a.neighbour_lon[m]) <= 1000]
        weights = [np.exp((a.neighbour_scores[m] - a.neighbour_scores[0]) / 0.1) for m in near]
        expected = spherical_mean([a.neighbour_lat[m] for m in near], [a.neighbour_lon[m] for m in near], weights)
        assert (b.lat, b.lon) == pytest.approx(expected, abs=1e-9)
        assert b.neighbour_ids == a.neighbour_ids
        moved += (a.lat, a.lon) != (b.lat, b.lon)
    assert moved > 5


def test_radius_scales_and_has_the_cells_radius_as_its_floor() -> None:
    world = World()
    one = world.retrieve()
    twice = world.retrieve(radius_scale=2.0)
    wide = world.retrieve(cell_radius_km=np.full(NUM_CELLS, 41.0))
    for a, b, c in zip(one, twice, wide, strict=True):
        assert b.radius_km == pytest.approx(2 * a.radius_km)
        assert c.radius_km == pytest.approx(a.radius_km + 40.0)


def test_top_k_lists_more_or_less_but_does_not_change_the_answer() -> None:
    world = World()
    retriever = world.retriever(num_cells=3, num_neighbours=4, refine="mean", log_prob_weight=0.1)
    plain = retriever.retrieve(world.queries, world.logits, world.names)
    for top_k in (1, 7, 100):
        for a, b in zip(plain, retriever.retrieve(world.queries, world.logits, world.names, top_k=top_k), strict=True):
            assert (b.lat, b.lon, b.radius_km, b.confidence) == (a.lat, a.lon, a.radius_km, a.confidence)
            assert len(b.cell_ids) == min(top_k, NUM_CELLS)
            assert len(b.neighbour_ids) <= top_k
            shared = min(top_k, 3)
            assert b.cell_ids[:shared] == a.cell_ids[:shared]
            assert b.neighbour_ids[: min(top_k, 4)] == a.neighbour_ids[: min(top_k, 4)]


def test_rows_do_not_influence_each_other() -> None:
    world = World()
    retriever = world.retriever(log_prob_weight=0.2, cell_mass=0.8)
    together = retriever.retrieve(world.queries, world.logits, world.names)
    for b in (0, 7, 24):
        assert retriever.retrieve(world.queries[b : b + 1], world.logits[b : b + 1], [f"q{b}"]) == [together[b]]


@pytest.mark.parametrize("embedding", ["projected", "image"])
def test_stage_with_a_real_geolocator_applies_the_temperature_once(embedding: Any) -> None:
    torch.manual_seed(0)
    world = World()
    form = {"image_dim": DIM, "text_dim": 4, "use_text": True, "projection_dim": DIM, "num_cells": NUM_CELLS}
    geolocator = Geolocator(GeolocatorConfig(**form, temperature=2.5)).eval()
    raw = Geolocator(GeolocatorConfig(**form))
    raw.load_state_dict(geolocator.state_dict())
    text = unit(np.random.default_rng(1).standard_normal((25, 4)))
    batch = {
        "pano_id": np.array(world.names, dtype=object),
        "lat": np.full(25, 99.0),  # a truth that must not survive
        "lon": np.full(25, 99.0),
        "image_embedding": world.queries,
        "text_embedding": np.array([*text, None], dtype=object)[:-1],  # as Arrow hands over lists
    }
    batch["image_embedding"].setflags(write=False)
    out = Retriever(geolocator, world.index, world.cell_lat, world.cell_lon, embedding=embedding)(batch)
    with torch.inference_mode():
        projected, logits = raw(torch.from_numpy(world.queries.copy()), torch.from_numpy(text))
    probs = np.stack([softmax(z) for z in logits.numpy().astype(float) / 2.5])
    assert set(Retriever.writes) <= set(out)
    assert batch["lat"][0] == 99.0  # the batch handed in is not changed
    queries = projected.numpy() if embedding == "projected" else world.queries
    for b in range(25):
        np.testing.assert_allclose(out["cell_probs"][b], np.sort(probs[b])[::-1][:5], rtol=1e-5)
        members = np.flatnonzero(np.isin(world.cells, out["cell_ids"][b]))
        best = members[np.argmax(world.vectors[members] @ queries[b])]
        assert out["neighbour_ids"][b][0] == world.ids[best]
        assert (out["lat"][b], out["lon"][b]) == (world.lat[best], world.lon[best])
        assert out["confidence"][b] == pytest.approx(probs[b][world.cells[best]], rel=1e-5)


def test_image_alone_needs_no_text() -> None:
    world = World()
    config = GeolocatorConfig(image_dim=DIM, text_dim=4, use_text=False, projection_dim=DIM, num_cells=NUM_CELLS)
    retriever = Retriever(Geolocator(config).eval(), world.index, world.cell_lat, world.cell_lon)
    found = [retriever.predict(world.queries, np.full((25, 4), fill), world.names) for fill in (0.0, 1.0)]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"num_cells": 0}, "at least 1"),
        ({"cell_mass": 1.5}, r"\(0, 1\]"),
        ({"refine": "median"}, "median"),
        ({"embedding": "text"}, "text"),
        ({"radius_scale": 0.0}, "radius_scale"),
        ({"cell_radius_km": [1.0]}, "geocells"),
    ],
)
def test_wrong_knobs_are_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        World().retriever(**knobs)


def test_values_that_are_not_finite_are_refused() -> None:
    world = World()
    world.logits[3, 2] = np.nan
    with pytest.raises(ValueError, match="1 values that are not"):
        world.retrieve()
    world = World()
    world.queries[4] = np.nan
    with pytest.raises(ValueError, match="first row 4"):
        world.retrieve()


def test_frames_are_asked_by_their_best_pair_and_cells_by_the_mean() -> None:
    torch.manual_seed(1)
    world, num_frames = World(), 3
    rng = np.random.default_rng(2)
    references = unit(rng.standard_normal((len(world.cells), num_frames, DIM)))
    index = GeocellIndex.build(
        references, world.cells, world.ids, world.lat, world.lon, num_cells=NUM_CELLS, storage="fp32"
    )
    frames = unit(rng.standard_normal((25, num_frames, DIM)))
    mean = unit(frames.mean(axis=1))
    config = GeolocatorConfig(image_dim=DIM, text_dim=4, use_text=False, projection_dim=8, num_cells=NUM_CELLS)
    geolocator = Geolocator(config).eval()
    knobs: dict[str, Any] = {"embedding": "image", "num_cells": 4, "num_neighbours": 3, "log_prob_weight": 0.2}
    retriever = Retriever(geolocator, index, world.cell_lat, world.cell_lon, **knobs)
    text = np.zeros((25, 4), np.float32)
    flat = frames.reshape(25, -1)
    with torch.inference_mode():
        logits = geolocator(torch.from_numpy(mean))[1].numpy()
    for b, found in enumerate(retriever.predict(mean, text, world.names, frames=flat)):
        probs = softmax(logits[b].astype(float))
        cells = np.argsort(-probs)[:4]
        assert list(found.cell_ids) == cells.tolist()
        members = np.flatnonzero(np.isin(world.cells, cells))
        pairs = np.einsum("nvd,wd->nvw", references[members], frames[b]).max(axis=(1, 2))
        score = pairs + 0.2 * np.log(probs[world.cells[members]])
        best = members[np.argsort(-score)[:3]]
        assert list(found.neighbour_ids) == [world.ids[n] for n in best]
        np.testing.assert_allclose(found.neighbour_scores, np.sort(score)[::-1][:3], atol=1e-6)
    with pytest.raises(ValueError, match="no frame_embeddings; run `hedwig embed`"):
        retriever.predict(mean, text, world.names)
    with pytest.raises(ValueError, match="3 vectors per panorama and embedding is 'projected'"):
        Retriever(geolocator, index, world.cell_lat, world.cell_lon)


@pytest.mark.parametrize("embedding", ["projected", "image"])
def test_pooled_frames_take_the_place_of_the_image(embedding: Any) -> None:
    torch.manual_seed(3)
    world, num_frames = World(), 4
    form = {"image_dim": DIM, "text_dim": 4, "use_text": True, "projection_dim": DIM, "num_cells": NUM_CELLS}
    pooling, plain = (
        Geolocator(GeolocatorConfig(**form, num_frames=num_frames)).eval(),
        Geolocator(GeolocatorConfig(**form)),
    )
    with torch.no_grad():
        pooling.query.copy_(0.2 * torch.randn(DIM))
    plain.load_state_dict({key: value for key, value in pooling.state_dict().items() if key != "query"})
    rng = np.random.default_rng(4)
    frames, text = unit(rng.standard_normal((25, num_frames, DIM))), unit(rng.standard_normal((25, 4)))
    pooled = pooling.pool(torch.from_numpy(frames)).detach().numpy()
    asked = Retriever(pooling, world.index, world.cell_lat, world.cell_lon, embedding=embedding)
    expected = Retriever(plain.eval(), world.index, world.cell_lat, world.cell_lon, embedding=embedding)
    nothing = np.zeros((25, DIM), np.float32)  # the mean vector is not read
    batch = {
        "pano_id": np.array(world.names, dtype=object), "image_embedding": nothing, "text_embedding": text,
        "frame_embeddings": frames.reshape(25, -1),
    }  # fmt: skip
    out, wanted = asked(batch), expected.predict(pooled, text, world.names)
    for b in range(25):
        assert out["cell_ids"][b].tolist() == list(wanted[b].cell_ids)
        assert out["neighbour_ids"][b].tolist() == list(wanted[b].neighbour_ids)
        np.testing.assert_allclose(out["neighbour_scores"][b], wanted[b].neighbour_scores, atol=1e-5)
