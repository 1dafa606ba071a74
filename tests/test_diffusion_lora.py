"""LoRA: adapters that start as nothing, a loss that is what the formulas say, and a file that loads back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_diffusion import write_checkpoint

from hedwig.diffusion import PanoramaGenerator, check_checkpoint
from hedwig.diffusion.checkpoint import load_parts
from hedwig.diffusion.lora import (
    LORA_FILE,
    add_lora,
    denoising_loss,
    lora_state,
    min_snr_weights,
    panorama_pixels,
    restore_lora,
    save_lora,
    turned,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny-sd")


def scheduler(parts, **changes):
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_config({**dict(parts.scheduler_config), **changes})


def rows(parts, num: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(5)
    return torch.randn(num, 4, 8, 16, generator=random), torch.randn(num, 77, 32, generator=random)


def test_adapters_begin_as_nothing_and_learn_while_the_model_stays(checkpoint):
    parts = load_parts(check_checkpoint(checkpoint))
    latents, states = rows(parts)
    time = torch.tensor([10, 500])
    before = parts.unet(latents, time, encoder_hidden_states=states).sample
    frozen = {key: value.clone() for key, value in parts.unet.state_dict().items()}
    parameters = add_lora(parts.unet, rank=2)
    assert sum(p.numel() for p in parameters) < 0.25 * sum(v.numel() for v in frozen.values())
    assert torch.allclose(parts.unet(latents, time, encoder_hidden_states=states).sample, before, atol=1e-6)
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = denoising_loss(
            parts.unet, scheduler(parts), latents, states, torch.Generator().manual_seed(0), min_snr_gamma=5.0
        )
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = parts.unet.state_dict()
    for key, value in frozen.items():
        layer, leaf = key.rsplit(".", 1)
        assert torch.equal(after[key if key in after else f"{layer}.base_layer.{leaf}"], value)
    assert {key.split(".lora_")[0].rsplit(".", 1)[-1] for key in lora_state(parts.unet)} == {
        "to_k", "to_q", "to_v", "0",
    }  # fmt: skip
    with pytest.raises(ValueError, match="rank is 0"):
        add_lora(parts.unet, rank=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_is_the_weighted_error_of_the_target(checkpoint, prediction_type):
    parts = load_parts(check_checkpoint(checkpoint))
    schedule = scheduler(parts, prediction_type=prediction_type)
    latents, states = rows(parts, 3)
    seen = {}

    def unet(noised, timesteps, *, encoder_hidden_states, return_dict):
        seen.update(noised=noised, t=timesteps)
        assert encoder_hidden_states is states
        return (torch.zeros_like(noised),)

    got = denoising_loss(unet, schedule, latents, states, torch.Generator().manual_seed(3), min_snr_gamma=0.05)
    random = torch.Generator().manual_seed(3)
    noise = torch.randn(latents.shape, generator=random)
    t = torch.randint(1000, (3,), generator=random)
    assert torch.equal(seen["t"], t)
    total = 0.0
    for row in range(3):  # by hand, one row at a time, in float64
        alpha = float(schedule.alphas_cumprod[t[row]])
        signal, spread = alpha**0.5, (1 - alpha) ** 0.5
        x, e = latents[row].double(), noise[row].double()
        assert torch.allclose(seen["noised"][row].double(), signal * x + spread * e, atol=1e-5)
        target = e if prediction_type == "epsilon" else signal * e - spread * x
        snr = alpha / (1 - alpha)
        weight = min(snr, 0.05) / (snr if prediction_type == "epsilon" else snr + 1)
        total += weight * float((target**2).mean())
    assert got.item() == pytest.approx(total / 3, rel=1e-4)
    plain = denoising_loss(unet, schedule, latents, states, torch.Generator().manual_seed(3))
    assert plain.item() != pytest.approx(got.item(), rel=1e-3)
    with pytest.raises(ValueError, match="prediction_type is 'sample'"):
        denoising_loss(unet, scheduler(parts, prediction_type="sample"), latents, states, torch.Generator())


def test_min_snr_weighs_clean_steps_down():
    alphas = torch.tensor([0.999, 0.5, 0.01])
    steps = torch.arange(3)
    assert min_snr_weights(alphas, steps, 5.0, "epsilon").tolist() == pytest.approx([5 / 999, 1.0, 1.0], rel=1e-4)
    snr = 0.01 / 0.99
    assert min_snr_weights(alphas, steps, 5.0, "v_prediction").tolist() == pytest.approx(
        [5 / 1000, 0.5, snr / (snr + 1)], rel=1e-4
    )


def test_the_saved_file_loads_back_and_changes_the_pictures(checkpoint, tmp_path):
    parts = load_parts(check_checkpoint(checkpoint))
    torch.manual_seed(0)
    add_lora(parts.unet, rank=2)
    nothing = lora_state(parts.unet)
    state = {key: value + 0.5 * torch.randn(value.shape) for key, value in nothing.items()}
    file = save_lora(state, tmp_path / "lora")
    assert file.name == LORA_FILE
    assert all(key.startswith("unet.") for key in load_file(file))
    save_lora(nothing, tmp_path / "nothing")

    # The fused weights make what the adapters made.
    restore_lora(parts.unet, state)
    latents, states = rows(parts)
    with torch.no_grad():
        wanted = parts.unet(latents, 300, encoder_hidden_states=states).sample
    options = {"model": str(checkpoint), "num_steps": 2, "height_px": 64, "device": "cpu", "image_format": "png"}
    generator = PanoramaGenerator(lora=str(tmp_path / "lora"), **options)
    with torch.no_grad():
        got = generator._pipeline.unet(latents, 300, encoder_hidden_states=states).sample
    assert torch.allclose(got, wanted, atol=1e-4)

    batch = {"pano_id": np.array(["a"], dtype=object), "caption": np.array(["red sea"], dtype=object)}
    pictures = {
        name: PanoramaGenerator(**extra, **options)(batch)["image_bytes"][0]
        for name, extra in {
            "plain": {},
            "nothing": {"lora": str(tmp_path / "nothing")},
            "trained": {"lora": str(tmp_path / "lora")},
            "scale 0": {"lora": str(tmp_path / "lora"), "lora_scale": 0.0},
        }.items()
    }
    assert pictures["nothing"] == pictures["plain"] == pictures["scale 0"]
    assert pictures["trained"] != pictures["plain"]


def test_a_lora_that_does_not_fit_is_refused_by_name(checkpoint, tmp_path):
    options = {"model": str(checkpoint), "num_steps": 2, "height_px": 64, "device": "cpu"}
    with pytest.raises(FileNotFoundError, match=LORA_FILE):
        PanoramaGenerator(lora=str(tmp_path), **options)
    (tmp_path / "pytorch_lora_weights.bin").write_bytes(b"")  # a pickle is not looked for
    with pytest.raises(FileNotFoundError, match=LORA_FILE):
        PanoramaGenerator(lora=str(tmp_path), **options)
    parts = load_parts(check_checkpoint(checkpoint))
    add_lora(parts.unet, rank=2)
    state = lora_state(parts.unet)
    with pytest.raises(ValueError, match="was the rank another"):
        restore_lora(parts.unet, {key: value[:1] for key, value in state.items()})
    wide = {key: torch.zeros(2, 320) if "lora_A" in key else torch.zeros(320, 2) for key in state}
    save_lora(wide, tmp_path)
    with pytest.raises(ValueError, match="does not fit this checkpoint"):
        PanoramaGenerator(lora=str(tmp_path), **options)
    save_file({"something.else": torch.zeros(1)}, tmp_path / LORA_FILE)
    with pytest.raises(ValueError, match="does not fit this checkpoint"):
        PanoramaGenerator(lora=str(tmp_path), **options)
    (tmp_path / LORA_FILE).write_bytes(b"cut off")
    with pytest.raises(ValueError, match="does not fit this checkpoint"):
        PanoramaGenerator(lora=str(tmp_path), **options)


def test_panoramas_keep_their_shape_and_are_turned():
    image = np.zeros((60, 200, 3), dtype=np.uint8)
    image[:, :50] = 255
    picture = panorama_pixels(image, 64)
    assert picture.shape == (3, 64, 128)
    assert picture[:, :, :30].min() == pytest.approx(1.0)
    assert picture[:, :, 34:].max() == pytest.approx(-1.0)
    places = set()
    for seed in range(20):
        out = turned(picture, torch.Generator().manual_seed(seed))
        shift = next(k for k in range(128) if torch.equal(torch.roll(picture, k, -1), out))
        places.add(shift)
    assert len(places) > 15
