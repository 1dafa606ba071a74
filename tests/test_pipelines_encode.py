import hashlib

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from hedwig import storage
from hedwig.config import validate_experiment
from hedwig.models.catalogue import released
from hedwig.models.fetched import FetchedFile, model_folder, write_source
from hedwig.pipelines.encode import _count_truncated, _half_size_drift, embeddings, slicing_of
from hedwig.pipelines.run import Run
from hedwig.schema import captions_schema

ARGUMENTS = {"encoder_name": "viclip-tiny", "batch_size": 4}


@pytest.fixture
def run(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(3):
        coarse = rng.integers(0, 255, (16, 32, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((512, 256)).save(tmp_path / f"{i}.jpg", quality=92)
        rows.append(
            {"pano_id": f"p{i}", "projection": "equirectangular", "split": "train",
             "image_uri": str(tmp_path / f"{i}.jpg"), "caption": "gray ground", "caption_num_tokens": 2}
        )  # fmt: skip
    rows.append({**rows[0], "pano_id": "gone", "image_uri": str(tmp_path / "gone.jpg")})
    settings = {"output": str(tmp_path / "run"), "encoder": {"name": "viclip-tiny"}, "slicing": {"half_size": True}}
    run = Run(validate_experiment(settings))
    table = pa.Table.from_pylist(rows, schema=captions_schema())
    storage.write_table(storage.join(run.folder("caption"), "part-0.parquet"), table)
    return run


def test_half_size_decoding_reports_how_far_its_embeddings_drift(run):
    drift = _half_size_drift(run, run.experiment.encoder, ARGUMENTS)
    assert drift["num_panoramas"] == 3  # the image that is gone has no cosine
    assert 0.9 < drift["min_cosine"] <= drift["mean_cosine"] < 1.0  # near, and measurably not the same


@pytest.mark.parametrize(("name", "num_frames", "frame_px"), [("viclip-tiny", 4, 64), ("timm:test_vit", 10, 160)])
def test_frames_have_the_encoders_size_and_the_number_asked_for(run, name, num_frames, frame_px):
    settings = {"output": "x", "encoder": {"name": name}, "slicing": {"num_frames": num_frames}}
    other = Run(validate_experiment(settings))
    slicing = slicing_of(other, other.experiment.encoder)
    assert (slicing.frame_px, slicing.num_frames) == (frame_px, num_frames)


def test_captions_that_lost_their_end_are_counted_and_told(run, caplog):
    table = pa.table({"pano_id": list("abcd"), "caption_truncated": [True, False, None, True]})
    storage.write_table(storage.join(run.folder("embed"), "part-0.parquet"), table)
    with caplog.at_level("WARNING"):
        assert _count_truncated(run, "embed", run.experiment.encoder) == 2
    assert "2 of 4 captions are longer than what viclip-tiny reads" in caplog.text
    assert "long_captions=chunks" in caplog.text


def test_fetched_weights_that_were_changed_are_refused(run, tmp_path, monkeypatch):
    """Of the same size and recorded with the pinned digest, so that only its bytes tell."""
    monkeypatch.setenv("HEDWIG_CACHE", str(tmp_path))
    folder, pinned = model_folder("viclip-b16"), released("viclip-b16").sha256
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"others!")
    file = FetchedFile("model.safetensors", 7, pinned, "pinned")
    write_source(released("viclip-b16"), folder, [file], None, None)
    storage.publish(run.folder("caption"), kind="captions", config={}, inputs={}, num_in=4, num_out=4)
    settings = {"output": run.experiment.output, "encoder": {"name": "viclip-b16", "weights": "viclip-b16"}}
    found = hashlib.sha256(b"others!").hexdigest()
    with pytest.raises(ValueError, match=f"'viclip-b16' have sha256 {found}, but {pinned} is pinned"):
        embeddings(Run(validate_experiment(settings)))
