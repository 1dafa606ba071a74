"""The encoder: its names, its account of its weights, its files, and that a row's result is its own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hedwig.models.encoder import VideoTextEncoder, load_encoder, save_encoder
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


def test_attributes_and_unit_norm(encoder: VideoTextEncoder, frames: np.ndarray) -> None:
    assert (encoder.image_dim, encoder.text_dim, encoder.frame_px, encoder.num_frames) == (128, 128, PX, 8)
    assert encoder.weights_note == "random weights (seed 0)"
    assert encoder.model_id == f"{encoder.name}@{encoder.weights_digest[:12]}"
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
    for bad in (frames[0], frames[:, :7], frames[:, :, : PX // 2], frames.astype(np.float32)):
        with pytest.raises(ValueError, match=rf"takes uint8 frames .*\(B, 8, {PX}, {PX}, 3\), got"):
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
    with pytest.raises(ValueError, match="float32 or bfloat16, got 'float16'"):
        load_encoder("viclip-tiny", dtype="float16")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_encoder("viclip-tiny", weights=str(tmp_path / "nowhere"))
    (tmp_path / "model.json").write_text("[1]")
    save_viclip(random_viclip(TINY, 0), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.json.*expected an object"):
        load_encoder("viclip-tiny", weights=str(tmp_path))
    with pytest.raises(ValueError, match="Unknown encoder 'x'"):
        save_encoder(random_viclip(TINY, 0), "x", tmp_path, note="")
