"""What an answer lists besides the place: posterior, entropy, centroids; and the search on its own."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from test_retrieve_retriever import NUM_CELLS, World, softmax

from hedwig.panorama import FrameWindow
from hedwig.retrieve import Prediction
from hedwig.retrieve.answer import neighbours_of, predictions_of
from hedwig.retrieve.query import Query


def test_posterior_entropy_and_centroids_are_those_of_the_softmax() -> None:
    world = World()
    retriever = world.retriever(num_cells=4)
    found = retriever.evidence(world.queries, world.logits, top_k=3)
    told = predictions_of(retriever, found, world.names, top_k=3, posterior_above=0.05)
    for logits, prediction in zip(world.logits, told, strict=True):
        p = softmax(logits)
        assert prediction.entropy_bits == pytest.approx(-(p * np.log2(p)).sum())
        assert prediction.posterior is not None
        expected = [cell for cell in np.argsort(-p, kind="stable").tolist() if p[cell] >= 0.05]
        assert list(prediction.posterior.cell_ids) == expected
        np.testing.assert_allclose(prediction.posterior.probs, p[expected])
        assert list(prediction.cell_lat) == world.cell_lat[list(prediction.cell_ids)].tolist()
        assert list(prediction.cell_lon) == world.cell_lon[list(prediction.cell_ids)].tolist()
    everything = predictions_of(retriever, found, world.names, posterior_above=0.0)[0].posterior
    assert everything is not None
    assert len(everything.cell_ids) == NUM_CELLS
    assert predictions_of(retriever, found, world.names)[0].posterior is None


@pytest.mark.parametrize("knobs", [{}, {"log_prob_weight": 0.3}, {"cell_mass": 0.5, "score_temperature": 0.5}])
def test_the_search_alone_finds_what_an_answer_lists(knobs: dict[str, float]) -> None:
    world = World()
    retriever = world.retriever(num_cells=4, num_neighbours=7, **knobs)
    told = neighbours_of(retriever, *retriever.neighbours(world.queries, world.logits, 7))
    for b, prediction in enumerate(retriever.retrieve(world.queries, world.logits, world.names)):
        assert told["neighbour_ids"][b] == list(prediction.neighbour_ids)
        assert told["neighbour_scores"][b] == list(prediction.neighbour_scores)
        assert told["neighbour_lat"][b] == list(prediction.neighbour_lat)
        assert [cell for cell in told["cell_ids"][b] if cell >= 0] == list(prediction.cell_ids)


def test_the_search_keeps_to_given_cells() -> None:
    world = World()
    retriever = world.retriever(num_neighbours=5, log_prob_weight=0.2)
    cells = np.tile([3, -1, 5], (25, 1))  # 5 is empty
    searched, rows, scores = retriever.neighbours(world.queries, world.logits, 30, cells=cells)
    np.testing.assert_array_equal(searched, cells)
    assert ((rows >= 0).sum(axis=1) == 20).all()
    assert set(world.index.cell_ids[rows[rows >= 0]].tolist()) == {3}
    told = neighbours_of(retriever, searched, rows, scores)
    assert {len(ids) for ids in told["neighbour_ids"]} == {20}
    names = {name: row for row, name in enumerate(world.ids)}
    cosine = world.vectors[[names[name] for name in told["neighbour_ids"][0]]] @ world.queries[0]
    expected = cosine + 0.2 * np.log(softmax(world.logits[0])[3])
    np.testing.assert_allclose(told["neighbour_scores"][0], expected, rtol=1e-5)
    for bad in ([[3, 3]], [[NUM_CELLS]], [[-2]], [3]):
        with pytest.raises(ValueError, match="ell"):
            retriever.neighbours(world.queries[:1], world.logits[:1], 5, cells=bad)


def test_a_prediction_survives_json() -> None:
    world = World()
    retriever = world.retriever(num_cells=4)
    found = retriever.evidence(world.queries, world.logits)
    all_plain = predictions_of(retriever, found, world.names, posterior_above=0.01)
    assert [one.cell_id for one in all_plain] == found.cell.tolist()
    assert any(one.cell_id != one.cell_ids[0] for one in all_plain)
    plain = all_plain[0]
    windows = (FrameWindow(0.0, 0.25, 45.0, 90.0), FrameWindow(0.9, 1.15))
    query = Query("q0", np.zeros((2, 4, 4, 3), np.uint8), "equirectangular", 0.0, None, windows)
    explained = query.seen(plain, np.log([0.2, 0.6]))
    assert [frame.weight for frame in explained.frames] == pytest.approx([0.25, 0.75])
    assert [frame.probability for frame in explained.frames] == pytest.approx([0.2, 0.6])
    assert query.seen(plain).frames[1].weight is None
    sent = json.loads(json.dumps({**explained.to_dict(), "timings_ms": {}}))
    assert Prediction.from_dict(sent) == explained
    assert Prediction.from_dict(replace(plain, posterior=None).to_dict()) == replace(plain, posterior=None)


def test_weights_of_frames_that_all_say_no_still_add_up() -> None:
    windows = (FrameWindow(0.0, 0.5), FrameWindow(0.5, 1.0))
    query = Query("q", np.zeros((2, 4, 4, 3), np.uint8), "perspective", np.nan, None, windows)
    world = World()
    plain = world.retrieve(num_cells=2)[0]
    weights = [frame.weight for frame in query.seen(plain, np.array([-900.0, -901.0])).frames]
    assert weights == pytest.approx([np.e / (1 + np.e), 1 / (1 + np.e)])
