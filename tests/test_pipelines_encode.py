import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from hedwig import storage
from hedwig.config import validate_experiment
from hedwig.pipelines.encode import _half_size_drift, slicing_of
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


def test_frames_have_the_encoders_size_and_number(run):
    assert slicing_of(run, run.experiment.encoder).frame_px == 64
    settings = {"output": "x", "encoder": {"name": "viclip-tiny"}, "slicing": {"num_frames": 4}}
    with pytest.raises(ValueError, match=r"slicing.num_frames is 4, and viclip-tiny takes 8"):
        slicing_of(Run(validate_experiment(settings)), validate_experiment(settings).encoder)
