"""ViCLIP against its official outputs, the official key lists, and a twin written in the official order."""

from __future__ import annotations

import json
import re
import zlib
from ast import literal_eval
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from hedwig.models.viclip import (
    B16,
    IMAGENET_MEAN,
    IMAGENET_STD,
    L14,
    TINY,
    ViCLIP,
    ViCLIPConfig,
    count_tokens,
    load_viclip,
    random_viclip,
    save_viclip,
    tokenise,
)
from hedwig.models.weights import load_strict, weights_digest

SMALL = ViCLIPConfig(32, 16, 4, 64, 3, 2, 64, 2, 2, 32, vocab_size=49408)


def key_list(shared: Path, size: str) -> dict[str, tuple[int, ...]]:
    lines = (shared / "reference" / f"viclip_{size}_state_dict.tsv").read_text().splitlines()
    return {key: literal_eval(shape) for key, shape, _ in (line.split("\t") for line in lines)}


def golden_weight(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The rule of golden/README.md."""
    if key == "temp":
        return torch.full((), 0.01)
    seed = zlib.crc32(f"hedwig-golden:public:{key}".encode())
    n = np.random.RandomState(seed).standard_normal(int(np.prod(shape))).astype(np.float32).reshape(shape)
    parts = key.split(".")
    if len(parts) > 1 and parts[-2].startswith("ln_"):
        n = 1 + 0.05 * n if parts[-1] == "weight" else 0.05 * n
    elif key.endswith("bias"):
        n = 0.02 * n
    elif "embedding" in key and "token" not in key:
        n = 0.5 * n
    else:
        n = 0.04 * n
    return torch.from_numpy(n.astype(np.float32))


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict:
    return json.loads((shared / "golden" / "viclip_b16.json").read_text())


@pytest.fixture(scope="module")
def golden_b16(shared: Path) -> ViCLIP:
    return load_viclip({key: golden_weight(key, shape) for key, shape in key_list(shared, "b16").items()})


@pytest.fixture(scope="module")
def small() -> ViCLIP:
    return random_viclip(SMALL, 3)


def some_frames(model: ViCLIP, batch: int = 2, seed: int = 0) -> torch.Tensor:
    c = model.config
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, c.num_frames, c.frame_px, c.frame_px, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def normalised(frames: torch.Tensor) -> torch.Tensor:
    scaled = (frames.double() / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    return scaled.movedim(-1, 2).float()


def official_video_twin(model: ViCLIP, frames: torch.Tensor) -> torch.Tensor:
    """The vision forward in the order of the official code: Conv3d, spatial-major tokens, nn.MultiheadAttention."""
    tower, c = model.vision_encoder, model.config
    b, t = frames.shape[:2]
    w = c.vision_width
    x = F.conv3d(
        frames.permute(0, 2, 1, 3, 4), tower.conv1.weight, stride=(1, c.patch_px, c.patch_px)
    )  # (B, W, T, g, g)
    x = x.permute(0, 2, 3, 4, 1).reshape(b * t, -1, w)
    x = torch.cat([tower.class_embedding.expand(b * t, 1, w), x], dim=1) + tower.positional_embedding
    first = x[::t, :1]
    rest = x[:, 1:].reshape(b, t, -1, w).permute(0, 2, 1, 3).reshape(-1, t, w)
    rest = (rest + tower.temporal_positional_embedding).reshape(b, -1, w)
    x = tower.ln_pre(torch.cat([first, rest], dim=1)).permute(1, 0, 2)
    for block in tower.transformer.resblocks:
        attention = nn.MultiheadAttention(w, c.vision_heads)
        attention.load_state_dict(block.attn.state_dict())
        y = block.ln_1(x)
        x = x + attention(y, y, y, need_weights=True)[0]
        h = block.mlp.c_fc(block.ln_2(x))
        x = x + block.mlp.c_proj(h * torch.sigmoid(1.702 * h))
    return tower.ln_post(x)[0] @ tower.proj


def test_golden_video(golden_b16: ViCLIP, golden: dict) -> None:
    seed = zlib.crc32(b"hedwig-golden:public:video")
    video = np.random.RandomState(seed).standard_normal((2, 8, 3, 224, 224)).astype(np.float32)
    with torch.inference_mode():
        features = golden_b16.encode_video(torch.from_numpy(video))
    assert (features - torch.tensor(golden["video_features"])).abs().max() < 2e-5


def test_golden_text_and_ids(golden_b16: ViCLIP, golden: dict) -> None:
    ids, truncated = golden_b16.tokenise(golden["captions"])
    assert ids.tolist() == golden["text_ids"]
    assert truncated.tolist() == [False, False, False, False, True]
    with torch.inference_mode():
        features = golden_b16.encode_text(golden["captions"])
    assert (features - torch.tensor(golden["text_features"])).abs().max() < 2e-5


@pytest.mark.parametrize(("size", "config", "count"), [("b16", B16, 303), ("l14", L14, 447)])
def test_has_exactly_the_official_keys(shared: Path, size: str, config: ViCLIPConfig, count: int) -> None:
    with torch.device("meta"):
        model = ViCLIP(config)
        official = {key: torch.zeros(shape) for key, shape in key_list(shared, size).items()}
    assert len(official) == count
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in official.items()}
    assert load_viclip(official, device="meta").config == config  # sizes and heads from the shapes alone


@pytest.mark.parametrize(("size", "config"), [("b16", B16), ("l14", L14)])
def test_every_official_key_is_needed_in_its_shape(shared: Path, size: str, config: ViCLIPConfig) -> None:
    with torch.device("meta"):
        model = ViCLIP(config)
        official = {key: torch.zeros(shape) for key, shape in key_list(shared, size).items()}
        other = torch.zeros(2, 2, 2)
    for key in official:
        with pytest.raises(ValueError, match=f"'file' .* 1 missing: {re.escape(key)}\\."):
            load_strict(model, {k: v for k, v in official.items() if k != key}, origin="file")
        with pytest.raises(ValueError, match=f"1 misshapen: {re.escape(key)} "):
            load_strict(model, {**official, key: other}, origin="file")
    with pytest.raises(ValueError, match=r"1 unexpected: vision_encoder\.mask_token"):
        load_strict(model, {**official, "vision_encoder.mask_token": other}, origin="file")


def test_agrees_with_the_official_order_of_operations(small: ViCLIP) -> None:
    frames = normalised(some_frames(small))
    with torch.no_grad():
        expected = official_video_twin(small, frames)
        features = small.video_features(frames)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(features, expected, atol=2e-6, rtol=0)


def test_uint8_path_equals_normalising_first() -> None:
    model = random_viclip(TINY, 0)
    frames = some_frames(model, 3)
    frames[0] = 0
    frames[1] = 255
    with torch.no_grad():
        direct = model.video_features_uint8(frames)
        reference = model.video_features(normalised(frames))
    assert (direct - reference).abs().max() < 1e-5
    assert (direct[0] - direct[1]).abs().max() > 0.1


def test_bfloat16_stays_close() -> None:
    frames, captions = some_frames(random_viclip(TINY, 0)), ["a red house", "two palm trees by the sea"]
    exact, cast = random_viclip(TINY, 0), random_viclip(TINY, 0).to(torch.bfloat16)
    with torch.inference_mode():
        pairs = [
            (exact.video_features_uint8(frames), cast.video_features_uint8(frames).float()),
            (exact.encode_text(captions), cast.encode_text(captions)),
        ]
    assert all(F.cosine_similarity(a, b).min() > 0.999 for a, b in pairs)
    assert pairs[1][1].dtype == torch.float32


def test_order_and_presence_of_frames_matter(small: ViCLIP) -> None:
    frames = normalised(some_frames(small, 1))
    swapped = frames[:, [1, 0, 2, 3]]
    repeated = frames[:, [0, 1, 2, 2]]
    with torch.no_grad():
        features = small.encode_video(torch.cat([frames, swapped, repeated, frames]))
    assert (features[0] - features[3]).abs().max() < 1e-6
    assert (features[0] - features[1]).abs().max() > 1e-3
    assert (features[0] - features[2]).abs().max() > 1e-3


def test_one_frame_gets_the_mean_temporal_embedding(small: ViCLIP) -> None:
    """As in the official code, where a clip of one frame adds `temporal_positional_embedding.mean(1)`."""
    frames = some_frames(small, 3)[:, :1]
    alone = random_viclip(replace(SMALL, num_frames=1), 0)
    state = dict(small.state_dict())
    key = "vision_encoder.temporal_positional_embedding"
    alone.load_state_dict({**state, key: state[key].mean(1, keepdim=True)})
    with torch.no_grad():
        expected = alone.video_features_uint8(frames)
        torch.testing.assert_close(small.video_features_uint8(frames), expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(small.video_features(normalised(frames)), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(official_video_twin(alone, normalised(frames)), expected, atol=1e-5, rtol=0)
        each = small.each_frame_uint8(frames[:, 0][None])
    torch.testing.assert_close(each[0], F.normalize(expected, dim=-1), atol=1e-6, rtol=0)


def test_interpolated_time_against_a_slow_twin(small: ViCLIP) -> None:
    """Linear between the centres of equally long intervals, held at both ends: what align_corners=False means."""
    known = small.vision_encoder.temporal_positional_embedding[0].detach()
    assert torch.equal(small.vision_encoder.temporal(4).detach(), known)
    for num_frames in (2, 3, 10):
        got = small.vision_encoder.temporal(num_frames).detach()
        for i in range(num_frames):
            place = min(max((i + 0.5) * 4 / num_frames - 0.5, 0.0), 3.0)
            low = min(int(place), 2)
            expected = known[low] + (place - low) * (known[low + 1] - known[low])
            torch.testing.assert_close(got[i], expected, atol=1e-6, rtol=0)
    ten = some_frames(small, 2)[:, [0, 0, 1, 1, 1, 2, 2, 2, 3, 3]]
    with pytest.raises(ValueError, match=r"got \(2, 10, 32, 32, 3\)"):
        small.video_features_uint8(ten)
    four = ten[:, [0, 2, 5, 8]]
    with torch.no_grad():
        assert small.video_features_uint8(ten, interpolate=True).shape == (2, 32)
        same = small.video_features_uint8(four, interpolate=True)
        assert torch.equal(same, small.video_features_uint8(four))


def test_time_and_space_embeddings_are_not_swapped(small: ViCLIP) -> None:
    # Without temporal embeddings the order of frames is invisible; without spatial ones, the order of patches is.
    frames = normalised(some_frames(small, 1))
    frames_reversed = frames.flip(1)
    half = SMALL.frame_px // 2
    patches_swapped = frames.roll(half, dims=-1)
    for name, blind, seeing in (
        ("temporal_positional_embedding", frames_reversed, patches_swapped),
        ("positional_embedding", patches_swapped, frames_reversed),
    ):
        state = small.state_dict()
        state["vision_encoder." + name] = torch.zeros_like(state["vision_encoder." + name])
        model = load_viclip(state)
        with torch.no_grad():
            base, same, other = (model.video_features(x) for x in (frames, blind, seeing))
        assert (base - same).abs().max() < 1e-5, name
        assert (base - other).abs().max() > 1e-3, name


def test_text_tower_is_causal_and_reads_the_end_token(small: ViCLIP) -> None:
    ids, _ = small.tokenise(["a yellow tram"])
    padded = ids.clone()
    padded[0, 10:] = 77  # after the end token
    changed = ids.clone()
    changed[0, 2] += 1
    with torch.no_grad():
        base, after, before = (small.text_features(i) for i in (ids, padded, changed))
    assert torch.equal(base, after)
    assert (base - before).abs().max() > 1e-3


def test_tokeniser_is_open_clips() -> None:
    from open_clip.tokenizer import SimpleTokenizer

    texts = ["", "Palm  trees &amp; SAND", "café — naïve 你好 🌴", "word " * 40, "it's 1,234 km"]
    ids, truncated = tokenise(texts)
    assert torch.equal(ids, SimpleTokenizer(context_length=32)(texts))
    assert ids.shape == (5, 32)
    assert truncated.tolist() == [False, False, False, True, False]


def test_count_tokens_leaves_out_start_and_end() -> None:
    assert count_tokens("") == 0
    assert count_tokens("palm trees") == 2
    exactly, over = "word " * 30, "word " * 31
    assert (count_tokens(exactly), count_tokens(over)) == (30, 31)
    assert tokenise([exactly, over])[1].tolist() == [False, True]
    with pytest.raises(TypeError, match="list of captions"):
        tokenise("one caption")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 3, 32, 32), r"Add the batch dimension: x\[None\]"),
        ((1, 5, 3, 32, 32), r"\(B, 4, 3, 32, 32\), got \(1, 5, 3, 32, 32\)"),
        ((1, 3, 4, 32, 32), r"got \(1, 3, 4, 32, 32\)"),
        ((1, 4, 3, 48, 48), r"got \(1, 4, 3, 48, 48\)"),
    ],
)
def test_other_shapes_are_refused(small: ViCLIP, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small.video_features(torch.zeros(shape))


def test_uint8_path_refuses_floats_and_other_layouts(small: ViCLIP) -> None:
    with pytest.raises(ValueError, match="must be uint8"):
        small.video_features_uint8(torch.zeros(1, 4, 32, 32, 3))
    with pytest.raises(ValueError, match=r"got \(1, 4, 3, 32, 32\)"):
        small.video_features_uint8(torch.zeros(1, 4, 3, 32, 32, dtype=torch.uint8))


def test_gradients_reach_every_weight() -> None:
    model = random_viclip(SMALL, 0)
    ids, _ = model.tokenise(["a b c", "two roads"])
    (model.video_features_uint8(some_frames(model)).sum() + model.text_features(ids).sum()).backward()
    without = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert without == ["temp"]


def test_random_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = weights_digest(random_viclip(SMALL, 5).state_dict())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert weights_digest(random_viclip(SMALL, 5).state_dict()) == first
    assert weights_digest(random_viclip(SMALL, 6).state_dict()) != first


def test_random_weights_are_clips_initialisation() -> None:
    state = random_viclip(TINY, 0).state_dict()
    for key, std in {
        "vision_encoder.proj": 128**-0.5,
        "text_encoder.text_projection": 64**-0.5,
        "vision_encoder.temporal_positional_embedding": 128**-0.5,
        "text_encoder.positional_embedding": 0.01,
        "vision_encoder.transformer.resblocks.2.attn.in_proj_weight": 128**-0.5,
        "vision_encoder.transformer.resblocks.2.mlp.c_proj.weight": (128 * 8) ** -0.5,
        "text_encoder.transformer.resblocks.1.attn.out_proj.weight": (64 * 4) ** -0.5,
    }.items():
        assert state[key].std().item() == pytest.approx(std, rel=0.1), key
        assert abs(state[key].mean().item()) < 0.1 * std + 1e-3
    assert state["temp"].item() == pytest.approx(0.01)
    assert (state["vision_encoder.ln_pre.weight"] == 1).all()


@pytest.mark.parametrize("wrap", [None, "model", "module", "state_dict"])
def test_pth_files_load_however_they_are_wrapped(tmp_path: Path, small: ViCLIP, wrap: str | None) -> None:
    state = small.state_dict()
    if wrap == "module":
        state = {f"module.{key}": value for key, value in state.items()}
    content = state if wrap is None else {wrap: state, "epoch": 3}
    torch.save(content, tmp_path / "weights.pth")
    loaded = load_viclip(tmp_path / "weights.pth")
    assert loaded.config == SMALL
    assert weights_digest(loaded.state_dict()) == weights_digest(small.state_dict())


def test_saved_file_is_official_and_keeps_its_heads(tmp_path: Path) -> None:
    config = replace(SMALL, vision_heads=8, text_heads=1)  # not what the shapes would suggest
    model = random_viclip(config, 0)
    save_viclip(model, tmp_path / "model.safetensors")
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())
    loaded = load_viclip(tmp_path)
    assert loaded.config == config
    assert not loaded.training
    frames = some_frames(model)
    with torch.inference_mode():
        assert torch.equal(loaded.video_features_uint8(frames), model.video_features_uint8(frames))
    assert load_viclip(model.state_dict()).config.vision_heads == 2


def test_heads_beside_a_plain_file_are_read_from_model_json(tmp_path: Path) -> None:
    config = replace(SMALL, vision_heads=8)
    torch.save(random_viclip(config, 0).state_dict(), tmp_path / "weights.pth")
    (tmp_path / "model.json").write_text(json.dumps({"config": {**config.__dict__}}))
    assert load_viclip(tmp_path / "weights.pth").config == config
    (tmp_path / "model.json").write_text(json.dumps({"config": {"width": 3}}))
    with pytest.raises(ValueError, match=r"sizes recorded with .*weights\.pth"):
        load_viclip(tmp_path / "weights.pth")


def test_loaded_model_shares_no_memory_with_the_dict(small: ViCLIP) -> None:
    state = {key: value.clone() for key, value in small.state_dict().items()}
    loaded = load_viclip(state)
    with torch.no_grad():
        loaded.vision_encoder.proj.zero_()
    assert state["vision_encoder.proj"].abs().max() > 0


def test_errors_name_the_keys(small: ViCLIP) -> None:
    state = dict(small.state_dict())
    del state["temp"]
    with pytest.raises(ValueError, match="1 missing: temp"):
        load_viclip(state)
    with pytest.raises(ValueError, match="1 unexpected: extra"):
        load_viclip({**small.state_dict(), "extra": torch.zeros(1)})
    key = "vision_encoder.ln_pre.weight"
    with pytest.raises(ValueError, match=rf"1 misshapen: {key} \(5,\) instead of \(64,\)"):
        load_viclip({**small.state_dict(), key: torch.zeros(5)})
    state = dict(small.state_dict())
    del state["vision_encoder.proj"]
    with pytest.raises(ValueError, match=r"vision_encoder\.proj is missing"):
        load_viclip(state)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_truncated_files_are_named(tmp_path: Path, small: ViCLIP, suffix: str) -> None:
    file = tmp_path / f"cut{suffix}"
    if suffix == ".safetensors":
        save_viclip(small, file)
    else:
        torch.save(small.state_dict(), file)
    content = file.read_bytes()
    for size in (len(content) // 2, 5, 0):
        file.write_bytes(content[:size])
        with pytest.raises(ValueError, match=f"cut{suffix}"):
            load_viclip(file)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (marker,))

    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil.pth.*more than tensors"):
        load_viclip(tmp_path / "evil.pth")
    assert not marker.exists()


def test_missing_file_and_non_tensors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        load_viclip(tmp_path / "nowhere.pth")
    torch.save({"temp": torch.zeros(()), "epoch": 3}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="not tensors: epoch"):
        load_viclip(tmp_path / "odd.pth")


def test_config_refuses_impossible_sizes() -> None:
    with pytest.raises(ValueError, match="frame_px=33 must be a multiple of patch_px=16"):
        replace(SMALL, frame_px=33)
    with pytest.raises(ValueError, match="vision_layers=0"):
        replace(TINY, vision_layers=0)
    with pytest.raises(ValueError, match="text_width=64 must be a multiple of text_heads=3"):
        replace(TINY, text_heads=3)


def test_digest_is_of_the_tensors_not_of_the_file(tmp_path: Path, small: ViCLIP) -> None:
    save_viclip(small, tmp_path / "a.safetensors")
    torch.save({"model": dict(reversed(small.state_dict().items()))}, tmp_path / "b.pth")
    digest = weights_digest(small.state_dict())
    assert weights_digest(tmp_path / "a.safetensors") == weights_digest(tmp_path / "b.pth") == digest
    moved = {**small.state_dict(), "temp": small.temp.detach() + 1e-6}
    assert weights_digest(moved) != digest
    assert weights_digest({"a": torch.zeros(2, 3)}) != weights_digest({"a": torch.zeros(3, 2)})
    assert weights_digest({"a": torch.zeros(2)}) != weights_digest({"a": torch.zeros(2, dtype=torch.int32)})
