"""What is to learn learns and nothing else does; adapters begin as nothing and end as plain weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hedwig.models.encoder import load_encoder, save_encoder
from hedwig.models.towers import random_timm
from hedwig.training.adapters import add_lora, checkpoint_blocks, merge_lora, rest, train_blocks, vision_depth

NAMES = ["viclip-tiny", "clip-tiny"]


@pytest.fixture
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, 8, 64, 64, 3), dtype=np.uint8)


def features(module: torch.nn.Module, frames: np.ndarray) -> torch.Tensor:
    return module.video_features_uint8(torch.from_numpy(frames))


def step(module: torch.nn.Module, frames: np.ndarray) -> None:
    """One step away from the weights, by whatever takes gradients."""
    learning = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learning, lr=0.01)
    features(module, frames).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("name", NAMES)
def test_only_the_last_blocks_and_what_follows_them_move(name, frames):
    module = load_encoder(name, device="cpu").module
    before = {key: value.clone() for key, value in module.state_dict().items()}
    rest(module)
    train_blocks(module, 1)
    step(module.train(), frames)
    moved = {key for key, value in module.state_dict().items() if not torch.equal(value, before[key])}
    last = {key for key in before if "visual" in key or "vision" in key}
    last = {
        key
        for key in last
        if "resblocks.3." in key or "ln_post" in key or key.endswith(("visual.proj", "encoder.proj"))
    }
    assert moved <= last
    assert {key for key in last if not key.endswith("in_proj_bias")} <= moved  # a key's bias changes no softmax
    assert len(last) == 15


@pytest.mark.parametrize("name", NAMES)
def test_adapters_begin_as_nothing_and_merge_into_what_they_gave(name, frames, tmp_path):
    encoder = load_encoder(name, device="cpu")
    module, names = encoder.module, list(encoder.module.state_dict())
    given = encoder.encode_frames(frames)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    rest(module)
    add_lora(module, 2, 6.0, seed=0)
    learning = [key for key, p in module.named_parameters() if p.requires_grad]
    assert len(learning) == 4 * 4 * 2  # blocks, matrices, down and up
    np.testing.assert_array_equal(encoder.encode_frames(frames), given)
    step(module.train(), frames)
    step(module, frames)  # in the first, nothing but `up` can move
    module.eval()
    unmerged = encoder.encode_frames(frames)
    assert np.abs(unmerged - given).max() > 1e-3
    low = module.get_submodule(learning[0].rpartition(".")[0])
    key = learning[0].replace("parametrizations.", "").removesuffix(".0.down")
    change = low.scale * low.up.detach() @ low.down.detach()
    assert low.scale == 3.0
    merge_lora(module)
    assert sorted(module.state_dict()) == sorted(names)
    np.testing.assert_allclose(module.state_dict()[key], before[key] + change, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(encoder.encode_frames(frames), unmerged, atol=1e-5)
    changed = [k for k, value in module.state_dict().items() if not torch.equal(value, before[k])]
    assert len(changed) == 4 * 4
    assert all("resblocks" in k and "text" not in k for k in changed)
    save_encoder(module, name, tmp_path, "a note", finetuned_from=encoder.model_id)
    loaded = load_encoder(name, weights=str(tmp_path), device="cpu")
    np.testing.assert_allclose(loaded.encode_frames(frames), unmerged, atol=1e-5)
    assert loaded.weights_note == "a note"
    assert loaded.model_id.endswith("+finetuned")
    assert loaded.model_id.split("+")[0] != encoder.model_id


@pytest.mark.parametrize("name", NAMES)
def test_computing_blocks_twice_changes_no_gradient(name, frames):
    gradients = []
    for again in (False, True):
        module = load_encoder(name, device="cpu").module.train()
        rest(module)
        add_lora(module, 2, 2.0, seed=0)
        with torch.no_grad():
            for key, parameter in module.named_parameters():
                if key.endswith(".up"):
                    parameter.add_(0.01)
        if again:
            checkpoint_blocks(module)
        features(module, frames).square().sum().backward()
        gradients.append({key: p.grad for key, p in module.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) == 32
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value)


def test_depths_and_refusals():
    assert [vision_depth(name) for name in ("viclip-tiny", "viclip-b16", "viclip-l14", "clip-vit-l14")] == [
        4,
        12,
        24,
        24,
    ]
    assert vision_depth("open_clip:ViT-B-32") == 12
    for name in ("open_clip:RN50", "open_clip:EVA02-B-16", "open_clip:nothing", "timm:test_vit", "transformers:x"):
        with pytest.raises(ValueError, match=f"{name} cannot be fine-tuned here: only viclip"):
            vision_depth(name)
    with pytest.raises(ValueError, match="did you mean 'viclip-tiny'"):
        vision_depth("viclip-tin")
    module = load_encoder("viclip-tiny", device="cpu").module
    for num in (0, 5):
        with pytest.raises(ValueError, match=f"blocks must be 1 to 4, the depth of this vision tower; got {num}"):
            train_blocks(module, num)
    with pytest.raises(ValueError, match="no transformer blocks to fine-tune"):
        train_blocks(random_timm("test_vit", 0), 1)
