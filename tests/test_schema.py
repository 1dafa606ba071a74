import pyarrow as pa
import pytest

from hedwig import schema


def test_check_columns_names_what_is_missing_and_what_is_there():
    schema.check_columns(["a", "b"], ["b"], where="The table")
    with pytest.raises(
        schema.SchemaError, match=r"The table lacks the column\(s\) lat; it has lta, lon. Did you mean 'lta'"
    ):
        schema.check_columns(["lta", "lon"], ["lat", "lon"], where="The table")


def test_embeddings_schema_has_fixed_size_vectors():
    table = schema.embeddings_schema(512, 768)
    assert table.field("image_embedding").type == pa.binary(4 * 512)
    assert table.field("image_embedding").metadata == {b"dtype": b"float32", b"dim": b"512"}
    assert table.field("text_embedding").type == pa.binary(4 * 768)
    assert table.field("caption_truncated").type == "bool"
    assert "frame_embeddings" not in table.names
    assert schema.embeddings_schema(512, 768, 4).field("frame_embeddings").metadata[b"dim"] == b"2048"
    assert table.names[: len(schema.PANORAMAS.names)] == schema.PANORAMAS.names


def test_predictions_hold_no_truth():
    assert not {"country", "split", "true_lat", "error_km", "sequence"} & set(schema.PREDICTIONS.names)


def test_suggestion():
    assert schema.suggestion("epoch", ["epochs", "batch"]) == " Did you mean 'epochs'?"
    assert schema.suggestion("zzz", ["epochs"]) == ""
