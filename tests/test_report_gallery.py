"""Examples: frames and a map beside the strip, places where they belong, gaps where something is unknown."""

from __future__ import annotations

import base64
import io
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hedwig.report import ReportContent
from hedwig.report.gallery import draw_example, example_maps, examples

RED, GREEN = (200, 30, 30), (30, 200, 30)


def example(**change: Any) -> dict[str, Any]:
    frames = np.stack([np.full((48, 48, 3), colour, dtype=np.uint8) for colour in (RED, GREEN, RED)])
    near = [{"pano_id": "n", "lat": 47.0, "lon": 9.0, "score": 0.5, "strip": None}]
    made = {"pano_id": "q<1>", "strip": np.zeros((32, 96, 3), dtype=np.uint8), "frames": frames, "error_km": 300.0,
            "truth": (48.0, 11.0), "prediction": (46.0, 8.0), "neighbours": near, "kind": "best"}  # fmt: skip
    return made | change


def page(*gallery: dict[str, Any], width_px: int = 960) -> str:
    content = ReportContent(title="t", gallery=list(gallery), queries={"error_km": np.array([100.0, 300.0, 900.0])})
    return examples(content, example_maps(content), width_px, 100)


def test_frames_stand_side_by_side_in_their_order() -> None:
    found = re.search(
        r'class="frames" alt="the 3 frames cut from q&lt;1&gt;" src="data:image/jpeg;base64,(.*?)"', page(example())
    )
    assert found is not None
    row = np.asarray(Image.open(io.BytesIO(base64.b64decode(found.group(1)))))
    assert row.shape == (48, 3 * 48 + 2 * 2, 3)
    for left, colour in ((0, RED), (50, GREEN), (100, RED)):
        np.testing.assert_allclose(row[24, left + 24], colour, atol=12)


def test_the_map_shows_truth_answer_and_neighbours_where_they_are() -> None:
    figure = draw_example(example(), [])
    assert figure is not None
    axes = figure.axes[0]
    near, answer, truth = (artist.get_offsets()[0] for artist in axes.collections[-3:])
    assert truth[0] > near[0] > answer[0], "11, 9 and 8 degrees east"
    assert truth[1] > near[1] > answer[1], "48, 47 and 46 degrees north"
    (way,) = axes.collections[1].get_segments()
    np.testing.assert_allclose(way[[0, -1]], [truth, answer], atol=1e-9)
    west, east = axes.get_xlim()
    assert west < answer[0] < truth[0] < east


def test_a_map_of_an_exact_answer_still_shows_its_surroundings() -> None:
    figure = draw_example(example(prediction=(48.0, 11.0), neighbours=[]), [])
    assert figure is not None
    assert np.ptp(figure.axes[0].get_ylim()) > 5


@pytest.mark.parametrize("change", [{"truth": None}, {"prediction": (np.nan, 1.0)}])
def test_without_both_places_there_is_no_map(change: dict[str, Any]) -> None:
    assert draw_example(example(**change), []) is None
    assert 'class="where"' not in page(example(**change))
    assert 'class="where"' in page(example())


def test_best_comes_first_with_its_rank_and_width_0_leaves_pictures_out() -> None:
    text = page(example(error_km=900.0, kind="worst"), example(error_km=100.0))
    assert text.index("Best: 100 km off") < text.index("Worst: 900 km off")
    assert "rank 1 of 3 queries" in text
    assert "rank 3 of 3 queries" in text
    assert "<img" not in page(example(), width_px=0).replace('alt="neighbour', "")
    assert 'class="frames"' not in page(example(frames=None))
