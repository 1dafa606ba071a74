"""The encoder: its names, its account of its weights, its files, and that a row's result is its own."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hedwig.models.encoder import (
    ENCODER_NAMES,
    VideoTextEncoder,
    encoder_spec,
    evenly,
    load_encoder,
    save_encoder,
)
from hedwig.models.viclip import B16, TINY, ViCLIPConfig, random_viclip, save_viclip
from hedwig.models.weights import weights_digest

PX = TINY.frame_px
CAPTIONS = [f"a road number {i} beside {'a red ' * (i % 3)}house" for i in range(9)]


@pytest.fixture(scope="module", params=["viclip-tiny", "clip-tiny"])
def encoder(request: pytest.FixtureRequest) -> VideoTextEncoder:
    return load_encoder(request.param, device="cpu")


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (9, 8, PX, PX, 3), dtype=np.uint8)


def model_digest(encoder: VideoTextEncoder) -> str:
    """Of the weights for a ViCLIP; for a tower with what it learns from the files beside them."""
    if encoder.name == "viclip-tiny":
        return encoder.weights_digest
    tower = encoder.module
    settings = [encoder.weights_digest, list(tower.mean), list(tower.std), tower.frame_px]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def test_attributes_and_unit_norm(encoder: VideoTextEncoder, frames: np.ndarray) -> None:
    assert (encoder.image_dim, encoder.text_dim, encoder.frame_px, encoder.num_frames) == (128, 128, PX, 8)
    assert encoder.weights_note == "random weights (seed 0)"
    assert encoder.model_id == f"{encoder.name}@{model_digest(encoder)[:12]}"
    for vectors in (encoder.encode_frames(frames), encoder.encode_text(CAPTIONS)):
        assert vectors.shape == (9, 128)
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
        assert np.abs(vectors[0] - vectors[1]).max() > 1e-4


def test_a_row_does_not_depend_on_the_batch_around_it(encoder: VideoTextEncoder, frames: np.ndarray) -> None:
    video, text = encoder.encode_frames(frames), encoder.encode_text(CAPTIONS)
    for start, stop in ((0, 1), (8, 9), (2, 5), (1, 9)):
        assert np.abs(encoder.encode_frames(frames[start:stop]) - video[start:stop]).max() < 1e-6
        assert np.abs(encoder.encode_text(CAPTIONS[start:stop]) - text[start:stop]).max() < 1e-6
    assert np.abs(encoder.encode_frames(frames[::-1]) - video[::-1]).max() < 1e-6


def test_agrees_with_the_module(encoder: VideoTextEncoder, frames: np.ndarray) -> None:
    with torch.inference_mode():
        features = encoder.module.video_features_uint8(torch.from_numpy(frames))
        expected = torch.nn.functional.normalize(features, dim=-1).numpy()
    np.testing.assert_allclose(encoder.encode_frames(frames), expected, atol=1e-6)
    with torch.inference_mode():
        np.testing.assert_allclose(encoder.encode_text(CAPTIONS), encoder.module.encode_text(CAPTIONS), atol=1e-6)


def test_read_only_and_strided_frames_and_no_rows(encoder: VideoTextEncoder, frames: np.ndarray) -> None:
    expected = encoder.encode_frames(frames[:2])
    locked = frames[:2].copy()
    locked.flags.writeable = False
    assert np.array_equal(encoder.encode_frames(locked), expected)
    wide = np.zeros((2, 8, PX, PX, 6), dtype=np.uint8)
    wide[..., ::2] = frames[:2]
    assert np.array_equal(encoder.encode_frames(wide[..., ::2]), expected)
    assert encoder.encode_frames(frames[:0]).shape == (0, 128)
    assert encoder.encode_text([]).shape == (0, 128)


def test_other_frames_are_refused(encoder: VideoTextEncoder, frames: np.ndarray) -> None:
    many = np.zeros((1, 65, PX, PX, 3), dtype=np.uint8)
    for bad in (frames[0], frames[:, :0], many, frames[:, :, : PX // 2], frames.astype(np.float32)):
        with pytest.raises(ValueError, match=rf"takes uint8 frames .*\(B, 1\.\.64, {PX}, {PX}, 3\), got"):
            encoder.encode_frames(bad)


def test_bfloat16_is_the_same_model(encoder: VideoTextEncoder, frames: np.ndarray) -> None:
    half = load_encoder(encoder.name, device="cpu", dtype="bfloat16")
    assert half.model_id == encoder.model_id
    assert {p.dtype for p in half.module.parameters()} == {torch.bfloat16}
    vectors = half.encode_frames(frames)
    assert vectors.dtype == np.float32
    assert (vectors * encoder.encode_frames(frames)).sum(axis=1).min() > 0.999
    assert (half.encode_text(CAPTIONS) * encoder.encode_text(CAPTIONS)).sum(axis=1).min() > 0.999


def test_round_trip_with_note(encoder: VideoTextEncoder, frames: np.ndarray, tmp_path: Path) -> None:
    save_encoder(encoder.module, encoder.name, tmp_path / "encoder", note="trained on a synthetic world")
    card = json.loads((tmp_path / "encoder" / "model.json").read_text())
    assert card["weights_sha256"] == encoder.weights_digest
    loaded = load_encoder(encoder.name, weights=str(tmp_path / "encoder"), device="cpu")
    assert loaded.weights_note == "trained on a synthetic world"
    assert loaded.model_id == encoder.model_id
    assert np.array_equal(loaded.encode_frames(frames[:2]), encoder.encode_frames(frames[:2]))
    other = {"viclip-tiny": "clip-tiny", "clip-tiny": "viclip-tiny"}[encoder.name]
    with pytest.raises(ValueError, match=f"holds '{encoder.name}', not '{other}'"):
        load_encoder(other, weights=str(tmp_path / "encoder"))


def test_note_of_a_bare_file_names_it(tmp_path: Path) -> None:
    model = random_viclip(TINY, 1)
    torch.save({"model": model.state_dict()}, tmp_path / "some.pth")
    loaded = load_encoder("viclip-tiny", weights=str(tmp_path / "some.pth"), device="cpu")
    digest = weights_digest(model.state_dict())
    assert loaded.weights_note == f"weights from some.pth, sha256 {digest[:12]}"
    assert loaded.weights_digest == digest


def test_seed_decides(frames: np.ndarray) -> None:
    first, again, other = (load_encoder("viclip-tiny", seed=s, device="cpu") for s in (3, 3, 4))
    assert first.model_id == again.model_id != other.model_id
    assert first.weights_note == "random weights (seed 3)"


def test_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    config = ViCLIPConfig(32, 16, 8, 64, 1, 2, 64, 1, 2, 32)
    save_viclip(random_viclip(config, 0), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"another size than 'viclip-tiny': frame_px=32 instead of {PX}"):
        load_encoder("viclip-tiny", weights=str(tmp_path))
    with pytest.raises(ValueError, match=f"frame_px=32 instead of {B16.frame_px}"):
        load_encoder("viclip-b16", weights=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "near"), [("viclip-l-14", "viclip-l14"), ("viclip_b16", "viclip-b16"), ("clip-vit-l/14", "clip-vit-l14")]
)
def test_unknown_names_get_a_suggestion(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"Unknown encoder '{name}'; did you mean '{near}'"):
        load_encoder(name)


def test_unknown_dtype_and_missing_file(tmp_path: Path) -> None:
    for setting in ("dtype", "fusion", "temporal", "long_captions"):
        with pytest.raises(ValueError, match=f"{setting} must be one of .*; got 'float64'"):
            load_encoder("viclip-tiny", **{setting: "float64"})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_encoder("viclip-tiny", weights=str(tmp_path / "nowhere"))
    (tmp_path / "model.json").write_text("[1]")
    save_viclip(random_viclip(TINY, 0), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.json.*expected an object"):
        load_encoder("viclip-tiny", weights=str(tmp_path))
    with pytest.raises(ValueError, match="Unknown encoder 'x'"):
        save_encoder(random_viclip(TINY, 0), "x", tmp_path, note="")


def test_float16_is_the_same_model(encoder: VideoTextEncoder, frames: np.ndarray) -> None:
    half = load_encoder(encoder.name, device="cpu", dtype="float16")
    assert {p.dtype for p in half.module.parameters()} == {torch.float16}
    assert (half.encode_frames(frames) * encoder.encode_frames(frames)).sum(axis=1).min() > 0.9999
    assert (half.encode_text(CAPTIONS) * encoder.encode_text(CAPTIONS)).sum(axis=1).min() > 0.9999


@pytest.mark.parametrize("name", ["viclip-tiny", "clip-tiny"])
def test_per_frame_fusions(name: str, frames: np.ndarray) -> None:
    plain = load_encoder(name, device="cpu")
    for fusion in ("mean", "max_sim", "attention"):
        encoder = load_encoder(name, device="cpu", fusion=fusion)
        each = encoder.encode_each_frame(frames[:2, :5])
        assert (each.shape, each.dtype) == ((2, 5, 128), np.float32)
        np.testing.assert_allclose(np.linalg.norm(each, axis=-1), 1, atol=1e-6)
        for row, frame in ((0, 0), (1, 4)):
            alone = frames[row : row + 1, frame : frame + 1]
            np.testing.assert_allclose(each[row, frame], plain.encode_frames(alone)[0], atol=1e-6)
        mean = each.mean(axis=1)
        mean /= np.linalg.norm(mean, axis=1, keepdims=True)
        np.testing.assert_allclose(encoder.encode_frames(frames[:2, :5]), mean, atol=1e-6)
        assert encoder.stores_frames == (fusion != "mean")
        usual = name == "clip-tiny" and fusion == "mean"
        assert encoder.model_id == plain.model_id + ("" if usual else f"+{fusion}")
    assert not plain.stores_frames
    np.testing.assert_allclose(plain.encode_each_frame(frames[:2, :5]), each, atol=1e-6)
    assert plain.encode_each_frame(frames[:0]).shape == (0, 8, 128)


def test_mean_is_blind_to_the_order_and_joint_attention_is_not(frames: np.ndarray) -> None:
    order = [1, 0, *range(2, 8)]
    mean = load_encoder("viclip-tiny", device="cpu", fusion="mean")
    joint = load_encoder("viclip-tiny", device="cpu", fusion="viclip")
    assert joint.model_id == load_encoder("viclip-tiny", device="cpu").model_id
    assert np.abs(mean.encode_frames(frames[:2]) - mean.encode_frames(frames[:2, order])).max() < 1e-6
    assert np.abs(joint.encode_frames(frames[:2]) - joint.encode_frames(frames[:2, order])).max() > 1e-4


def test_other_numbers_of_frames(frames: np.ndarray) -> None:
    rng = np.random.default_rng(1)
    twelve = rng.integers(0, 256, (2, 12, PX, PX, 3), dtype=np.uint8)
    select, blend, ten = (
        load_encoder("viclip-tiny", device="cpu", **kwargs)
        for kwargs in ({}, {"temporal": "interpolate"}, {"temporal": "interpolate", "num_frames": 10})
    )
    assert blend.model_id == f"{select.model_id}+tV"
    assert ten.model_id == f"{select.model_id}+t10"
    assert (select.num_frames, blend.num_frames, ten.num_frames) == (8, 8, 10)
    eight = load_encoder("viclip-tiny", device="cpu", temporal="interpolate", num_frames=8)
    assert eight.model_id == select.model_id
    for encoder in (blend, eight):
        assert np.array_equal(encoder.encode_frames(frames), select.encode_frames(frames))
    one = twelve[:, :1]
    assert np.array_equal(blend.encode_frames(one), select.encode_frames(one))

    chosen = [0, 2, 3, 5, 6, 8, 9, 11]  # 0, 1.5, 3, 4.5, ... halves rounded up
    assert np.array_equal(select.encode_frames(twelve), select.encode_frames(twelve[:, chosen]))
    three = twelve[:, :3]
    assert np.array_equal(select.encode_frames(three), select.encode_frames(three[:, [0, 0, 0, 1, 1, 1, 2, 2]]))
    for encoder, clip in ((select, twelve), (select, three), (blend, twelve), (blend, three), (ten, twelve[:, :10])):
        base = encoder.encode_frames(clip)
        assert np.abs(base - encoder.encode_frames(clip[:, ::-1])).max() > 1e-4
        if encoder is not ten:
            assert np.abs(base - encoder.encode_frames(clip[:, :-1])).max() > 1e-4
    assert np.abs(blend.encode_frames(twelve) - select.encode_frames(twelve)).max() > 1e-4
    with pytest.raises(ValueError, match=r"\+t10 was loaded for 10 frames, got 12"):
        ten.encode_frames(twelve)


def test_another_normalisation_is_another_model(tmp_path: Path) -> None:
    plain = load_encoder("clip-tiny", device="cpu")
    save_encoder(plain.module, "clip-tiny", tmp_path, note="")
    card = {"model_cfg": {"quick_gelu": True}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(card))
    assert load_encoder("clip-tiny", weights=str(tmp_path), device="cpu").model_id == plain.model_id
    ids = {plain.model_id}
    for settings in ({"mean": [0.5, 0.5, 0.5]}, {"std": [0.5, 0.5, 0.5]}):
        (tmp_path / "open_clip_config.json").write_text(json.dumps({**card, "preprocess_cfg": settings}))
        other = load_encoder("clip-tiny", weights=str(tmp_path), device="cpu")
        assert other.weights_digest == plain.weights_digest
        ids.add(other.model_id)
    assert len(ids) == 3


def test_the_activation_is_a_setting_of_open_clips_weights(tmp_path: Path) -> None:
    save_encoder(load_encoder("clip-tiny", device="cpu").module, "clip-tiny", tmp_path, note="")
    assert load_encoder("clip-tiny", weights=str(tmp_path), quick_gelu=True, device="cpu").has_text
    with pytest.raises(ValueError, match=r"trained with GELU.*encoder\.quick_gelu=true"):
        load_encoder("clip-tiny", weights=str(tmp_path), quick_gelu=False)
    (tmp_path / "model.json").unlink()
    with pytest.raises(ValueError, match=r"Nothing tells.*encoder\.quick_gelu"):
        load_encoder("open_clip:ViT-B-16", weights=str(tmp_path))
    with pytest.raises(ValueError, match="misshapen"):  # the activation is settled, and tiny is no ViT-B
        load_encoder("open_clip:ViT-B-16", weights=str(tmp_path), quick_gelu=False)
    with pytest.raises(ValueError, match="'viclip-tiny' is no architecture of it"):
        load_encoder("viclip-tiny", weights=str(tmp_path), quick_gelu=True)
    with pytest.raises(ValueError, match="'clip-tiny' was given none"):
        load_encoder("clip-tiny", quick_gelu=True)


def test_evenly_goes_around_the_circle() -> None:
    assert evenly(8, 8).tolist() == list(range(8))
    for num_in in range(9, 65):
        got = evenly(num_in, 8)
        assert got.tolist() == [int(i * num_in / 8 + 0.5) for i in range(8)]
        gaps = np.diff([*got, num_in])  # the last one crosses the seam
        assert gaps.min() >= 1
        assert np.ptp(gaps) <= 1
    for num_in in range(1, 8):
        repeats = np.bincount(evenly(num_in, 8), minlength=num_in)
        assert (np.diff(evenly(num_in, 8)) >= 0).all()
        assert np.ptp(repeats) <= 1


def test_settings_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match=r"clip-tiny sees one frame at a time.*choose 'mean'"):
        load_encoder("clip-tiny", device="cpu", fusion="viclip")
    for name, fusion in (("clip-tiny", "auto"), ("viclip-tiny", "mean")):
        with pytest.raises(ValueError, match="fusion 'mean' has no temporal embedding"):
            load_encoder(name, device="cpu", fusion=fusion, temporal="interpolate")
    with pytest.raises(ValueError, match="from 1 to 64, got 65"):
        load_encoder("viclip-tiny", device="cpu", num_frames=65)


LONG = "A wide road leads past red houses, green fields and one white church. " * 5 + "Palm trees."


def test_long_captions_in_chunks(encoder: VideoTextEncoder) -> None:
    chunked = load_encoder(encoder.name, device="cpu", long_captions="chunks")
    assert chunked.model_id == f"{encoder.model_id}+chunks"
    captions = ["a red house", LONG, "two palm trees"]
    for one in (encoder, chunked):
        assert one.truncated(captions).tolist() == [False, True, False]
        assert one.truncated([]).shape == (0,)
    vectors = chunked.encode_text(captions)
    np.testing.assert_allclose(vectors[[0, 2]], encoder.encode_text(captions)[[0, 2]], atol=1e-6)
    sentence = LONG.split(". ")[0] + "."
    parts = encoder.encode_text([f"{sentence} {sentence}", f"{sentence} {sentence}", f"{sentence} Palm trees."])
    mean = parts.mean(axis=0)
    np.testing.assert_allclose(vectors[1], mean / np.linalg.norm(mean), atol=1e-6)
    assert np.abs(vectors[1] - encoder.encode_text(captions)[1]).max() > 1e-3
    for caption, vector in zip(captions, vectors, strict=True):
        np.testing.assert_allclose(chunked.encode_text([caption])[0], vector, atol=1e-6)


def test_compile_is_asked_for_and_static(monkeypatch: pytest.MonkeyPatch, frames: np.ndarray) -> None:
    asked: list[dict] = []

    def fake(function, **settings):
        asked.append(settings)
        return function

    monkeypatch.setattr(torch, "compile", fake)
    plain = load_encoder("viclip-tiny", device="cpu")
    assert asked == []
    compiled = load_encoder("viclip-tiny", device="cpu", compile=True)
    assert asked == [{"dynamic": False}]
    assert compiled.model_id == plain.model_id
    assert np.array_equal(compiled.encode_frames(frames), plain.encode_frames(frames))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # inductor's own
@pytest.mark.parametrize("name", ["viclip-tiny", "clip-tiny"])
def test_compiled_gives_the_same(name: str, frames: np.ndarray) -> None:
    compiled = load_encoder(name, device="cpu", compile=True)
    plain = load_encoder(name, device="cpu")
    for clip in (frames[:2], frames[:2, :5]):
        assert np.abs(compiled.encode_frames(clip) - plain.encode_frames(clip)).max() < 1e-5


@pytest.mark.gpu
def test_on_a_gpu_the_same_vectors(encoder: VideoTextEncoder, frames: np.ndarray) -> None:
    gpu = load_encoder(encoder.name, device="cuda")
    expected = encoder.encode_frames(frames)
    first, second = gpu.encode_frames(frames), gpu.encode_frames(frames[::-1])  # one pinned buffer, used twice
    assert np.abs(first - expected).max() < 1e-4
    assert np.abs(second[::-1] - expected).max() < 1e-4
    half = load_encoder(encoder.name, device="cuda", dtype="float16")
    assert (half.encode_frames(frames) * expected).sum(axis=1).min() > 0.999


def test_a_file_of_another_checksum_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights.pth"
    torch.save(random_viclip(TINY, 1).state_dict(), file)
    right = hashlib.sha256(file.read_bytes()).hexdigest()
    loaded = load_encoder("viclip-tiny", weights=str(file), sha256=right.upper(), device="cpu")
    assert loaded.weights_note.startswith("weights from weights.pth")
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("the file was opened"))
    with pytest.raises(ValueError, match=rf"weights\.pth' was not opened: its SHA-256 is {right}, expected {'0' * 64}"):
        load_encoder("viclip-tiny", weights=str(file), sha256="0" * 64, device="cpu")
    with pytest.raises(ValueError, match="was given none"):
        load_encoder("viclip-tiny", sha256=right)


@pytest.mark.parametrize("name", ENCODER_NAMES)
def test_spec_of_our_names(name: str) -> None:
    spec = encoder_spec(name)
    sizes = {"tiny": (64, 128), "b16": (224, 512), "l14": (224, 768)}[name.rpartition("-")[2]]
    assert (spec.frame_px, spec.image_dim, spec.text_dim, spec.num_frames, spec.has_text) == (
        sizes[0],
        sizes[1],
        sizes[1],
        8,
        True,
    )


def test_spec_is_what_is_loaded(encoder: VideoTextEncoder) -> None:
    spec = encoder_spec(encoder.name)
    for field in ("frame_px", "num_frames", "image_dim", "text_dim", "has_text"):
        assert getattr(encoder, field) == getattr(spec, field)


@pytest.mark.parametrize("name", ["open-clip:ViT-B-32", "timm:", "hf:x", "openclip:RN50"])
def test_unknown_prefixes_are_explained(name: str) -> None:
    with pytest.raises(ValueError, match=r"Unknown encoder .*open_clip:ARCH .*timm:ARCH .*transformers:LABEL"):
        encoder_spec(name)
