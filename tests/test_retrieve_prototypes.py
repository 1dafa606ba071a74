"""Prototype refinement against scikit-learn's OPTICS and an obvious loop, and PIGEON's guard and bug."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from sklearn.cluster import OPTICS

from hedwig.geo import haversine_km
from hedwig.index import GeocellIndex
from hedwig.retrieve import Retriever
from hedwig.retrieve.prototypes import PROTOTYPES_FILE, Prototypes

DIM, NUM_CELLS = 8, 6


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def towns(seed: int = 0) -> tuple[GeocellIndex, np.ndarray, np.ndarray]:
    """Cells of a few towns each and stray places between; cell 4 is empty, cell 5 has two references."""
    rng = np.random.default_rng(seed)
    cell_lat, cell_lon = rng.uniform(-50, 50, NUM_CELLS), np.linspace(-150, 150, NUM_CELLS)
    lat, lon, cells = [], [], []
    for cell, num_towns in enumerate((3, 2, 4, 1)):
        for _ in range(num_towns):
            centre = cell_lat[cell] + rng.uniform(-2, 2), cell_lon[cell] + rng.uniform(-2, 2)
            lat.append(centre[0] + 0.02 * rng.standard_normal(15))
            lon.append(centre[1] + 0.02 * rng.standard_normal(15))
        lat.append(cell_lat[cell] + rng.uniform(-3, 3, 4))
        lon.append(cell_lon[cell] + rng.uniform(-3, 3, 4))
        cells += [cell] * (15 * num_towns + 4)
    lat.append(np.full(2, cell_lat[5]))
    lon.append(np.full(2, cell_lon[5]))
    cells += [5, 5]
    names = [f"r{i:03d}" for i in rng.permutation(len(cells))]
    vectors = unit(rng.standard_normal((len(cells), DIM)))
    index = GeocellIndex.build(
        vectors, cells, names, np.concatenate(lat), np.concatenate(lon), num_cells=NUM_CELLS, codec="fp32"
    )
    return index, cell_lat, cell_lon


def test_clusters_are_those_of_optics_on_great_circle_distances() -> None:
    index, _, _ = towns()
    found = Prototypes.build(index, min_samples=3, xi=0.15)
    num_noise = 0
    for cell in range(NUM_CELLS):
        members = np.flatnonzero(index.cell_ids == cell)
        if len(members) < 4:
            assert len(np.unique(found.clusters[members])) == min(1, len(members))
            continue
        lat, lon = index.lat[members], index.lon[members]
        km = haversine_km(lat[:, None], lon[:, None], lat, lon)
        km[km == 0] = 1e-5  # as PIGEON does
        np.fill_diagonal(km, 0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = OPTICS(min_samples=3, xi=0.15, metric="precomputed").fit(km).labels_
        clusters = found.clusters[members]
        assert np.array_equal(clusters < 0, expected < 0)
        assert len(set(zip(clusters, expected, strict=True))) == len(set(expected)) == len(set(clusters))
        num_noise += int((expected < 0).sum())
    assert num_noise > 0
    vectors = index.vectors()
    for number, cell in enumerate(found.cell_ids):
        members = np.flatnonzero(found.clusters == number)
        assert set(index.cell_ids[members]) == {cell}
        np.testing.assert_allclose(found.vectors[number], vectors[members].mean(axis=0), atol=1e-6)


def test_answers_are_those_of_the_obvious_loop() -> None:
    index, cell_lat, cell_lon = towns()
    prototypes = Prototypes.build(index)
    rng = np.random.default_rng(4)
    queries, logits = unit(rng.standard_normal((60, DIM))), 0.7 * rng.standard_normal((60, NUM_CELLS))
    retriever = Retriever(
        None, index, cell_lat, cell_lon, refine="prototype", prototypes=prototypes, num_cells=4,
        prototype_temperature=0.3,
    )  # fmt: skip
    vectors, guarded, changed = index.vectors(), 0, 0
    for b, found in enumerate(retriever.retrieve(queries, logits, [str(b) for b in range(60)])):
        probs = np.exp(logits[b]) / np.exp(logits[b]).sum()
        cells = np.argsort(-probs)[:4]
        nearest = {}
        for cell in cells:
            away = {
                p: np.linalg.norm(queries[b] - prototypes.vectors[p])
                for p in np.flatnonzero(prototypes.cell_ids == cell)
            }
            if away:
                nearest[cell] = min(away, key=lambda p: away[p]), min(away.values())
        soft = {cell: np.exp(-distance / 0.3) for cell, (_, distance) in nearest.items()}
        final = {cell: probs[cell] * soft[cell] / sum(soft.values()) for cell in nearest}

        def member(cell: int, nearest: dict = nearest, query: np.ndarray = queries[b]) -> int:
            members = np.flatnonzero(prototypes.clusters == nearest[cell][0])
            return int(members[np.argmin(np.linalg.norm(query - vectors[members], axis=1))])

        cell = max(final, key=lambda c: final[c])
        row = member(cell)
        first = cells[0]
        if first in nearest and haversine_km(cell_lat[first], cell_lon[first], index.lat[row], index.lon[row]) > 1000:
            guarded += cell != first
            row = member(first)
        changed += index.pano_ids[row] != found.neighbour_ids[0]
        assert (found.lat, found.lon) == (index.lat[row], index.lon[row])
    assert guarded > 5
    assert changed > 5


def test_the_nearest_member_answers_and_not_the_farthest() -> None:
    """The released code of PIGEON takes the argmax of distances within the winning cluster."""
    vectors = unit(np.array([[1, 0], [0.9, 0.1], [0.5, 0.5], [0, 1]]))
    index = GeocellIndex.build(vectors, [0] * 4, list("abcd"), [1, 1.01, 1.02, 1.03], [2.0] * 4, num_cells=1)
    prototypes = Prototypes.build(index, min_samples=4)
    assert prototypes.clusters.tolist() == [0] * 4
    found = Retriever(None, index, [1.0], [2.0], refine="prototype", prototypes=prototypes).retrieve(
        unit(np.array([[0.92, 0.08]])), [[0.0]], ["q"]
    )[0]
    assert found.lat == 1.01


def test_cells_within_reach_may_be_changed_and_farther_ones_not() -> None:
    vectors = unit(np.array([[1, 0], [0, 1], [0, 1.0]]))
    queries = unit(np.array([[0.0, 1.0]]))
    for lon, expected in ((5.0, 5.0), (20.0, 0.0)):
        index = GeocellIndex.build(vectors, [0, 1, 1], list("abc"), np.zeros(3), [0, lon, lon], num_cells=2)
        retriever = Retriever(
            None, index, [0, 0], [0, lon], refine="prototype", prototypes=Prototypes.build(index),
            prototype_temperature=0.5,
        )  # fmt: skip
        found = retriever.retrieve(queries, np.log([[0.55, 0.45]]), ["q"])[0]
        assert found.lon == expected  # 556 km, 2224 km
        assert found.confidence == pytest.approx(0.45 if expected else 0.55)


def test_without_a_reference_the_centroid_answers_and_frames_count_by_their_mean() -> None:
    index, cell_lat, cell_lon = towns()
    retriever = Retriever(
        None, index, cell_lat, cell_lon, refine="prototype", prototypes=Prototypes.build(index), num_cells=1
    )
    logits = np.zeros((1, NUM_CELLS))
    logits[0, 4] = 9
    found = retriever.retrieve(unit(np.ones((1, DIM))), logits, ["q"])[0]
    assert (found.lat, found.lon, found.neighbour_ids) == (cell_lat[4], cell_lon[4], ())
    frames = unit(np.random.default_rng(0).standard_normal((len(index), 3, DIM)))
    several = GeocellIndex.build(
        frames, index.cell_ids, index.pano_ids, index.lat, index.lon, num_cells=NUM_CELLS, codec="fp32"
    )
    pooled = Prototypes.build(several)
    np.testing.assert_array_equal(pooled.clusters, Prototypes.build(index).clusters)
    np.testing.assert_allclose(pooled.vectors[0], frames[pooled.clusters == 0].mean(axis=(0, 1)), atol=1e-6)
    asked = Retriever(None, several, cell_lat, cell_lon, embedding="image", refine="prototype", prototypes=pooled)
    rows = np.flatnonzero(pooled.clusters >= 0)[:5]
    logits = np.where(np.arange(NUM_CELLS) == index.cell_ids[rows][:, None], 50.0, 0.0)
    for row, found in zip(rows, asked.retrieve(frames[rows], logits, ["q"] * 5), strict=True):
        best, _ = pooled.nearest(frames[row].mean(axis=0), index.cell_ids[row : row + 1].astype(np.int64))
        members = np.flatnonzero(pooled.clusters == best[0])
        expected = members[np.einsum("nvd,wd->nvw", frames[members], frames[row]).max(axis=(1, 2)).argmax()]
        assert found.lat == index.lat[expected]


def test_large_cells_are_halved_before_optics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hedwig.retrieve.prototypes.OPTICS_CAP", 12)
    index, _, _ = towns()
    found = Prototypes.build(index)
    assert (np.diff(found.cell_ids) >= 0).all()
    assert max(np.bincount(found.clusters[found.clusters >= 0])) <= 12
    assert (found.clusters >= 0).sum() > len(index) / 2


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    index, _, _ = towns()
    made = Prototypes.build(index)
    made.save(tmp_path)
    first = (tmp_path / PROTOTYPES_FILE).read_bytes()
    Prototypes.build(index).save(tmp_path)
    assert (tmp_path / PROTOTYPES_FILE).read_bytes() == first
    loaded = Prototypes.load(tmp_path)
    for name in ("vectors", "cell_ids", "clusters", "num_cells"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(made, name))
    (tmp_path / PROTOTYPES_FILE).write_bytes(first[: len(first) // 2])
    with pytest.raises(ValueError, match=r"holds no prototypes.*hedwig index"):
        Prototypes.load(tmp_path)
    (tmp_path / PROTOTYPES_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=r"retrieve\.refine=prototype"):
        Prototypes.load(tmp_path)
    with pytest.raises(ValueError, match="prototype_xi=1"):
        Prototypes.build(index, xi=1.0)
    with pytest.raises(ValueError, match="do not fit"):
        Prototypes(made.vectors, made.cell_ids[::-1], made.clusters, NUM_CELLS)
