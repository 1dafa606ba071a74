"""The embedding stage: its columns, its captions, and the rows it cannot do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hedwig.embed import Embedder, FrameEmbedder
from hedwig.models.encoder import save_encoder
from hedwig.models.viclip import TINY, random_viclip

PX = TINY.frame_px


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder(encoder_name="viclip-tiny", device="cpu", batch_size=2)


@pytest.fixture
def batch() -> dict[str, np.ndarray]:
    frames = np.random.default_rng(0).integers(0, 256, (5, 8, PX, PX, 3), dtype=np.uint8)
    caption = np.array(["a red house", None, "a red house", "  ", "two palm trees"], dtype=object)
    return {"pano_id": np.array(list("abcde")), "frames": frames, "caption": caption}


def test_columns(embedder: Embedder, batch: dict[str, np.ndarray]) -> None:
    out = embedder(batch)
    assert set(out) == {*batch, *Embedder.writes}  # no failure column where nothing failed
    for column in ("image_embedding", "text_embedding"):
        assert out[column].shape == (5, 128)
        assert out[column].dtype == np.float32
    assert out["caption_truncated"].tolist() == [False] * 5
    assert set(batch) == {"pano_id", "frames", "caption"}  # the batch handed over is left alone
    np.testing.assert_allclose(out["image_embedding"], embedder.encoder.encode_frames(batch["frames"]), atol=1e-6)


def test_captions(embedder: Embedder, batch: dict[str, np.ndarray]) -> None:
    text = embedder(batch)["text_embedding"]
    expected = embedder.encoder.encode_text(["a red house", "two palm trees"])
    np.testing.assert_allclose(text[[0, 2, 4]], expected[[0, 0, 1]], atol=1e-6)
    assert (text[[1, 3]] == 0).all()
    nothing = embedder({**batch, "caption": np.full(5, np.nan)})["text_embedding"]  # an all-null column
    assert (nothing == 0).all()


def test_rows_with_other_frames_fail_alone(embedder: Embedder, batch: dict[str, np.ndarray]) -> None:
    frames = np.empty(5, dtype=object)
    for row in range(5):
        frames[row] = batch["frames"][row]
    whole = embedder({**batch, "frames": frames})
    np.testing.assert_allclose(whole["image_embedding"], embedder(batch)["image_embedding"], atol=1e-6)
    frames[3] = batch["frames"][3, :7]
    out = embedder({**batch, "frames": frames})
    assert [reason is None for reason in out["failure"]] == [True, True, True, False, True]
    assert f"(7, {PX}, {PX}, 3)" in out["failure"][3]
    keep = [0, 1, 2, 4]
    np.testing.assert_allclose(out["image_embedding"][keep], whole["image_embedding"][keep], atol=1e-6)


def test_embeddings_that_are_not_finite_fail(tmp_path: Path, batch: dict[str, np.ndarray]) -> None:
    model = random_viclip(TINY, 0)
    with torch.no_grad():
        model.text_encoder.token_embedding.weight[model.tokenise(["palm"])[0][0, 1]] = torch.inf
    save_encoder(model, "viclip-tiny", tmp_path, note="broken on purpose")
    out = Embedder(encoder_name="viclip-tiny", weights=str(tmp_path), device="cpu")(batch)
    assert [row for row, reason in enumerate(out["failure"]) if reason] == [4]
    assert "text embedding that is not finite" in out["failure"][4]


def test_empty_batch(embedder: Embedder) -> None:
    out = embedder({"frames": np.zeros((0, 8, PX, PX, 3), dtype=np.uint8), "caption": np.array([], dtype=object)})
    assert out["image_embedding"].shape == out["text_embedding"].shape == (0, 128)


def test_arguments() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        Embedder(encoder_name="viclip-tiny", batch_size=0)
    with pytest.raises(ValueError, match="did you mean 'viclip-tiny'"):
        Embedder(encoder_name="viclip-tin")
    before = torch.get_num_threads()
    try:
        Embedder(encoder_name="viclip-tiny", device="cpu", num_threads=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("fusion", ["max_sim", "attention"])
@pytest.mark.parametrize("name", ["viclip-tiny", "clip-tiny"])
def test_fusions_that_keep_frames_write_them_one_after_the_other(
    name: str, fusion: Any, batch: dict[str, np.ndarray]
) -> None:
    embedder = FrameEmbedder(encoder_name=name, fusion=fusion, device="cpu", batch_size=3)
    out = embedder({**batch, "frames": batch["frames"][:, :4]})
    assert set(out) == {*batch, *FrameEmbedder.writes}
    assert out["frame_embeddings"].shape == (5, 4 * 128)
    assert out["frame_embeddings"].dtype == np.float32
    each = out["frame_embeddings"].reshape(5, 4, 128)
    np.testing.assert_allclose(np.linalg.norm(each, axis=2), 1, atol=1e-5)
    alone = embedder({**batch, "frames": batch["frames"][:, 2:3]})  # the third frame, as a panorama of one
    np.testing.assert_allclose(alone["image_embedding"], each[:, 2], atol=1e-5)
    mean = each.mean(axis=1)
    expected = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(out["image_embedding"], expected, atol=1e-6)
    np.testing.assert_allclose(embedder.encoder.encode_frames(batch["frames"][:, :4]), expected, atol=1e-5)


@pytest.mark.parametrize("fusion", ["viclip", "mean", "max_sim"])
@pytest.mark.parametrize("num_frames", [1, 4, 10])
def test_any_number_of_frames_gives_the_same_bits_alone_and_in_company(num_frames: int, fusion: Any) -> None:
    frames = np.random.default_rng(1).integers(0, 256, (3, num_frames, PX, PX, 3), dtype=np.uint8)
    rows = {"frames": frames, "caption": np.array(["a red house", "two palm trees", None], dtype=object)}
    embedder = Embedder(
        encoder_name="viclip-tiny", fusion=fusion, device="cpu", batch_size=2, num_frames=num_frames,
        long_captions="chunks",
    )  # fmt: skip
    together = embedder(rows)
    for row in range(3):
        alone = embedder({name: column[row : row + 1] for name, column in rows.items()})
        for name in ("image_embedding", "text_embedding", *(["frame_embeddings"] if fusion == "max_sim" else [])):
            assert np.array_equal(alone[name][0], together[name][row]), name
    wrong = embedder({name: column[:, :0] if name == "frames" else column for name, column in rows.items()})
    assert all(f"takes uint8 ({num_frames}, {PX}" in reason for reason in wrong["failure"])


def test_captions_that_lose_their_end_are_told_apart(batch: dict[str, np.ndarray]) -> None:
    long = " ".join(f"house number {i} with a red roof" for i in range(12))
    captions = np.array(["a red house", long, None, long, " "], dtype=object)
    cut = Embedder(encoder_name="viclip-tiny", device="cpu")({**batch, "caption": captions})
    assert cut["caption_truncated"].dtype == np.bool_
    assert cut["caption_truncated"].tolist() == [False, True, False, True, False]
    embedder = Embedder(encoder_name="viclip-tiny", device="cpu", long_captions="chunks")
    whole = embedder({**batch, "caption": captions})
    assert not whole["caption_truncated"].any()
    assert np.abs(whole["text_embedding"][1] - cut["text_embedding"][1]).max() > 1e-3
    np.testing.assert_allclose(whole["text_embedding"][0], cut["text_embedding"][0], atol=1e-6)


def test_an_encoder_without_text_gives_one_zero_that_nobody_reads(batch: dict[str, np.ndarray]) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, 2, 224, 224, 3), dtype=np.uint8)
    out = Embedder(encoder_name="timm:test_vit", device="cpu")({**batch, "frames": frames[..., :160, :160, :]})
    assert "failure" not in out
    assert out["text_embedding"].tolist() == [[0.0]] * 5
    assert not out["caption_truncated"].any()
