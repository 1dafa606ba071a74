"""LoRA as a Ray Train job: which rows it trains on, that it resumes to the same weights, and that the file works."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_diffusion import write_checkpoint

from hedwig import storage
from hedwig.diffusion import PanoramaGenerator
from hedwig.diffusion.lora import LORA_FILE
from hedwig.schema import captions_schema
from hedwig.training import diffusion as training
from hedwig.training.diffusion import train_lora


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny-sd")


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("captions")
    rng = np.random.default_rng(0)
    common = {"projection": "equirectangular", "split": "train", "source": "camera", "caption": "quiet sea"}
    rows = []
    for i in range(6):
        uri = str(folder / f"{i}.jpg")
        Image.fromarray(rng.integers(0, 255, (32, 64, 3), dtype=np.uint8)).save(uri)
        rows.append({**common, "pano_id": f"p{i}", "image_uri": uri})
    gone = {**common, "image_uri": "/nowhere.jpg"}
    rows += [
        {**gone, "pano_id": "held", "split": "test"},
        {**gone, "pano_id": "made", "source": "synthesis:tiny-sd"},
        {**gone, "pano_id": "flat", "projection": "perspective"},
        {**gone, "pano_id": "mute", "caption": "  "},
    ]
    storage.write_table(str(folder / "part-00000.parquet"), pa.Table.from_pylist(rows, schema=captions_schema()))
    return str(folder)


def train(captions: str, checkpoint: Path, tmp_path: Path, **changes):
    options = {
        "epochs": 2, "batch_size": 3, "learning_rate": 1e-2, "rank": 2, "height_px": 64, "num_workers": 0,
        "caption_dropout": 0.3,
    }  # fmt: skip
    return train_lora(
        panoramas=captions,
        model=str(checkpoint),
        output=str(tmp_path / "out"),
        scratch=str(tmp_path / "scratch"),
        run_name="run",
        **{**options, **changes},
    )


def test_it_trains_on_cameras_training_rows_and_the_file_changes_the_pictures(captions, checkpoint, tmp_path):
    result = train(captions, checkpoint, tmp_path)
    assert (result["num_train"], result["steps"], result["epoch"]) == (6, 2, 1)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert all(np.isfinite(line["train_loss"]) for line in lines)
    weights = load_file(tmp_path / "out" / LORA_FILE)
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert max(float(v.abs().max()) for k, v in weights.items() if "lora_B" in k or ".up." in k) > 1e-3
    again = train(captions, checkpoint, tmp_path / "again")
    assert again["train_loss"] == result["train_loss"]
    options = {"model": str(checkpoint), "num_steps": 2, "height_px": 64, "device": "cpu", "image_format": "png"}
    batch = {"pano_id": np.array(["a"], dtype=object), "caption": np.array(["red sea"], dtype=object)}
    plain = PanoramaGenerator(**options)(batch)["image_bytes"][0]
    assert PanoramaGenerator(lora=str(tmp_path / "out"), **options)(batch)["image_bytes"][0] != plain


@pytest.mark.slow  # Ray's workers import diffusers twice: 100 s on two busy cores
def test_a_run_that_died_goes_on_to_the_same_weights(captions, checkpoint, tmp_path, ray_session, monkeypatch):
    train(captions, checkpoint, tmp_path / "a", epochs=3)
    flag = tmp_path / "died"
    original = training._worker

    def worker(settings: dict) -> None:
        from hedwig.training.diffusion import _Fit

        whole = _Fit.epoch

        def epoch(self, number, rank, world):
            if number == 2 and not flag.exists():
                flag.touch()
                os._exit(1)
            return whole(self, number, rank, world)

        _Fit.epoch = epoch
        original(settings)

    monkeypatch.setattr(training, "_worker", worker)
    result = train(captions, checkpoint, tmp_path / "b", epochs=3, num_workers=1)
    assert flag.exists()
    assert result["epoch"] == 2
    wanted, got = (load_file(tmp_path / name / "out" / LORA_FILE) for name in "ab")
    assert wanted.keys() == got.keys()
    for key, value in wanted.items():
        assert torch.allclose(got[key], value, atol=1e-4), key


def test_bad_rows_and_settings_are_named(captions, checkpoint, tmp_path):
    for changes, message in (
        ({"rank": 0}, "rank is out of range: 0"),
        ({"height_px": 100}, "height_px is out of range: 100"),
        ({"caption_dropout": 1.5}, "caption_dropout is out of range: 1.5"),
        ({"num_workers": 40}, "6 training rows"),
    ):
        with pytest.raises(ValueError, match=message):
            train(captions, checkpoint, tmp_path, **changes)
    table = storage.read_table(captions)
    held = table.set_column(table.column_names.index("split"), "split", pa.array(["test"] * table.num_rows))
    storage.write_table(str(tmp_path / "held" / "part-0.parquet"), held)
    with pytest.raises(ValueError, match="None of the 10 rows"):
        train(str(tmp_path / "held"), checkpoint, tmp_path)
    uris = pa.array(["/nowhere.jpg"] * table.num_rows)
    gone = table.set_column(table.column_names.index("image_uri"), "image_uri", uris)
    storage.write_table(str(tmp_path / "gone" / "part-0.parquet"), gone)
    with pytest.raises(Exception, match=r"The image of 'p\d' cannot be trained on"):
        train(str(tmp_path / "gone"), checkpoint, tmp_path)
