"""The retrieval algorithm against an obvious loop, and each of its knobs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hedwig.geo import haversine_km, spherical_mean
from hedwig.index import GeocellIndex
from hedwig.models.geolocator import Geolocator, GeolocatorConfig
from hedwig.retrieve import Calibration, Retriever
from hedwig.retrieve.prototypes import Prototypes
from hedwig.retrieve.whitening import Whitening

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
            self.vectors, cells, self.ids, self.lat, self.lon, num_cells=NUM_CELLS, codec="fp32"
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


@pytest.mark.parametrize(("within_km", "temperature"), [(600.0, 1.0), (120.0, 0.5), (20_100.0, 2.0)])
def test_the_mean_is_that_of_the_winning_mode(within_km: float, temperature: float) -> None:
    """The obvious loop, with both numbers of the score."""
    world = World()
    settings: dict[str, Any] = {"num_neighbours": 8, "log_prob_weight": 0.05, "score_temperature": temperature}
    plain = world.retrieve(**settings)
    used = set()
    for a, b in zip(plain, world.retrieve(**settings, refine="mean", mean_within_km=within_km), strict=True):
        total, count = np.zeros(3), 0
        for m in range(8):
            if haversine_km(a.lat, a.lon, a.neighbour_lat[m], a.neighbour_lon[m]) <= within_km:
                lat, lon = np.radians(a.neighbour_lat[m]), np.radians(a.neighbour_lon[m])
                weight = np.exp(10 * (a.neighbour_scores[m] - a.neighbour_scores[0]))
                total += weight * np.array([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)])
                count += 1
        used.add(count)
        expected = (np.degrees(np.arcsin(total[2] / np.linalg.norm(total))), np.degrees(np.arctan2(total[1], total[0])))
        assert (b.lat, b.lon) == pytest.approx(expected, abs=1e-9)
        assert b.neighbour_ids == a.neighbour_ids
    assert len(used) > 1 or used == {8}


def test_only_the_product_of_temperature_and_weight_decides_who_is_best() -> None:
    world = World()
    one = world.retrieve(num_cells=6, log_prob_weight=0.3)
    other = world.retrieve(num_cells=6, log_prob_weight=1.5, score_temperature=0.2)
    for a, b in zip(one, other, strict=True):
        assert (a.lat, a.lon, a.neighbour_ids) == (b.lat, b.lon, b.neighbour_ids)
        np.testing.assert_allclose(np.array(a.neighbour_scores) / 0.2, b.neighbour_scores)
    assert [a.neighbour_ids for a in one] != [a.neighbour_ids for a in world.retrieve(num_cells=6)]
    np.testing.assert_allclose(
        world.retrieve(score_temperature=0.25)[0].neighbour_scores, 4 * np.array(world.retrieve()[0].neighbour_scores)
    )


CALIBRATION = Calibration(
    radius_scale=2.0,
    radius_50_scale=0.25,
    region_90_level=0.85,
    region_50_level=0.4,
    confidence_km=5000.0,
    confidence_weights=(0.2, 0.5, -0.3, 1.0),
)


def test_a_calibration_makes_radii_confidence_and_regions() -> None:
    world = World()
    raw = world.retrieve(num_cells=4, log_prob_weight=0.1)
    found = world.retrieve(num_cells=4, log_prob_weight=0.1, calibration=CALIBRATION, regions=True, abstain_below=0.6)
    for b, (a, c) in enumerate(zip(raw, found, strict=True)):
        assert (c.lat, c.lon, c.neighbour_ids) == (a.lat, a.lon, a.neighbour_ids)
        assert c.radius_km == pytest.approx(2 * a.radius_km)
        assert c.radius_50_km == pytest.approx(0.25 * a.radius_km)
        probs = softmax(world.logits[b])
        best = world.ids.index(c.neighbour_ids[0])
        near = sum(
            probs[cell]
            for cell in c.cell_ids
            if cell == world.cells[best]
            or haversine_km(c.lat, c.lon, world.cell_lat[cell], world.cell_lon[cell]) <= 5000
        )
        near = min(near, 1 - 1e-4)
        z = 0.2 + 0.5 * np.log(near / (1 - near)) - 0.3 * np.log(a.radius_km / 5000)
        z += float(world.queries[b] @ world.vectors[best])
        assert c.confidence == pytest.approx(1 / (1 + np.exp(-z)), abs=1e-6)
        assert c.localisable == (c.confidence >= 0.6)
        ranked = np.argsort(-probs)
        for region, level in ((c.region_50, 0.4), (c.region_90, 0.85)):
            num = 1 + int(np.argmax(np.cumsum(probs[ranked]) > level))
            assert list(region) == ranked[:num].tolist()
        assert (a.radius_50_km, a.localisable, a.region_90) == (None, True, ())
    assert len({c.localisable for c in found}) == 2
    assert world.retrieve(calibration=CALIBRATION)[0].region_90 == ()  # not asked for
    assert world.retrieve(regions=True)[0].region_90 == ()  # not calibrated


def test_settings_win_over_the_calibration_and_none_leaves_it_the_choice() -> None:
    world, tuned = World(), Calibration(radius_scale=3.0, score_temperature=0.5, log_prob_weight=0.7)
    left = world.retriever(calibration=tuned, log_prob_weight=None)
    assert (left.radius_scale, left.score_temperature, left.log_prob_weight) == (3.0, 0.5, 0.7)
    given = world.retriever(calibration=tuned, log_prob_weight=0.0, score_temperature=1.0, radius_scale=1.0)
    assert (given.radius_scale, given.score_temperature, given.log_prob_weight) == (1.0, 1.0, 0.0)
    plain = world.retriever()
    assert (plain.radius_scale, plain.score_temperature, plain.log_prob_weight) == (1.0, 1.0, 0.0)


@pytest.mark.parametrize("refine", ["neighbour", "mean", "prototype"])
def test_calibrated_rows_do_not_influence_each_other(refine: Any) -> None:
    world = World()
    retriever = world.retriever(
        calibration=CALIBRATION, refine=refine, regions=True, log_prob_weight=0.2, cell_mass=0.8, num_neighbours=7,
        prototypes=Prototypes.build(world.index),
    )  # fmt: skip
    together = retriever.retrieve(world.queries, world.logits, world.names)
    for b in (0, 7, 24):
        assert retriever.retrieve(world.queries[b : b + 1], world.logits[b : b + 1], [f"q{b}"]) == [together[b]]
    for a, b in zip(together, retriever.retrieve(world.queries, world.logits, world.names, top_k=9), strict=True):
        assert (b.lat, b.lon, b.radius_km, b.confidence) == (a.lat, a.lon, a.radius_km, a.confidence)


def test_whitened_queries_meet_whitened_references() -> None:
    torch.manual_seed(0)
    world = World()
    whitening = Whitening.fit(world.vectors, dim=10)
    index = GeocellIndex.build(
        whitening(world.vectors), world.cells, world.ids, world.lat, world.lon, num_cells=NUM_CELLS, codec="fp32"
    )
    config = GeolocatorConfig(image_dim=DIM, text_dim=4, use_text=False, projection_dim=8, num_cells=NUM_CELLS)
    retriever = Retriever(
        Geolocator(config).eval(), index, world.cell_lat, world.cell_lon, embedding="whitened", whitening=whitening,
        num_cells=4,
    )  # fmt: skip
    white = whitening(world.vectors)
    for b, found in enumerate(retriever.predict(world.queries, np.zeros((25, 4)), world.names)):
        members = np.flatnonzero(np.isin(world.cells, found.cell_ids))
        cosines = white[members] @ whitening(world.queries[b : b + 1])[0]
        assert found.neighbour_ids[0] == world.ids[members[cosines.argmax()]]
        assert found.neighbour_scores[0] == pytest.approx(cosines.max(), abs=1e-6)


def test_the_stage_writes_what_is_optional_too() -> None:
    world = World()
    config = GeolocatorConfig(image_dim=DIM, text_dim=4, use_text=False, projection_dim=DIM, num_cells=NUM_CELLS)
    batch = {
        "pano_id": np.array(world.names, dtype=object), "image_embedding": world.queries,
        "text_embedding": np.zeros((25, 4), np.float32),
    }  # fmt: skip
    head = Geolocator(config).eval()
    plain = Retriever(head, world.index, world.cell_lat, world.cell_lon)(batch)
    assert set(Retriever.writes) <= set(plain)
    assert np.isnan(plain["radius_50_km"]).all()
    assert plain["localisable"].tolist() == [True] * 25
    known = Retriever(head, world.index, world.cell_lat, world.cell_lon, calibration=CALIBRATION, abstain_below=1.0)
    out = known(batch)
    np.testing.assert_allclose(out["radius_50_km"], out["radius_km"] / 8)
    assert out["localisable"].tolist() == [False] * 25


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
        ({"score_temperature": 0.0}, "score_temperature"),
        ({"mean_within_km": float("nan")}, "mean_within_km"),
        ({"log_prob_weight": -0.1}, "log_prob_weight"),
        ({"abstain_below": 1.5}, "abstain_below"),
        ({"embedding": "whitened"}, "whitening of the index"),
        ({"refine": "prototype"}, "there are none; set retrieve.refine=prototype"),
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
        references, world.cells, world.ids, world.lat, world.lon, num_cells=NUM_CELLS, codec="fp32"
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
