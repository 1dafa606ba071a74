"""Mean-pooled CLIP: the pooling, the strict local loading, and the QuickGELU guard."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F

from hedwig.models import clip as clip_module
from hedwig.models.clip import (
    CLIP_MEAN,
    CLIP_STD,
    TINY_CLIP,
    MeanCLIP,
    clip_sizes,
    load_clip,
    random_clip,
    save_clip,
    tiny_clip,
)
from hedwig.models.viclip import TINY, ViCLIPConfig, load_viclip, random_viclip
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
    for shape in ((8, 3, PX, PX), (1, 8, 4, PX, PX), (1, 8, 3, PX // 2, PX // 2)):
        with pytest.raises(ValueError, match=rf"\(B, T, 3, {PX}, {PX}\), got"):
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
        loaded = load_clip("tiny", weights=weights)
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


def custom(**changes: object) -> dict:
    """TINY_CLIP as open_clip's CustomTextCLIP: a timm image tower, so some buffers are not in the state dict."""
    vision = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160}
    return {**TINY_CLIP, "custom_text": True, "vision_cfg": vision, **changes}


@pytest.fixture
def architectures(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict]:
    """Architectures that open_clip is made to know, beside its own."""
    known: dict[str, dict] = {}
    own_list, own_config = open_clip.list_models, open_clip.get_model_config
    monkeypatch.setattr(open_clip, "list_models", lambda: [*own_list(), *known])
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: known.get(name) or own_config(name))
    return known


@pytest.mark.parametrize("kind", ["timm tower", "coca", "siglip"])
def test_any_architecture_of_open_clip_loads_strictly(
    tmp_path: Path, architectures: dict[str, dict], kind: str
) -> None:
    changes: dict = {}
    if kind == "coca":
        text = {**TINY_CLIP["text_cfg"], "embed_cls": True, "output_tokens": True}
        decoder = {**TINY_CLIP["text_cfg"], "attn_pooler_heads": 2}
        vision = {**TINY_CLIP["vision_cfg"], "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
        changes = {"vision_cfg": vision, "text_cfg": text, "multimodal_cfg": decoder}
    elif kind == "siglip":
        changes = {
            "text_cfg": {**TINY_CLIP["text_cfg"], "no_causal_mask": True, "pool_type": "last", "proj_bias": True},
            "init_logit_bias": -10,
        }
    architectures["ours"] = custom(**changes)
    made = random_clip("ours", 3)
    px = made.frame_px
    assert clip_sizes("ours") == (px, 128) == (64 if kind == "coca" else 160, 128)
    torch.save(made.model.state_dict(), tmp_path / "weights.pt")
    loaded = load_clip("ours", weights=tmp_path / "weights.pt")
    assert not any(buffer.is_meta for buffer in loaded.buffers())
    frames = torch.randint(0, 256, (1, 2, px, px, 3), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.equal(loaded.each_frame_uint8(frames), made.each_frame_uint8(frames))
        assert torch.equal(loaded.encode_text(["a red house"]), made.encode_text(["a red house"]))
    state = made.model.state_dict()
    state["visual.more"] = torch.zeros(1)
    torch.save(state, tmp_path / "more.pt")
    with pytest.raises(ValueError, match=r"1 unexpected: visual\.more"):
        load_clip("ours", weights=tmp_path / "more.pt")


def test_normalisation_is_that_of_the_weights(tmp_path: Path, clip: MeanCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    save_clip(clip, tmp_path / "model.safetensors")
    assert load_clip("tiny", weights=tmp_path).mean == CLIP_MEAN
    half = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    monkeypatch.setattr(clip_module, "_published", lambda name: [half])
    assert load_clip("tiny", weights=tmp_path).mean == (0.5, 0.5, 0.5)
    monkeypatch.setattr(clip_module, "_published", lambda name: [half, {}])
    with pytest.raises(ValueError, match=r"differ in their normalisation.*open_clip_config\.json"):
        load_clip("tiny", weights=tmp_path)
    card = {"model_cfg": {"quick_gelu": True}, "preprocess_cfg": half}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(card))
    loaded = load_clip("tiny", weights=tmp_path)
    assert (loaded.mean, loaded.std) == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    white = torch.full((1, 1, PX, PX, 3), 255, dtype=torch.uint8)
    with torch.no_grad():  # (1 - 0.5) / 0.25 = 2
        torch.testing.assert_close(
            loaded.each_frame_uint8(white), loaded.each_frame(torch.full((1, 1, 3, PX, PX), 2.0))
        )


def test_open_clips_published_weights_have_one_normalisation_or_are_refused() -> None:
    ambiguous = [
        name
        for name in open_clip.list_models()
        if len({clip_module._pair(config) for config in clip_module._published(name)}) > 1
    ]
    assert ambiguous == ["ViT-L-14"]
    assert {clip_module._pair(c)[0] for c in clip_module._published("ViT-B-16-SigLIP2")} == {(0.5, 0.5, 0.5)}


def test_openais_own_entries_tell_quickgelu(tmp_path: Path, architectures: dict[str, dict], clip: MeanCLIP) -> None:
    architectures["plain"] = {**TINY_CLIP, "quick_gelu": False}
    state = dict(clip.model.state_dict())
    torch.save(state, tmp_path / "of_somebody.pt")
    with pytest.raises(ValueError, match=r"Nothing tells .*of_somebody.*set encoder\.quick_gelu to true"):
        load_clip("plain", weights=tmp_path / "of_somebody.pt", quick_gelu=None)
    assert load_clip("plain", weights=tmp_path / "of_somebody.pt", quick_gelu=False).frame_px == PX
    torch.save({**state, "input_resolution": torch.tensor(PX)}, tmp_path / "of_openai.pt")
    with pytest.raises(ValueError, match="trained with QuickGELU; use 'plain-quickgelu'"):
        load_clip("plain", weights=tmp_path / "of_openai.pt", quick_gelu=None)


@pytest.mark.parametrize("name", ["ViT-B-16", "ViT-B-16-quickgelu", "ViT-B-32", "ViT-B-32-quickgelu"])
def test_an_activation_that_nothing_tells_is_refused(tmp_path: Path, clip: MeanCLIP, name: str) -> None:
    """Weights of these are published with either activation, and both load into either network."""
    save_clip(clip, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"Nothing tells.*'{name}' is published with and.*encoder\.quick_gelu"):
        load_clip(name, weights=tmp_path, quick_gelu=None)
    quick = name.endswith("-quickgelu")
    with pytest.raises(ValueError, match=f"trained with {'GELU' if quick else 'QuickGELU'}; use"):
        load_clip(name, weights=tmp_path, quick_gelu=not quick)
    with pytest.raises(ValueError, match="misshapen"):  # the activation is settled, and tiny is no ViT-B
        load_clip(name, weights=tmp_path, quick_gelu=quick)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"quick_gelu": quick}}))
    with pytest.raises(ValueError, match="misshapen"):
        load_clip(name, weights=tmp_path, quick_gelu=None)


def test_all_published_rn50_weights_are_quickgelu(tmp_path: Path, clip: MeanCLIP) -> None:
    save_clip(clip, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="use 'RN50-quickgelu'"):
        load_clip("RN50", weights=tmp_path, quick_gelu=None)


def test_a_vocabulary_of_its_own_is_taken_from_the_folder(tmp_path: Path, architectures: dict[str, dict]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    text = {**TINY_CLIP["text_cfg"], "hf_tokenizer_name": "somebody/somewhere", "tokenizer_kwargs": {"clean": "lower"}}
    architectures["ours"] = {**TINY_CLIP, "text_cfg": {**text, "context_length": 4, "vocab_size": 10}}
    made = random_clip("ours", 0)
    with pytest.raises(ValueError, match=r"vocabulary of its own; put its tokenizer\.json"):
        made.encode_text(["a b"])
    save_clip(made, tmp_path / "model.safetensors")
    vocabulary = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "red": 2, "house": 3}, unk_token="[UNK]"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(tmp_path)
    ids, truncated = load_clip("ours", weights=tmp_path).tokenise(["Red house", "red red house house red"])
    assert ids.tolist() == [[2, 3, 0, 0], [2, 2, 3, 3]]
    assert truncated.tolist() == [False, True]


def test_language_models_as_text_towers_are_refused() -> None:
    with pytest.raises(ValueError, match="open_clip would download"):
        random_clip("roberta-ViT-B-32", 0)


def test_viclips_text_tower_is_open_clips_with_a_context_of_32(clip: MeanCLIP) -> None:
    config = ViCLIPConfig(64, 16, 8, 128, 1, 4, 64, 2, 2, 128)
    state = dict(random_viclip(config, 1).state_dict())
    text = {k: v for k, v in clip.model.state_dict().items() if not k.startswith(("visual.", "logit_scale"))}
    state = {k: v for k, v in state.items() if not k.startswith("text_encoder.")}
    viclip = load_viclip({**state, **{f"text_encoder.{key}": value for key, value in text.items()}})
    captions = ["a red house", "two palm trees by the sea, and " * 9, ""]
    with torch.inference_mode():
        torch.testing.assert_close(viclip.encode_text(captions), clip.encode_text(captions), atol=1e-6, rtol=0)
