"""Fine-tuning starts from what is given, learns where colours are, goes on after a kill, and says what it did."""

from __future__ import annotations

import inspect
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from test_pipelines_fusions import check_answers, finish, listing, make, stay_here
from test_training_encoder import toy_rows

from hedwig import config, storage
from hedwig.config import ConfigError, validate_experiment
from hedwig.models.encoder import load_encoder, save_encoder
from hedwig.pipelines import plan, stages
from hedwig.pipelines.report import report
from hedwig.pipelines.run import Run
from hedwig.retrieve import Hedwig
from hedwig.training import encoder_fit, finetune, finetune_encoder, read_frames, write_frames
from hedwig.training.objective import Objective

__all__ = ["listing"]  # a fixture


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("frames"))
    write_frames(folder, "part-0", toy_rows(150))
    return folder


def tune(cache: str, tmp_path: Path, **options) -> dict:
    defaults = {
        "encoder": "viclip-tiny",
        "blocks": 1,
        "epochs": 2,
        "batch_size": 20,
        "num_cells": 8,
        "tau_km": 1500.0,
        "num_workers": 0,
        "roll_probability": 0.0,
    }
    return finetune_encoder(
        frames=cache,
        output=str(tmp_path / "out"),
        scratch=str(tmp_path / "scratch"),
        run_name="run",
        **{**defaults, **options},
    )


def history(tmp_path: Path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]


def test_mapped_frames_are_those_in_memory(cache):
    ids = [f"p{i:04d}" for i in range(0, 150, 7)]
    held, mapped = (read_frames(cache, ids, mapped=flag) for flag in (False, True))
    assert isinstance(mapped["frames"], np.memmap)
    np.testing.assert_array_equal(mapped["frames"], held["frames"])
    assert len(read_frames(cache, [], mapped=True)["frames"]) == 0


@pytest.mark.parametrize(
    ("name", "options"),
    [("viclip-tiny", {"blocks": 1}), ("clip-tiny", {"blocks": None, "lora_rank": 4, "lora_alpha": 8.0})],
)
def test_the_loss_falls_from_given_weights_and_the_rest_stays(cache, tmp_path, name, options):
    given = load_encoder(name, seed=5, device="cpu")
    save_encoder(given.module, name, tmp_path / "base", "given")
    options = {**options, "weights": str(tmp_path / "base"), "learning_rate": 1e-3, "epochs": 4, "text_weight": 0.1}
    metrics = tune(cache, tmp_path, encoder=name, **options)
    rows = history(tmp_path)
    assert rows[-1]["train_loss"] < 0.93 * rows[0]["train_loss"]
    assert metrics["val_loss"] == min(row["val_loss"] for row in rows)
    assert metrics["val_loss"] < 0.97 * rows[0]["val_loss"]
    assert rows[-1]["text_loss"] < rows[0]["text_loss"]
    tuned = load_encoder(name, weights=str(tmp_path / "out"), device="cpu")
    what = "last 1 block(s)" if options["blocks"] else "LoRA of rank 4"
    assert tuned.weights_note.startswith(f"fine-tuned ({what}, {metrics['epoch'] + 1} epochs on 120 panoramas) from ")
    assert tuned.weights_note.endswith(f"{given.model_id}, given")
    assert tuned.model_id.endswith("+finetuned")
    before, after = given.module.state_dict(), tuned.module.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    if options["blocks"]:
        assert all("resblocks.3." in key or "ln_post" in key or key == "vision_encoder.proj" for key in moved)
        assert len(moved) >= 14
    else:
        assert all(key.endswith(("in_proj_weight", "out_proj.weight", "c_fc.weight", "c_proj.weight")) for key in moved)
        assert len(moved) == 16
    assert not any("text" in key for key in moved)
    np.testing.assert_array_equal(tuned.encode_text(["a street"]), given.encode_text(["a street"]))


def test_with_rate_nothing_the_result_is_the_base(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    metrics = tune(cache, tmp_path, blocks=None, lora_rank=2, epochs=1)
    base = load_encoder("viclip-tiny", device="cpu")
    tuned = load_encoder("viclip-tiny", weights=str(tmp_path / "out"), device="cpu")
    assert tuned.weights_digest == base.weights_digest
    assert metrics["base"] == base.model_id
    assert metrics["num_learning"] == 4 * 2 * (128 * 4 + 128 * 2 + 128 * 5 + 128 * 5)


def test_open_clip_is_saved_so_that_it_loads_without_a_hint(cache, tmp_path, monkeypatch):
    """Its activation and normalisation go with it."""
    import open_clip

    small = {
        "embed_dim": 32,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 64, "patch_size": 32, "width": 64, "layers": 2, "head_width": 32},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    real = open_clip.get_model_config
    monkeypatch.setattr(open_clip, "get_model_config", lambda n: dict(small) if n == "small" else real(n))
    known = open_clip.list_models
    monkeypatch.setattr(open_clip, "list_models", lambda: [*known(), "small"])
    options = {"encoder": "open_clip:small", "learning_rate": 1e-3, "epochs": 1, "blocks": 2}
    tune(cache, tmp_path, **options)
    card = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())
    assert card["model_cfg"]["quick_gelu"] is True
    assert len(card["preprocess_cfg"]["mean"]) == 3
    tuned = load_encoder("open_clip:small", weights=str(tmp_path / "out"), device="cpu")
    assert tuned.model_id.endswith("+finetuned")
    with pytest.raises(ValueError, match="blocks must be 1 to 2, the depth of open_clip:small; got 3"):
        tune(cache, tmp_path, **{**options, "blocks": 3})


def test_bfloat16_is_in_the_encoder_only():
    encoder = load_encoder("viclip-tiny", device="cpu")
    frames = torch.randint(0, 256, (2, 8, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    outs = []
    for half in (False, True):
        torch.manual_seed(0)
        objective = Objective(encoder.module, 128, 5, with_text=False, half=half)
        logits, video, _, _ = objective(frames, None)
        assert (logits.dtype, video.dtype) == (torch.float32, torch.float32)
        logits.sum().backward()
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in objective.parameters())
        outs.append(video.detach())
    assert 1e-5 < (outs[0] - outs[1]).abs().max() < 0.02


def test_captions_that_are_not_there_teach_nothing(cache, tmp_path, monkeypatch):
    seen = []
    original = encoder_fit.video_text_loss
    monkeypatch.setattr(encoder_fit, "video_text_loss", lambda v, t, s: (seen.append(len(t)), original(v, t, s))[1])
    tune(cache, tmp_path, epochs=1, text_weight=0.1)
    rows = read_frames(cache)
    there = sum(c is not None for c, s in zip(rows["caption"], rows["split"], strict=True) if s == "train")
    assert sum(seen) == there < 120
    rows["caption"][:] = None
    write_frames(str(tmp_path / "mute"), "a", rows)
    tune(str(tmp_path / "mute"), tmp_path / "b", epochs=1, text_weight=0.1)
    assert history(tmp_path / "b")[0]["text_loss"] == 0


@pytest.mark.slow  # the head and the encoder from scratch show the same in every run
def test_two_workers_of_which_one_is_killed_end_where_one_process_does(cache, tmp_path, ray_session, monkeypatch):
    options = {"batch_size": 120, "epochs": 3, "brightness": 0.0, "learning_rate": 3e-3, "gradient_checkpointing": True}
    options |= {"blocks": None, "lora_rank": 2}
    alone = tune(cache, tmp_path / "alone", **options)
    flag, original = str(tmp_path / "died"), finetune._worker

    def worker(settings: dict) -> None:
        import ray.train

        from hedwig.training.encoder_fit import EncoderFit

        whole = EncoderFit.epoch

        def epoch(self, number, rank, world):
            if number == 1 and ray.train.get_context().get_world_rank() == 1 and not os.path.exists(flag):
                Path(flag).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            # Two factors of each of four matrices in four blocks, and the head's three: nothing else is optimised.
            assert len(self.learning) == 4 * 4 * 2 + 3
            assert sum(len(group["params"]) for group in self.optimizer.param_groups) == 35
            return whole(self, number, rank, world)

        EncoderFit.epoch = epoch
        original(settings)

    monkeypatch.setattr(finetune, "_worker", worker)
    both = tune(cache, tmp_path / "both", num_workers=2, **options)
    assert os.path.exists(flag)
    for row, other in zip(history(tmp_path / "both"), history(tmp_path / "alone"), strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-3)
        assert row["val_loss"] == pytest.approx(other["val_loss"], rel=1e-3)
    assert both["num_learning"] == alone["num_learning"]


def test_bad_settings_name_the_value(cache, tmp_path):
    for options, message in (
        ({"lora_rank": 4}, "either blocks or lora_rank; got blocks=1 and lora_rank=4"),
        ({"blocks": None}, "got blocks=None and lora_rank=None"),
        ({"blocks": 5}, "encoder.finetune.blocks must be 1 to 4, the depth of viclip-tiny; got 5"),
        ({"blocks": None, "lora_rank": 0}, "lora_rank must be at least 1, got 0"),
        ({"lora_alpha": 1.0}, "lora_alpha is out of range: 1.0"),
        ({"learning_rate": 0.0}, "learning_rate is out of range: 0.0"),
        ({"encoder": "timm:test_vit"}, "timm:test_vit cannot be fine-tuned here"),
        ({"num_workers": 500}, "120 training rows"),
    ):
        with pytest.raises(ValueError, match=message):
            tune(cache, tmp_path, **options)
    with pytest.raises(FileNotFoundError, match="run the stage that writes it"):
        tune(str(tmp_path / "nowhere"), tmp_path)
    with pytest.raises(FileNotFoundError, match="No weights at"):
        tune(cache, tmp_path, weights=str(tmp_path / "gone.pth"))
    with pytest.raises(ValueError, match="not finite in epoch 1; lower learning_rate"):
        tune(cache, tmp_path, learning_rate=1e30, head_learning_rate=1e30)


def experiment(tmp_path: Path, **sections):
    settings = {"output": str(tmp_path / "run"), "data": {"panoramas": "x.csv"}, **sections}
    return validate_experiment(settings)


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ({"train": {}, "finetune": {"blocks": 1}}, "encoder.train makes weights from scratch and encoder.finetune"),
        ({"finetune": {}}, "needs either blocks or lora_rank, and not both"),
        ({"finetune": {"blocks": 1, "lora_rank": 2}}, "needs either blocks or lora_rank, and not both"),
        ({"finetune": {"blocks": 1, "lora_alpha": 2.0}}, "lora_alpha needs lora_rank"),
        ({"finetune": {"block": 1}}, "Unknown key 'encoder.finetune.block'. Did you mean 'blocks'"),
    ],
)
def test_settings_that_contradict_each_other_are_no_experiment(tmp_path, encoder, message):
    with pytest.raises(ConfigError, match=message):
        experiment(tmp_path, encoder={"name": "viclip-tiny", **encoder})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"encoder": {"finetune": {"blocks": 9}}}, "blocks must be 1 to 4, the depth of viclip-tiny; got 9"),
        ({"encoder": {"name": "open_clip:RN50", "finetune": {"blocks": 1}}}, "open_clip:RN50 cannot be fine-tuned"),
        (
            {"encoder": {"finetune": {"blocks": 1, "text_weight": 0.5}}, "captions": {"source": "none"}},
            "text_weight is 0.5, and captions.source is 'none'; set it to 0",
        ),
        ({"evaluate": {"baseline": {"name": "clip-tiny", "finetune": {"blocks": 1}}}}, "baseline.finetune do nothing"),
    ],
)
def test_what_cannot_work_is_refused_when_it_is_planned(tmp_path, sections, message):
    encoder = {"name": "viclip-tiny", **sections.pop("encoder", {})}
    with pytest.raises(ValueError, match=message):
        plan(experiment(tmp_path, encoder=encoder, **sections))


def test_weights_to_start_from_must_be_there(tmp_path, caplog):
    tuned = {"name": "viclip-tiny", "finetune": {"blocks": 1}}
    with pytest.raises(FileNotFoundError, match="gone"):
        plan(experiment(tmp_path, encoder={**tuned, "weights": str(tmp_path / "gone")}))
    assert {"frames", "encoder"} <= set(plan(experiment(tmp_path, encoder=tuned)))
    assert "starts from random weights" in caplog.text


def test_the_section_and_the_function_cannot_drift():
    arguments = set(inspect.signature(finetune_encoder).parameters)
    assert set(config.EncoderFinetuneConfig.model_fields) <= arguments


def test_a_run_uses_what_it_fine_tuned(tmp_path, listing, monkeypatch):
    """From a listing to a report, the same answers to pixels, and nothing made twice."""
    stay_here(monkeypatch)
    original = stages.finetune_encoder
    monkeypatch.setattr(stages, "finetune_encoder", lambda **o: original(**{**o, "num_workers": 0}))

    def given(seed: int) -> str:
        base = load_encoder("viclip-tiny", seed=seed, device="cpu")
        save_encoder(base.module, "viclip-tiny", tmp_path / "base", f"given {seed}")
        return base.model_id

    model_id = given(3)
    encoder = {
        "name": "viclip-tiny",
        "weights": str(tmp_path / "base"),
        "finetune": {"blocks": 1, "epochs": 1, "learning_rate": 1e-3, "batch_size": 9, "num_cells": 4},
    }
    run = make(tmp_path, listing, encoder, 4)
    order = tuple(name for name in plan(run.experiment) if name in stages.STAGES)
    assert order[2:5] == ("frames", "encoder", "embed")
    output = finish(run, order)
    check_answers(output, listing)
    report(run)
    details = storage.read_manifest(str(output / "embeddings")).details
    assert details["model_id"].endswith("+finetuned")
    assert details["model_id"].split("+")[0] != model_id
    assert Hedwig.load(str(output)).embedder.encoder.model_id == details["model_id"]
    record = json.loads((output / "report" / "report.json").read_text())
    assert "viclip-tiny, fine-tuned (last 1 block(s), 1 epochs on 18 panoramas) from" in record["encoder_note"]
    assert record["encoder_note"].endswith("given 3")
    trained = storage.read_manifest(str(output / "encoder"))
    assert trained.details["metrics"]["viclip-tiny"]["base"] == f"{model_id}+chunks"
    again = Run(run.experiment)
    finish(again, order)
    assert again.resumed == list(order)
    given(4)  # other weights to start from are other embeddings
    other = Run(run.experiment)
    finish(other, order[:5])
    assert other.resumed == ["panoramas", "caption", "frames"]
    assert storage.read_manifest(str(output / "embeddings")).details["model_id"] != details["model_id"]
