"""Fine-tuning the panorama model by low-rank adapters: where they sit, the loss, and the file they are kept in.

LoRA (Hu et al. 2021) on the attention projections of the denoiser, as the text-to-image example of diffusers trains it:
the checkpoint stays frozen, the adapters are float32 whatever its precision. The example squares its pictures; here a
panorama keeps its shape and is turned by a random angle each time, because no column of it is the first. The loop over
epochs and workers is in `hedwig.training.diffusion`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from hedwig.diffusion.checkpoint import library, quiet
from hedwig.storage import resolve

__all__ = [
    "LORA_FILE",
    "TARGETS",
    "add_lora",
    "denoising_loss",
    "load_lora",
    "lora_state",
    "min_snr_weights",
    "panorama_pixels",
    "restore_lora",
    "save_lora",
    "turned",
]

LORA_FILE = "pytorch_lora_weights.safetensors"
TARGETS = ("to_k", "to_q", "to_v", "to_out.0")


def add_lora(unet: Any, *, rank: int, alpha: float | None = None) -> list[Tensor]:
    """Put adapters on the attention projections of a frozen denoiser; they change nothing before they are trained.

    Args:
        unet: a UNet2DConditionModel, changed in place.
        rank: of each adapter.
        alpha: scale times rank; None for the rank, which is scale 1.

    Returns:
        The adapters' weights, float32, the only ones that take gradients.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}; it must be at least 1.")
    peft, training = library("peft"), library("diffusers.training_utils")
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha or rank, init_lora_weights="gaussian", target_modules=list(TARGETS)
    )
    unet.requires_grad_(False)
    with quiet():
        unet.add_adapter(config)
    training.cast_training_params(unet, dtype=torch.float32)
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


def lora_state(unet: Any) -> dict[str, Tensor]:
    """The adapters' weights by peft's names, on the CPU."""
    state = library("peft").utils.get_peft_model_state_dict(unet)
    return {key: value.detach().cpu().clone() for key, value in state.items()}


def restore_lora(unet: Any, state: dict[str, Tensor]) -> None:
    """Give the adapters of `add_lora` the weights of `lora_state`.

    Raises:
        ValueError: the weights are of other adapters.
    """
    own = lora_state(unet)
    if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in state.items()}:
        raise ValueError(f"The {len(state)} LoRA weights do not fit the {len(own)} adapters; was the rank another?")
    library("peft").utils.set_peft_model_state_dict(unet, state)


def save_lora(state: dict[str, Tensor], folder: str | Path) -> Path:
    """Write ``pytorch_lora_weights.safetensors`` as diffusers reads it; returns the file."""
    diffusers = library("diffusers")
    layers = diffusers.utils.convert_state_dict_to_diffusers(dict(state))
    Path(folder).mkdir(parents=True, exist_ok=True)
    with quiet():
        diffusers.StableDiffusionPipeline.save_lora_weights(str(folder), unet_lora_layers=layers)
    return Path(folder, LORA_FILE)


def load_lora(pipeline: Any, folder: str | Path, *, scale: float = 1.0) -> None:
    """Load adapters into a pipeline and fold them into its weights.

    Raises:
        FileNotFoundError: the folder has no ``pytorch_lora_weights.safetensors``; pickled files are not looked for.
        ValueError: the file is damaged or belongs to another model.
    """
    root = Path(resolve(str(folder)))
    if not (root / LORA_FILE).is_file():
        raise FileNotFoundError(f"No {LORA_FILE} in {str(root)!r}; make one with `hedwig train-lora`.")
    try:
        with quiet():
            pipeline.load_lora_weights(str(root), weight_name=LORA_FILE, use_safetensors=True, local_files_only=True)
            if not pipeline.get_active_adapters():
                raise ValueError("no adapter of this denoiser in the file")
            pipeline.fuse_lora(lora_scale=scale)
            pipeline.unload_lora_weights()
    except Exception as error:  # safetensors, peft and diffusers each raise their own
        raise ValueError(
            f"{str(root / LORA_FILE)!r} does not fit this checkpoint; was it trained on another? "
            f"({type(error).__name__}: {str(error).strip()[:300]})"
        ) from error


def min_snr_weights(alphas_cumprod: Tensor, timesteps: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """(B,) weights of the loss: ``min(SNR, gamma) / SNR``, or by ``SNR + 1`` for v (Hang et al. 2023, section 3.4).

    Args:
        alphas_cumprod: (T,) of the noise schedule.
        timesteps: (B,) int64.
        gamma: 5 in the paper.
        prediction_type: 'epsilon' or 'v_prediction'.
    """
    alpha = alphas_cumprod[timesteps].double()
    snr = alpha / (1 - alpha)
    by = snr if prediction_type == "epsilon" else snr + 1
    return (snr.clamp(max=gamma) / by).float()


def denoising_loss(
    unet: Any,
    scheduler: Any,
    latents: Tensor,
    states: Tensor,
    generator: torch.Generator,
    *,
    min_snr_gamma: float | None = None,
) -> Tensor:
    """Mean squared error of what the denoiser predicts of noised latents, a scalar.

    Args:
        unet: the denoiser, which may be wrapped for several workers.
        scheduler: a DDPMScheduler with the checkpoint's settings; its prediction_type decides the target.
        latents: (B, C, h, w) scaled.
        states: (B, L, D) of the text encoder.
        generator: on the CPU: of noise and time.
        min_snr_gamma: None weighs all noise levels alike.

    Raises:
        ValueError: an unknown prediction_type.
    """
    device, kind = latents.device, scheduler.config.prediction_type
    noise = torch.randn(latents.shape, generator=generator).to(device, latents.dtype)
    num_steps = int(scheduler.config.num_train_timesteps)
    timesteps = torch.randint(num_steps, (len(latents),), generator=generator).to(device)
    if kind == "epsilon":
        target = noise
    elif kind == "v_prediction":
        target = scheduler.get_velocity(latents, noise, timesteps)
    else:
        raise ValueError(f"prediction_type is {kind!r}; 'epsilon' and 'v_prediction' can be trained.")
    noised = scheduler.add_noise(latents, noise, timesteps)
    predicted = unet(noised, timesteps, encoder_hidden_states=states, return_dict=False)[0]
    losses = F.mse_loss(predicted.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
    if min_snr_gamma is not None:
        losses = losses * min_snr_weights(scheduler.alphas_cumprod.to(device), timesteps, min_snr_gamma, kind)
    return losses.mean()


def panorama_pixels(image: NDArray[np.uint8], height_px: int) -> Tensor:
    """(H, W, 3) uint8 -> (3, height_px, 2 height_px), -1 to 1, stretched to that shape."""
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
    size = (height_px, 2 * height_px)
    resized = F.interpolate(pixels, size=size, mode="bicubic", antialias=True, align_corners=False)
    return resized[0].clamp(0, 255) / 127.5 - 1


def turned(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """(..., W) rolled by a random number of columns: the same panorama, seen from another heading."""
    return torch.roll(pixels, int(torch.randint(pixels.shape[-1], (1,), generator=generator)), dims=-1)
