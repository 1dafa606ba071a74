"""Every fusion, other towers and other numbers of frames through the stages of a run, and asked again by its pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from hedwig import storage
from hedwig.config import validate_experiment
from hedwig.models.encoder import load_encoder, save_encoder
from hedwig.models.geolocator import Geolocator
from hedwig.pipelines import rows, stages
from hedwig.pipelines.chain import Chain
from hedwig.pipelines.report import report
from hedwig.pipelines.run import Run
from hedwig.pipelines.staged import Staged, part_files
from hedwig.retrieve import Hedwig, load_retriever
from hedwig.vectors import read_vectors, vector_form

NUM = 30
STAGES = ("panoramas", "caption", "embed", "geocells", "train", "index", "predict")


@pytest.fixture(scope="module")
def listing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("listing")
    rng = np.random.default_rng(0)
    table = []
    for i in range(NUM):
        coarse = rng.integers(0, 256, (4, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((256, 128), Image.Resampling.BICUBIC).save(folder / f"{i:02d}.png")
        split = "val" if i % 5 == 0 else "test" if i % 5 == 1 else "train"
        table.append((f"p{i:02d}", 5.0 * (i % 6) + 1, 7.0 * (i % 5), f"{i:02d}.png", split))
    columns = ["pano_id", "lat", "lon", "image_uri", "split"]
    pd.DataFrame(table, columns=columns).to_csv(folder / "listing.csv", index=False)
    return folder / "listing.csv"


def stay_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the stages run in this process, without Ray."""

    def in_process(task: rows.RowsTask, ids: set[str], done: set[str], staged: Staged, progress: Any) -> dict[str, Any]:
        assert not done
        for i, path in enumerate(part_files(task.source)):
            table = pq.read_table(path)
            table = table if task.keep is None else rows._Keep(tuple(task.keep))(table)
            chained = Chain(task.steps, task.schema)(table)
            # As Ray names it: no two writes share a name, and names are in no order.
            name = f"{uuid4().hex[:22]}_{uuid4().hex}_{i:06}-0.parquet"
            storage.write_table(storage.join(staged.staging, name), chained)
        return {}

    train = stages.train_geolocator
    monkeypatch.setattr(rows, "_measured_run", in_process)
    monkeypatch.setattr(stages, "train_geolocator", lambda **o: train(**{**o, "num_workers": 0}))


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    stay_here(monkeypatch)


def make(tmp_path: Path, listing: Path, encoder: dict[str, Any], num_frames: int, **sections: Any) -> Run:
    settings = {
        "output": str(tmp_path / "run"),
        "data": {"panoramas": str(listing), "split": {"method": "column"}, "max_rejected": 0},
        "slicing": {"num_frames": num_frames},
        "encoder": {"device": "cpu", **encoder},
        "embed": {"batch_size": 8, "num_threads": 1},
        "geocells": {"method": "kmeans", "num_cells": 3, "min_panoramas": 1, "max_panoramas": 100},
        "training": {"projection_dim": 16, "hidden_dim": 0, "epochs": 3, "learning_rate": 0.01},
        "retrieve": {"num_cells": 3, "num_neighbours": 4, "log_prob_weight": 0.1},
        "evaluate": {"num_bootstrap": 10},
        **sections,
    }
    return Run(validate_experiment(settings))


def finish(run: Run, names: tuple[str, ...] = STAGES) -> Path:
    for name in names:
        stages.STAGES[name](run)
    return Path(run.experiment.output)


def check_answers(output: Path, listing: Path) -> pd.DataFrame:
    """What `hedwig predict` says of the held-out images is what stands in the table that is evaluated."""
    predicted = storage.read_table(str(output / "predictions")).to_pandas().set_index("pano_id")
    assert len(predicted) == 12
    hedwig = Hedwig.load(str(output))
    ids = sorted(predicted.index)
    images = [listing.parent / f"{name[1:]}.png" for name in ids]
    for name, answer in zip(ids, hedwig.locate_many(images, top_k=4), strict=True):
        row = predicted.loc[name]
        assert (answer.lat, answer.lon) == (row["lat"], row["lon"])
        np.testing.assert_allclose(answer.neighbour_scores, row["neighbour_scores"], atol=2e-4)
        assert answer.neighbour_ids[0] == row["neighbour_ids"][0]
        assert len({*answer.neighbour_ids, *row["neighbour_ids"]}) <= 5  # a tie may end otherwise in another batch
        assert answer.radius_km == pytest.approx(row["radius_km"], rel=1e-3)
    return predicted


CASES = {
    "viclip-1": ({"name": "viclip-tiny"}, 1, {}),
    "viclip-4-interpolated": ({"name": "viclip-tiny", "temporal": "interpolate"}, 4, {}),
    "viclip-10": ({"name": "viclip-tiny", "long_captions": "chunks"}, 10, {}),
    "mean-4": ({"name": "viclip-tiny", "fusion": "mean"}, 4, {}),
    "max_sim-4": ({"name": "viclip-tiny", "fusion": "max_sim"}, 4, {"index": {"embedding": "image"}}),
    "max_sim-1": ({"name": "clip-tiny", "fusion": "max_sim"}, 1, {"index": {"embedding": "image"}}),
    "attention-10": ({"name": "clip-tiny", "fusion": "attention"}, 10, {}),
    "attention-4-image": ({"name": "viclip-tiny", "fusion": "attention"}, 4, {"index": {"embedding": "image"}}),
    "timm-2": ({"name": "timm:test_vit"}, 2, {"training": {"use_text": False, "projection_dim": 8, "epochs": 2}}),
}


@pytest.mark.parametrize("case", CASES)
def test_each_fusion_is_asked_as_it_was_built(case: str, tmp_path: Path, listing: Path, without_ray: None) -> None:
    encoder, num_frames, sections = CASES[case]
    run = make(tmp_path, listing, encoder, num_frames, **sections)
    output = finish(run)
    check_answers(output, listing)
    again = Run(run.experiment)
    finish(again)
    assert again.resumed == list(STAGES)  # the same settings ask for nothing new
    manifest = storage.read_manifest(str(output / "embeddings"))
    assert manifest is not None
    assert manifest.details["num_captions_truncated"] == 0
    assert manifest.config["encoder"]["fusion"] == run.experiment.encoder.fusion
    columns = pq.read_schema(next((output / "embeddings").glob("part-*.parquet")))
    kept = run.experiment.encoder.fusion in ("max_sim", "attention")
    assert ("frame_embeddings" in columns.names) == kept
    if kept:
        _, dim = vector_form(columns, "image_embedding")
        assert vector_form(columns, "frame_embeddings")[1] == num_frames * dim
    retriever = load_retriever(str(output))
    assert retriever.index.num_frames == (num_frames if run.experiment.encoder.fusion == "max_sim" else 1)
    config = Geolocator.load(output / "geolocator").config
    assert config.num_frames == (num_frames if run.experiment.encoder.fusion == "attention" else 0)
    if case == "max_sim-4":
        report(run)  # a page of one fusion is as good as of another
        assert (output / "report" / "report.html").is_file()


def test_a_corrected_normalisation_embeds_again(tmp_path: Path, listing: Path, without_ray: None) -> None:
    """The weights are the same; what is beside them says how they are used."""
    folder = tmp_path / "model"
    encoder = load_encoder("clip-tiny", device="cpu")
    save_encoder(encoder.module, "clip-tiny", folder, note="")
    (folder / "model.json").unlink()
    card = folder / "open_clip_config.json"
    card.write_text(json.dumps({"preprocess_cfg": {"mean": [0.5, 0.5, 0.5]}}))
    # Nothing but the setting tells the activation, so that a query cannot do without it either.
    settings = {"name": "open_clip:tiny", "weights": str(folder), "quick_gelu": True, "long_captions": "truncate"}
    run = make(tmp_path, listing, settings, 2)
    output = finish(run)
    check_answers(output, listing)
    before = storage.read_manifest(str(output / "embeddings"))
    card.unlink()  # which means CLIP's own mean
    with pytest.raises(ValueError, match=r"was made by open_clip:tiny@\w+, but the weights there now are"):
        Hedwig.load(str(output))
    corrected = Run(run.experiment)
    finish(corrected, STAGES[:3])
    assert corrected.resumed == ["panoramas", "caption"]
    after = storage.read_manifest(str(output / "embeddings"))
    assert before is not None
    assert after is not None
    made_by = encoder.model_id.replace("clip-tiny", "open_clip:tiny")
    assert after.details["model_id"] == made_by != before.details["model_id"]
    assert after.inputs["weights"] == before.inputs["weights"]
    again = Run(run.experiment)
    finish(again, STAGES[:3])
    assert again.resumed == list(STAGES[:3])


def test_the_pool_learns_which_frames_matter(tmp_path: Path, listing: Path, without_ray: None) -> None:
    run = make(tmp_path, listing, {"name": "clip-tiny", "fusion": "attention"}, 4, index={"embedding": "projected"})
    output = finish(run)
    query = Geolocator.load(output / "geolocator").query
    assert query is not None
    assert query.detach().abs().max() > 0  # it started at zero, which is the mean
    # The index holds what the head makes of the frames, not of their mean.
    table = storage.read_table(str(output / "embeddings"))
    index = load_retriever(str(output)).index
    order = np.searchsorted(table["pano_id"].to_numpy(), np.array(index.pano_ids, dtype=object))  # it is sorted by id
    frames = torch.tensor(read_vectors(table, "frame_embeddings")[order].reshape(len(index), 4, -1))
    text = torch.tensor(read_vectors(table, "text_embedding")[order])
    with torch.inference_mode():
        projected = Geolocator.load(output / "geolocator")(frames, text)[0].numpy()
    np.testing.assert_allclose(index.vectors(), projected, atol=2e-3)


def test_a_table_made_before_these_options_is_asked_with_their_defaults(
    tmp_path: Path, listing: Path, without_ray: None
) -> None:
    """An old manifest names no fusion, and its table has no caption_truncated: the answers are those of today."""
    run = make(tmp_path, listing, {"name": "viclip-tiny", "long_captions": "truncate"}, 8)
    output = finish(run)
    before = storage.read_manifest(str(output / "embeddings"))
    assert before is not None
    for option in ("fusion", "temporal", "long_captions"):
        del before.config["encoder"][option]
    del before.details["num_captions_truncated"]
    for path in (output / "embeddings").glob("part-*.parquet"):
        pq.write_table(pq.read_table(path).drop_columns(["caption_truncated"]), path)
    (output / "embeddings" / "manifest.json").unlink()
    record = {
        name: getattr(before, name) for name in ("kind", "config", "inputs", "num_in", "num_out", "details", "seconds")
    }
    storage.publish(str(output / "embeddings"), **record)
    finish(run, STAGES[3:])
    check_answers(output, listing)


@pytest.mark.slow
@pytest.mark.parametrize("fusion", ["max_sim", "attention"])
def test_on_ray(fusion: str, tmp_path: Path, listing: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embedding and training, where frames travel through Ray; the other stages see what they always see."""
    embedding = "image" if fusion == "max_sim" else "projected"
    run = make(tmp_path, listing, {"name": "clip-tiny", "fusion": fusion}, 4, index={"embedding": embedding})
    with monkeypatch.context() as patched:
        stay_here(patched)
        finish(run, STAGES[:2])
    finish(run, STAGES[2:5])
    with monkeypatch.context() as patched:
        stay_here(patched)
        finish(run, STAGES[5:])
    check_answers(Path(run.experiment.output), listing)
