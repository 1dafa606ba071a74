"""Made panoramas follow the row that they were made from: none of a held-out place is trained on."""

from __future__ import annotations

import pyarrow as pa
import pytest

from hedwig.pipelines.listing import _with_splits
from hedwig.schema import PANORAMAS

SPLIT = {"val_fraction": 0.2, "test_fraction": 0.3, "seed": 0, "block_km": 50.0, "buffer_km": 0.0}


def table(made_split="train"):
    """200 photographs, one made row of each, one without an origin and one whose origin is not there."""
    common = {"projection": "equirectangular", "image_uri": "x.jpg", "split": "train"}
    rows = [
        {**common, "pano_id": f"p{i}", "lat": (i // 20) * 1.0, "lon": (i % 20) * 1.0, "source": "camera",
         "split": ("train", "val", "test", "buffer")[i % 4]}
        for i in range(200)
    ]  # fmt: skip
    made = [
        {**row, "pano_id": f"{row['pano_id']}-s0-0", "source": "synthesis:m", "made_from": row["pano_id"],
         "split": made_split}
        for row in rows
    ]  # fmt: skip
    lost = [
        {**made[0], "pano_id": "lost", "made_from": None, "lat": 5.0},
        {**made[0], "pano_id": "elsewhere", "made_from": "not here", "lat": 5.0},
    ]
    query = {**made[0], "pano_id": "query", "made_from": None, "lat": None, "lon": None, "split": "query"}
    return pa.Table.from_pylist([*rows, *made, *lost, query], schema=PANORAMAS)


@pytest.mark.parametrize("method", ["random", "spatial", "column"])
def test_made_rows_of_held_out_origins_are_not_trained_on(method):
    found = _with_splits(table(), {**SPLIT, "method": method})
    side = dict(zip(found["pano_id"].to_pylist(), found["split"].to_pylist(), strict=True))
    origins = {side[f"p{i}"] for i in range(200)}
    assert {"train", "val", "test"} <= origins
    for i in range(200):
        assert side[f"p{i}-s0-0"] == ("train" if side[f"p{i}"] == "train" else "buffer"), (method, i)
    assert side["lost"] == side["elsewhere"] == ("train" if method == "column" else "buffer")
    assert side["query"] == "query"


def test_a_made_row_that_is_not_in_training_stays_out():
    found = _with_splits(table(made_split="test"), {**SPLIT, "method": "column"})
    made = [s for p, s in zip(found["pano_id"].to_pylist(), found["split"].to_pylist(), strict=True) if "-s0-" in p]
    assert set(made) == {"buffer"}
