import pyarrow as pa
import pytest

from hedwig.schema import SchemaError
from hedwig.sources.synthesised import SYNTHESISED, is_synthesised, keep_out_of_evaluation


def table():
    rows = [
        ("a", "synthesis:sd-base", "test"),
        ("b", "synthesis:sd-base+lora", "val"),
        ("c", "synthesis:sd-base", "train"),
        ("d", "synthesis:sd-base", "buffer"),
        ("e", "mapillary", "test"),
        ("f", None, "val"),
        ("g", "hedwig synthetic world", "test"),
        ("h", "photosynthesis: leaves", "val"),
    ]
    names = ("pano_id", "source", "split")
    return pa.table({name: [row[i] for row in rows] for i, name in enumerate(names)})


def test_made_rows_leave_the_scored_splits_and_no_other_row_moves():
    kept = keep_out_of_evaluation(table())
    assert kept["split"].to_pylist() == ["train", "train", "train", "buffer", "test", "val", "test", "val"]
    assert kept.schema == table().schema
    assert kept["pano_id"].to_pylist() == list("abcdefgh")
    scored = [s for s, split in zip(kept["source"].to_pylist(), kept["split"].to_pylist(), strict=True)
              if split in ("val", "test")]  # fmt: skip
    assert not any(is_synthesised(source) for source in scored)
    assert keep_out_of_evaluation(kept).equals(kept)
    assert keep_out_of_evaluation(table(), instead="buffer")["split"].to_pylist()[:3] == ["buffer", "buffer", "train"]
    assert keep_out_of_evaluation(table().slice(0, 0)).num_rows == 0


def test_the_mark_is_a_beginning():
    assert is_synthesised(f"{SYNTHESISED}anything")
    assert not is_synthesised("photosynthesis: leaves")
    assert not is_synthesised(None)


def test_made_rows_cannot_be_moved_into_a_scored_split():
    with pytest.raises(ValueError, match="instead is 'test'; choose one of train, buffer, query"):
        keep_out_of_evaluation(table(), instead="test")
    with pytest.raises(SchemaError, match="source"):
        keep_out_of_evaluation(table().drop_columns(["source"]))
