"""The embedding stage: its columns, its captions, and the rows it cannot do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hedwig.embed import Embedder
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
    for column in Embedder.writes:
        assert out[column].shape == (5, 128)
        assert out[column].dtype == np.float32
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
