"""A tiny encoder learns where colours are and continues after a crash; the frames cache gives back what it got."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from hedwig.geo import haversine_km
from hedwig.models.encoder import load_encoder
from hedwig.training import encoder as training
from hedwig.training import encoder_fit, objective, read_frames, train_encoder, write_frames


def toy_rows(num: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Frames whose hues are smooth functions of the position, while their brightness means nothing."""
    rng = np.random.default_rng(seed)
    lat, lon = rng.uniform(-50, 50, num), rng.uniform(-100, 100, num)
    colour = np.stack([lat, lon / 2, -lat - lon / 2], axis=1)[:, None, None, None, :] / 2
    colour = colour + rng.uniform(60, 180, (num, 1, 1, 1, 1))
    frames = colour + rng.normal(0, 10, (num, 8, 64, 64, 3))
    frames[:, 0] += 40
    return {
        "pano_id": np.array([f"p{i:04d}" for i in rng.permutation(num)], dtype=object),
        "lat": lat,
        "lon": lon,
        "split": np.where(np.arange(num) % 5 == 0, "val", "train").astype(object),
        "caption": np.array(
            [None if i % 7 == 0 else "bright street" if v > 0 else "dark street" for i, v in enumerate(lat)],
            dtype=object,
        ),
        "frames": frames.clip(0, 255).astype(np.uint8),
    }


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("frames"))
    rows = toy_rows(240)
    for part in range(2):
        write_frames(folder, f"part-{part}", {key: values[part::2] for key, values in rows.items()})
    return folder


def train(cache: str, tmp_path: Path, **options) -> dict:
    defaults = {
        "epochs": 4,
        "batch_size": 8,
        "num_cells": 16,
        "tau_km": 1500.0,
        "num_workers": 0,
        "roll_probability": 0.0,
    }
    return train_encoder(
        frames=cache,
        output=str(tmp_path / "out"),
        scratch=str(tmp_path / "scratch"),
        run_name="run",
        **{**defaults, **options},
    )


def test_frames_come_back_as_they_were(cache, tmp_path):
    rows = toy_rows(240)
    back = read_frames(cache)
    order = np.argsort(rows["pano_id"].astype(str))
    for key, values in rows.items():
        np.testing.assert_array_equal(back[key], values[order])
    some = read_frames(cache, ["p0007", "p0003"])
    assert some["pano_id"].tolist() == ["p0003", "p0007"]
    np.testing.assert_array_equal(some["frames"][1], back["frames"][7])
    assert read_frames(cache, [])["frames"].shape == (0, 8, 64, 64, 3)
    other = {key: values[:2] for key, values in rows.items()}
    write_frames(str(tmp_path), "a", other)
    write_frames(str(tmp_path), "b", {**other, "frames": other["frames"][:, :4]})
    with pytest.raises(ValueError, match="4,64,64,3, 8,64,64,3"):
        read_frames(str(tmp_path))
    with pytest.raises(ValueError, match="twice"):
        train(str(tmp_path), tmp_path)
    with pytest.raises(ValueError, match="uint8"):
        write_frames(str(tmp_path), "c", {**other, "frames": other["frames"].astype(np.float32)})


def test_it_learns_where_colours_are(cache, tmp_path):
    name = "viclip-tiny"
    metrics = train(cache, tmp_path, encoders=[name])[name]
    lines = [json.loads(line) for line in (tmp_path / "out" / name / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["train_loss"] < 0.85 * lines[0]["train_loss"]
    assert lines[-1]["text_loss"] < lines[0]["text_loss"]
    rows = read_frames(cache)
    val, fit = rows["split"] == "val", rows["split"] == "train"
    constant = haversine_km(
        np.median(rows["lat"][fit]), np.median(rows["lon"][fit]), rows["lat"][val], rows["lon"][val]
    )
    assert metrics["val_median_error_km"] < 0.6 * np.median(constant)
    trained = load_encoder(name, weights=str(tmp_path / "out" / name), device="cpu")
    assert trained.weights_note == "trained from scratch on 192 panoramas, 4 epochs"
    # The nearest neighbour in the new space is nearer than in the random one. Of panoramas that nobody has seen, and
    # many of them: over four seeds the medians' ratio was 0.66 to 0.82, and 1.6 to 2.5 times as many were nearer as
    # farther (without learning 1 within 0.25).
    fresh = toy_rows(300, seed=1)
    errors = {}
    for key, encoder in (("trained", trained), ("random", load_encoder(name, device="cpu"))):
        references, queries = (encoder.encode_frames(frames) for frames in (rows["frames"][fit], fresh["frames"]))
        nearest = np.flatnonzero(fit)[(queries @ references.T).argmax(axis=1)]
        errors[key] = haversine_km(rows["lat"][nearest], rows["lon"][nearest], fresh["lat"], fresh["lon"])
    assert np.median(errors["trained"]) < 0.9 * np.median(errors["random"])
    num_nearer, num_farther = ((sign * (errors["random"] - errors["trained"]) > 0).sum() for sign in (1, -1))
    assert num_nearer > 1.25 * num_farther


def test_a_budget_decides_the_epochs(cache, tmp_path, monkeypatch):
    # 12 steps in 6 s make an epoch, validation adds 0.45 s: 20 s hold three.
    monkeypatch.setattr(encoder_fit.time, "monotonic", iter(np.arange(0, 10_000, 6.0).tolist()).__next__)
    metrics = train(cache, tmp_path, epochs=9, batch_size=16, time_budget_s=20.0)["viclip-tiny"]
    assert metrics["epoch"] == 2


def test_hiding_patches_keeps_the_class_token_and_the_share():
    hide = objective.HidePatches(0.5)
    tokens = torch.arange(33.0)[None, :, None].expand(4, -1, 2)
    module = torch.nn.Identity().train()
    (kept,) = hide(module, (tokens,))
    assert kept.shape == (4, 17, 2)
    assert (kept[:, 0] == 0).all()
    assert all(len(set(row.tolist())) == 17 for row in kept[:, :, 0])
    assert len({tuple(sorted(row.tolist())) for row in kept[:, :, 0]}) > 1
    assert hide(module.eval(), (tokens,)) is None


def test_augmentation_rotates_whole_clips_and_never_mirrors():
    frames = torch.arange(8, dtype=torch.uint8).reshape(1, 8, 1, 1, 1).expand(64, -1, 2, 2, 3) * 10
    out = objective.augmented(frames, torch.Generator().manual_seed(0), 1.0, 0.0)[:, :, 0, 0, 0] // 10
    assert ((out - out[:, :1]) % 8 == torch.arange(8)).all()
    assert len(out[:, 0].unique()) == 8
    assert torch.equal(objective.augmented(frames, torch.Generator(), 0.0, 0.0), frames)
    bright = objective.augmented(frames + 100, torch.Generator().manual_seed(0), 0.0, 0.1).float() / (frames + 100)
    assert 0.89 < bright.min() < 0.95 < 1.05 < bright.max() < 1.11


def test_bad_settings_name_the_value(cache, tmp_path):
    for options, message in (
        ({"encoders": []}, "at least one encoder"),
        ({"encoders": ["viclip-tiny"] * 2}, "none twice"),
        ({"hidden_patches": 1.0}, "hidden_patches is out of range: 1.0"),
        ({"num_workers": 500}, "192 training rows"),
    ):
        with pytest.raises(ValueError, match=message):
            train(cache, tmp_path, **options)
    with pytest.raises(FileNotFoundError, match="run the stage that writes it"):
        train(str(tmp_path / "nowhere"), tmp_path)


def test_two_encoders_in_one_fit_survive_a_crash(cache, tmp_path, ray_session, monkeypatch):
    options = {"encoders": ["viclip-tiny", "clip-tiny"], "epochs": 2, "batch_size": 96}
    undisturbed = train(cache, tmp_path / "a", **options)
    flag = tmp_path / "died"
    original = training._worker

    def worker(settings: dict) -> None:
        from hedwig.training.encoder_fit import EncoderFit

        whole = EncoderFit.epoch

        def epoch(self, number, rank, world):
            if "ln_pre" in str(self.objective) and number == 1 and not flag.exists():
                flag.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(self, number, rank, world)

        EncoderFit.epoch = epoch
        original(settings)

    monkeypatch.setattr(training, "_worker", worker)
    crashed = train(cache, tmp_path / "b", num_workers=1, **options)
    assert flag.exists()
    for name in options["encoders"]:
        assert crashed[name]["epoch"] == 1
        assert crashed[name]["val_loss"] == pytest.approx(undisturbed[name]["val_loss"], rel=1e-3)


@pytest.mark.parametrize(
    ("fusion", "temporal", "num_frames"),
    [("viclip", "select", 4), ("viclip", "select", 1), ("viclip", "interpolate", 4), ("mean", "select", 4)],
)
def test_an_encoder_is_trained_on_what_it_will_be_asked(cache, tmp_path, monkeypatch, fusion, temporal, num_frames):
    """The loss of an untrained encoder is that of the vectors which the same encoder gives for these frames."""
    rows = read_frames(cache)
    rows = {key: values[:40] for key, values in rows.items()}
    rows["frames"] = rows["frames"][:, :num_frames]
    write_frames(str(tmp_path / "cache"), "a", rows)
    seen = []
    original = objective.Objective.forward

    def forward(self, frames, ids):
        out = original(self, frames, ids)
        if not self.training:
            seen.append(out[1].numpy())
        return out

    monkeypatch.setattr(objective.Objective, "forward", forward)
    options = {"fusion": fusion, "temporal": temporal}
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)  # weights stay what they were
    train(str(tmp_path / "cache"), tmp_path, epochs=1, batch_size=32, fusions={"viclip-tiny": options})
    encoder = load_encoder("viclip-tiny", device="cpu", **options)
    expected = encoder.encode_frames(rows["frames"][rows["split"] == "val"])
    np.testing.assert_allclose(np.concatenate(seen), expected, atol=1e-5)
