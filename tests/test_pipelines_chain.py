import numpy as np
import pyarrow as pa
import pytest

from hedwig.pipelines.chain import Chain, Step, check_chain, columns_to_batch
from hedwig.schema import SchemaError, vector_field
from hedwig.vectors import read_lists, vector_array


class Double:
    reads = ("x",)
    writes = ("y",)

    def __call__(self, batch):
        if (batch["x"] < 0).any():
            raise ValueError(f"negative: {batch['x'][batch['x'] < 0][0]:g}")
        return {**batch, "y": batch["x"] * 2}


class Vector:
    """Fails rows above its limit by a reason, the way stages do."""

    reads = ("y",)
    writes = ("v",)

    def __init__(self, *, limit):
        self.limit, self.seen = limit, []

    def __call__(self, batch):
        self.seen.append(len(batch["y"]))
        failure = np.array([f"too large: {y:g}" if y > self.limit else None for y in batch["y"]], dtype=object)
        return {**batch, "v": np.stack([batch["y"], -batch["y"]], axis=1).astype(np.float32), "failure": failure}


SCHEMA = pa.schema([("pano_id", pa.string()), ("y", pa.float64()), vector_field("v", 2)])


def table(*values):
    return pa.table({"pano_id": [f"p{i}" for i in range(len(values))], "x": pa.array(values, pa.float64())})


def test_one_row_in_is_one_row_out_with_its_reason():
    chain = Chain([Step(Double), Step(Vector, {"limit": 5})], SCHEMA)
    out = chain(table(1, -7, 2, 9, -1))
    assert out["pano_id"].to_pylist() == ["p0", "p1", "p2", "p3", "p4"]
    assert out["failure"].to_pylist() == [
        None,
        "Double failed: ValueError: negative: -7",
        None,
        "too large: 18",
        "Double failed: ValueError: negative: -1",
    ]
    assert read_lists(out, "v").to_pylist() == [[2, -2], None, [4, -4], None, None]
    assert out["y"].to_pylist() == [2, None, 4, None, None]


def test_later_stages_never_see_failed_rows():
    chain = Chain([Step(Double), Step(Vector, {"limit": 99})], SCHEMA)
    chain(table(1, -7, 2))
    assert chain._stages[1].seen == [2]


def test_a_batch_without_survivors_still_has_all_its_rows():
    out = Chain([Step(Double), Step(Vector, {"limit": 9})], SCHEMA)(table(-1, -2))
    assert out.num_rows == 2
    assert out["v"].null_count == 2
    assert all("negative" in reason for reason in out["failure"].to_pylist())


class Locate:
    reads = ("x",)
    writes = ("lat",)

    def __call__(self, batch):
        return {**batch, "lat": np.full(len(batch["x"]), 42.0)}


def test_what_a_stage_writes_wins_over_the_input():
    """A prediction's lat is the answer; passing the input's lat through would be the truth leaking into it."""
    source = table(1, 2).append_column("lat", pa.array([10.0, 20.0]))
    out = Chain([Step(Locate)], pa.schema([("pano_id", pa.string()), ("lat", pa.float64())]))(source)
    assert out["lat"].to_pylist() == [42.0, 42.0]


def test_the_chain_is_checked_before_it_runs():
    check_chain(["pano_id", "x"], [Step(Double), Step(Vector)], SCHEMA.names)
    with pytest.raises(SchemaError, match=r"The input of Vector lacks the column\(s\) y; it has pano_id, x"):
        check_chain(["pano_id", "x"], [Step(Vector), Step(Double)], SCHEMA.names)
    with pytest.raises(SchemaError, match=r"The result of Double lacks the column\(s\) v"):
        check_chain(["pano_id", "x"], [Step(Double)], SCHEMA.names)


def test_columns_become_arrays_with_nan_and_none():
    field = vector_field("v", 2)
    source = (
        pa.table(
            {
                "f": pa.array([1.0, None, 3.0]),
                "s": pa.array(["a", None, "c"]),
                "l": pa.array([[1, 2], None, [3, 4]]),
            }
        )
        .append_column(field, vector_array(np.arange(6, dtype=np.float32).reshape(3, 2), field))
        .slice(1)
    )
    batch = columns_to_batch(source, ["f", "s", "l", "v"])
    assert np.isnan(batch["f"][0])
    assert batch["s"].tolist() == [None, "c"]
    assert batch["l"].shape == (2,)
    assert batch["v"].tolist() == [[2.0, 3.0], [4.0, 5.0]]  # the slice's rows, not the first ones
