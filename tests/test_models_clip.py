"""Mean-pooled CLIP: the pooling, the strict local loading, and the QuickGELU guard."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F

from hedwig.models.clip import CLIP_MEAN, CLIP_STD, MeanCLIP, load_clip, save_clip, tiny_clip
from hedwig.models.viclip import TINY, random_viclip
from hedwig.models.weights import weights_digest

PX = TINY.frame_px


@pytest.fixture(scope="module")
def clip() -> MeanCLIP:
    return tiny_clip(0)


@pytest.fixture
def frames() -> torch.Tensor:
    shape = (2, 8, PX, PX, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def normalised(frames: torch.Tensor) -> torch.Tensor:
    scaled = (frames.double() / 255 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    return scaled.movedim(-1, 2).float()


def test_is_the_mean_of_unit_frame_vectors(clip: MeanCLIP, frames: torch.Tensor) -> None:
    video = normalised(frames)
    with torch.no_grad():
        features, encoded = clip.video_features(video), clip.encode_video(video)
        for b in range(2):
            each = [clip.model.encode_image(video[b, t : t + 1])[0] for t in range(8)]
            mean = sum(v / v.norm() for v in each) / 8
            torch.testing.assert_close(features[b], mean, atol=1e-6, rtol=0)
            torch.testing.assert_close(encoded[b], mean / mean.norm(), atol=1e-6, rtol=0)


def test_does_not_see_the_order_of_frames(clip: MeanCLIP, frames: torch.Tensor) -> None:
    with torch.no_grad():
        base, permuted = clip.video_features_uint8(frames), clip.video_features_uint8(frames.flip(1))
        fewer = clip.video_features_uint8(frames[:, [0, 1, 2, 3, 4, 5, 6, 6]])
    torch.testing.assert_close(base, permuted, atol=1e-6, rtol=0)
    assert (base - fewer).abs().max() > 1e-4


def test_uint8_path_uses_clips_normalisation(clip: MeanCLIP, frames: torch.Tensor) -> None:
    with torch.no_grad():
        difference = clip.video_features_uint8(frames) - clip.video_features(normalised(frames))
    assert difference.abs().max() < 1e-5
    with pytest.raises(ValueError, match="must be uint8"):
        clip.video_features_uint8(normalised(frames))


def test_text_is_open_clips(clip: MeanCLIP) -> None:
    captions = ["a red house", "word " * 50]
    ids, truncated = clip.tokenise(captions)
    assert ids.shape == (2, 32)
    assert truncated.tolist() == [False, True]
    with torch.no_grad():
        expected = F.normalize(clip.model.encode_text(open_clip.tokenize(captions, context_length=32)), dim=-1)
        torch.testing.assert_close(clip.encode_text(captions), expected, atol=1e-6, rtol=0)


def test_other_shapes_are_refused(clip: MeanCLIP) -> None:
    for shape in ((8, 3, PX, PX), (1, 7, 3, PX, PX), (1, 8, 3, PX // 2, PX // 2)):
        with pytest.raises(ValueError, match=rf"\(B, 8, 3, {PX}, {PX}\), got"):
            clip.video_features(torch.zeros(shape))
    with pytest.raises(ValueError, match=rf"got \(8, {PX}, {PX}, 3\)"):
        clip.video_features_uint8(torch.zeros(8, PX, PX, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"\(B, 32\), got \(1, 77\)"):
        clip.text_features(torch.zeros(1, 77, dtype=torch.int64))


def test_random_weights_depend_on_the_seed_alone(clip: MeanCLIP) -> None:
    before = torch.get_rng_state()
    again = tiny_clip(0)
    assert torch.equal(torch.get_rng_state(), before)
    assert weights_digest(again.state_dict()) == weights_digest(clip.state_dict())
    assert weights_digest(tiny_clip(1).state_dict()) != weights_digest(clip.state_dict())


def test_is_as_large_as_tiny_viclip(clip: MeanCLIP) -> None:
    viclip = random_viclip(TINY, 0)
    ours = sum(p.numel() for p in clip.model.visual.parameters())
    theirs = sum(p.numel() for p in viclip.vision_encoder.parameters())
    assert theirs - ours == 8 * TINY.vision_width  # the temporal embedding


def test_round_trip_through_a_file(tmp_path: Path, clip: MeanCLIP, frames: torch.Tensor) -> None:
    save_clip(clip, tmp_path / "model.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in clip.model.state_dict().items()}}, tmp_path / "clip.pt")
    for weights in (tmp_path, tmp_path / "clip.pt"):
        loaded = load_clip("tiny", weights=weights, num_frames=8)
        assert not loaded.training
        with torch.inference_mode():
            assert torch.equal(loaded.video_features_uint8(frames), clip.video_features_uint8(frames))
            assert torch.equal(loaded.encode_text(["a b"]), clip.encode_text(["a b"]))


def test_loading_is_strict(tmp_path: Path, clip: MeanCLIP) -> None:
    state = dict(clip.model.state_dict())
    del state["ln_final.bias"]
    torch.save(state, tmp_path / "clip.pt")
    with pytest.raises(ValueError, match=r"clip.pt.*1 missing: ln_final.bias"):
        load_clip("tiny", weights=tmp_path / "clip.pt")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_clip(weights=tmp_path / "nowhere.pt")


def test_vit_l14_wants_openais_shapes(tmp_path: Path, clip: MeanCLIP) -> None:
    save_clip(clip, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"misshapen: .*\(1024"):
        load_clip("ViT-L-14-quickgelu", weights=tmp_path)


def test_quickgelu_mismatch_is_an_error(tmp_path: Path, clip: MeanCLIP) -> None:
    save_clip(clip, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="use 'ViT-L-14-quickgelu'"):
        load_clip("ViT-L-14", weights=tmp_path)
    with pytest.raises(ValueError, match="use 'ViT-L-14'"):
        load_clip("ViT-L-14-quickgelu", weights=tmp_path, quick_gelu=False)
    card = tmp_path / "open_clip_config.json"
    card.write_text(json.dumps({"model_cfg": {"embed_dim": 128}}))
    with pytest.raises(ValueError, match="trained with GELU"):
        load_clip("tiny", weights=tmp_path)
    card.write_text(json.dumps({"model_cfg": {"quick_gelu": True}}))
    assert load_clip("tiny", weights=tmp_path, quick_gelu=False).frame_px == PX


def test_tiny_really_computes_quickgelu(clip: MeanCLIP) -> None:
    mlp = clip.model.visual.transformer.resblocks[0].mlp
    x = torch.linspace(-3, 3, 7)
    np.testing.assert_allclose(mlp.gelu(x), x * torch.sigmoid(1.702 * x), atol=1e-6)


@pytest.mark.parametrize("name", ["ViT-L-15", "hf-hub:someone/model"])
def test_unknown_names_are_refused_before_anything_is_fetched(tmp_path: Path, clip: MeanCLIP, name: str) -> None:
    save_clip(clip, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="open_clip knows no"):
        load_clip(name, weights=tmp_path)
