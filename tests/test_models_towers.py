"""Image towers, with timm's smallest networks: sizes, normalisation, strict local weights, and no text."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from hedwig.models.encoder import encoder_spec, load_encoder
from hedwig.models.towers import load_timm, random_timm, timm_sizes

NAME = "test_vit"  # 160 px, 64 features, 0.3 M weights


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, 3, 160, 160, 3), dtype=np.uint8)


def test_features_are_timms_own(frames: np.ndarray) -> None:
    encoder = load_encoder(f"timm:{NAME}", device="cpu", seed=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = timm.create_model(NAME, num_classes=0).eval()
    scaled = (frames.reshape(-1, 160, 160, 3) / 255 - np.array(model.pretrained_cfg["mean"])) / np.array(
        model.pretrained_cfg["std"]
    )
    with torch.inference_mode():
        expected = model(torch.from_numpy(scaled).float().movedim(-1, 1)).numpy()
    expected = (expected / np.linalg.norm(expected, axis=1, keepdims=True)).reshape(2, 3, 64)
    np.testing.assert_allclose(encoder.encode_each_frame(frames), expected, atol=1e-5)
    mean = expected.mean(axis=1)
    np.testing.assert_allclose(
        encoder.encode_frames(frames), mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-5
    )
    assert encoder.fusion == "mean"
    settings = [encoder.weights_digest, list(model.pretrained_cfg["mean"]), list(model.pretrained_cfg["std"]), 160]
    assert encoder.model_id == f"timm:{NAME}@{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]}"
    assert encoder.weights_note == "random weights (seed 1)"


def test_reads_no_text() -> None:
    encoder = load_encoder(f"timm:{NAME}", device="cpu", long_captions="chunks")
    assert (encoder.has_text, encoder.text_dim) == (False, 1)
    assert encoder.encode_text(["a red house", "b"]).tolist() == [[0.0], [0.0]]
    assert encoder.truncated(["word " * 99]).tolist() == [False]
    assert not encoder.model_id.endswith("+chunks")
    with pytest.raises(ValueError, match="TimmTower reads no text"):
        encoder.module.tokenise(["a"])


@pytest.mark.parametrize(
    "name", [NAME, "test_convnext", "test_mambaout", "mobilenetv3_small_050", "test_vit.r160_in1k"]
)
def test_spec_without_weights_is_what_is_loaded(name: str) -> None:
    spec = encoder_spec(f"timm:{name}")
    tower = random_timm(name, 0)
    assert (spec.frame_px, spec.image_dim, spec.text_dim, spec.has_text) == (tower.frame_px, tower.image_dim, 1, False)
    with torch.inference_mode():
        assert tower.image_features(torch.zeros(1, 3, spec.frame_px, spec.frame_px)).shape == (1, spec.image_dim)


@pytest.mark.parametrize("name", [NAME, "test_vit_relpos"])  # the second has tables outside its state dict
def test_strict_weights_from_a_file(tmp_path: Path, name: str, frames: np.ndarray) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = timm.create_model(name, num_classes=7).eval()  # as published, with its classifier
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    tower = load_timm(name, weights=tmp_path)
    assert not any(buffer.is_meta for buffer in tower.buffers())
    side = tower.frame_px
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
        torch.testing.assert_close(tower.image_features(images), expected, atol=1e-5, rtol=0)
    state = dict(model.state_dict())
    del state["patch_embed.proj.bias"]
    torch.save({**state, "extra.weight": torch.zeros(1)}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"bad\.pth.*1 missing: patch_embed\.proj\.bias; 1 unexpected: extra\.weight"):
        load_timm(name, weights=tmp_path / "bad.pth")


def test_the_card_beside_the_weights_tells_the_tag(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    card = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"tag": "augreg_in21k"}}
    (tmp_path / "config.json").write_text(json.dumps(card))
    tower = load_timm("vit_tiny_patch16_224", weights=tmp_path)
    assert tower.model.pretrained_cfg["tag"] == "augreg_in21k"
    assert (tower.frame_px, tower.image_dim, tower.mean) == (224, 192, (0.5, 0.5, 0.5))
    assert timm_sizes("vit_tiny_patch16_224", tmp_path) == (224, 192)
    with pytest.raises(ValueError, match="says timm:vit_tiny_patch16_224, not timm:vit_small_patch16_224"):
        load_timm("vit_small_patch16_224", weights=tmp_path)
    card["pretrained_cfg"]["tag"] = "of_nobody"
    (tmp_path / "config.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match=r"knows no weights 'vit_tiny_patch16_224\.of_nobody', only vit_tiny"):
        load_timm("vit_tiny_patch16_224", weights=tmp_path)


@pytest.mark.parametrize("name", ["vit_tinny_patch16_224", "hf-hub:timm/vit_tiny", "local-dir:x"])
def test_unknown_names_are_refused_before_anything_is_fetched(name: str) -> None:
    with pytest.raises(ValueError, match="timm knows no"):
        load_encoder(f"timm:{name}")


def test_other_shapes_and_types_are_refused() -> None:
    tower = random_timm(NAME, 0)
    for shape in ((3, 160, 160), (1, 1, 4, 160, 160), (1, 1, 3, 160, 161)):
        with pytest.raises(ValueError, match=r"\(B, T, 3, 160, 160\), got"):
            tower.each_frame(torch.zeros(shape))
    with pytest.raises(ValueError, match="must be uint8"):
        tower.video_features_uint8(torch.zeros(1, 1, 160, 160, 3))


def test_seed_decides_and_the_global_generator_rests() -> None:
    before = torch.get_rng_state()
    ids = {load_encoder(f"timm:{NAME}", device="cpu", seed=seed).model_id for seed in (0, 0, 1)}
    assert len(ids) == 2
    assert torch.equal(torch.get_rng_state(), before)
