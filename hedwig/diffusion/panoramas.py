"""The stage that makes panoramas: a caption, or a caption and a view, into a seamless equirectangular image.

The models run through the stock pipelines of diffusers; what makes the picture close on itself is in
`hedwig.diffusion.circular` and needs no change to them. A row's random numbers come from its own id and the seed, so it
gets the same panorama (to rounding) in any batch, on any worker, and after a restart. There is no safety checker: the
captions are descriptions of streets, and the negative prompt excludes persons. Upscaling is not done here; the frames
that the encoders see are smaller than what these models draw.
"""

from __future__ import annotations

import hashlib
import io
import logging
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hedwig.diffusion.checkpoint import check_checkpoint, library, load_controlnet, load_parts, quiet
from hedwig.diffusion.circular import (
    CircularBlend,
    circular_decode,
    close_wrap,
    extend_wrap,
    num_extra_columns,
    seam_step,
)
from hedwig.diffusion.prompts import PromptEncoder, PromptTemplate
from hedwig.diffusion.view import view_condition

__all__ = ["PanoramaGenerator", "row_seed"]

logger = logging.getLogger(__name__)
Batch = dict[str, NDArray[Any]]
FORMATS = ("jpeg", "png")


def row_seed(pano_id: str, seed: int) -> int:
    """The seed of a row's random numbers, below 2^63; close ids and seeds give unrelated numbers."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{pano_id}".encode()).digest()[:8], "big") >> 1


class PanoramaGenerator:
    """Write `image_bytes` (a panorama twice as wide as high), and how it was made, from `caption`.

    With a ControlNet the first of each row's `frames` (B, V, S, S, 3) uint8 is the view in the middle of the panorama.
    A row without a caption, or whose panorama is not finite, gets a reason in `failure`.

    Args:
        model: folder of the checkpoint.
        controlnet: folder of the image-to-panorama ControlNet; None makes panoramas from captions alone.
        lora: folder with ``pytorch_lora_weights.safetensors``.
        lora_scale: strength of the LoRA.
        template: words around the captions; None for those of the panorama model.
        height_px: H, a multiple of 64.
        num_steps: denoising steps.
        guidance: classifier-free guidance; 1 for none.
        controlnet_scale: strength of the view.
        view_fov_deg: field of view of the frames.
        circular: False leaves out all that closes the wrap, to see what it is for.
        image_format: 'jpeg' or 'png'.
        quality: of a JPEG.
        seed: another seed makes other panoramas.
        device: 'auto', 'cpu' or 'cuda'.
        dtype: 'auto' (float16 on a GPU), 'float32', 'float16' or 'bfloat16'.

    Raises:
        ImportError: the extra `synthesis` is not installed.
        FileNotFoundError: a folder, or a part of a checkpoint, is not there.
        ValueError: a setting is out of its range, or a checkpoint does not fit.
    """

    reads = ("pano_id", "caption")
    reads_if_there = ("frames",)
    writes = ("image_bytes", "seam_ratio", "seed", "prompt", "num_words_cut")

    def __init__(
        self,
        *,
        model: str,
        controlnet: str | None = None,
        lora: str | None = None,
        lora_scale: float = 1.0,
        template: PromptTemplate | None = None,
        height_px: int = 512,
        num_steps: int = 20,
        guidance: float = 7.5,
        controlnet_scale: float = 1.0,
        view_fov_deg: float = 90.0,
        circular: bool = True,
        image_format: str = "jpeg",
        quality: int = 95,
        seed: int = 0,
        device: str = "auto",
        dtype: str = "auto",
    ) -> None:
        for name, value, good in (
            ("height_px", height_px, height_px >= 64 and height_px % 64 == 0),
            ("num_steps", num_steps, num_steps >= 1),
            ("guidance", guidance, guidance >= 1),
            ("image_format", image_format, image_format in FORMATS),
            ("quality", quality, 1 <= quality <= 100),
            ("dtype", dtype, dtype in ("auto", "float32", "float16", "bfloat16")),
        ):
            if not good:
                raise ValueError(f"{name} is out of range: {value!r}.")
        self.height_px, self.num_steps, self.guidance = height_px, num_steps, guidance
        self.controlnet_scale, self.view_fov_deg, self.circular = controlnet_scale, view_fov_deg, circular
        self.image_format, self.quality, self.seed = image_format, quality, seed
        self.checkpoint = check_checkpoint(model)
        self._device = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
        fast = torch.float16 if self._device.type == "cuda" else torch.float32
        precision: torch.dtype = fast if dtype == "auto" else getattr(torch, dtype)
        self._pipeline, self._prompts = self._open(controlnet, lora, lora_scale, template, precision)
        with torch.inference_mode():
            self._negative = self._prompts.encode_negative()

    def _open(
        self,
        controlnet: str | None,
        lora: str | None,
        lora_scale: float,
        template: PromptTemplate | None,
        precision: torch.dtype,
    ) -> tuple[Any, PromptEncoder]:
        diffusers = library("diffusers")
        parts = load_parts(self.checkpoint, dtype=precision, device=self._device)
        prompts = PromptEncoder(parts.tokenizer, parts.text_encoder, template or PromptTemplate())
        models: dict[str, Any] = {
            "vae": parts.vae,
            "text_encoder": parts.text_encoder,
            "tokenizer": parts.tokenizer,
            "unet": parts.unet,
        }
        kind = diffusers.StableDiffusionPipeline
        if controlnet is not None:
            kind = diffusers.StableDiffusionControlNetPipeline
            models["controlnet"] = load_controlnet(
                controlnet, text_width=self.checkpoint.text_width, dtype=precision, device=self._device
            )
        with quiet():
            pipeline = kind(
                **models,
                scheduler=diffusers.EulerAncestralDiscreteScheduler.from_config(dict(parts.scheduler_config)),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
            if lora is not None:
                from hedwig.diffusion.lora import load_lora

                load_lora(pipeline, lora, scale=lora_scale)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline, prompts

    def __call__(self, batch: Batch) -> Batch:
        """Add the columns of `writes` and `failure` (B,); captions that were cut are also said in the log."""
        size = len(batch["pano_id"])
        columns: Batch = {
            "image_bytes": np.full(size, None, dtype=object),
            "seam_ratio": np.full(size, np.nan),
            "seed": np.array([row_seed(str(i), self.seed) for i in batch["pano_id"]], dtype=np.int64),
            "prompt": np.full(size, None, dtype=object),
            "num_words_cut": np.zeros(size, dtype=np.int32),
            "failure": np.full(size, None, dtype=object),
        }
        prompts: dict[int, Any] = {}
        for row, caption in enumerate(batch["caption"]):
            try:
                prompts[row] = self._prompts.fit("" if caption is None else str(caption))
            except ValueError as error:
                columns["failure"][row] = str(error)
        if prompts:
            self._make(batch, prompts, columns)
        return {**batch, **columns}

    def _make(self, batch: Batch, prompts: dict[int, Any], columns: Batch) -> None:
        rows = list(prompts)
        views = None
        if self._has_controlnet:
            if "frames" not in batch:
                raise ValueError("With a ControlNet each row needs frames; put a PanoramaSlicer before this stage.")
            views = np.stack([np.asarray(batch["frames"][row][0]) for row in rows])
        images, finite = self.generate(list(prompts.values()), [int(columns["seed"][row]) for row in rows], views)
        for row, image, good in zip(rows, images, finite, strict=True):
            prompt = prompts[row]
            columns["prompt"][row], columns["num_words_cut"][row] = prompt.text, prompt.num_words_cut
            if not good:
                columns["failure"][row] = "the panorama is not finite: use dtype float32 or bfloat16"
                continue
            columns["image_bytes"][row] = self._encoded(image)
            columns["seam_ratio"][row] = seam_step(image).ratio
        cut = [prompt.num_words_cut for prompt in prompts.values() if prompt.num_words_cut]
        if cut:
            logger.info("%d of %d captions were longer than the prompt; cut by %d words", len(cut), len(rows), sum(cut))

    @property
    def _has_controlnet(self) -> bool:
        return "controlnet" in self._pipeline.components

    def generate(
        self, prompts: list[Any], seeds: list[int], views: NDArray[np.uint8] | None = None
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Make one panorama per prompt.

        Args:
            prompts: (B,) of `hedwig.diffusion.prompts.Prompt`.
            seeds: (B,) seeds of their random numbers.
            views: (B, S, S, 3) uint8, with a ControlNet.

        Returns:
            (B, H, 2 H, 3) uint8, and (B,) whether each is finite.
        """
        # On the CPU, so that every device starts from the same noise.
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        extra = num_extra_columns(self._latent_width) if self.circular else 0
        with torch.inference_mode(), quiet():
            arguments = self._arguments(views, generators, extra)
            latents: Tensor = self._pipeline(
                prompt_embeds=self._prompts.encode(prompts),
                negative_prompt_embeds=self._negative.expand(len(prompts), -1, -1),
                num_inference_steps=self.num_steps,
                guidance_scale=self.guidance,
                generator=generators,
                output_type="latent",
                callback_on_step_end=CircularBlend(extra) if extra else None,
                **arguments,
            ).images
            vae = self._pipeline.vae
            if extra:
                decoded = circular_decode(vae, close_wrap(latents, extra))
            else:
                decoded = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0].float()
        finite = torch.isfinite(decoded).all(dim=(1, 2, 3)).cpu().numpy()
        pixels = ((decoded / 2 + 0.5).clamp(0, 1).nan_to_num() * 255).round().to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy(), finite

    @property
    def _latent_width(self) -> int:
        return 2 * self.height_px // self.checkpoint.scale

    def _arguments(
        self, views: NDArray[np.uint8] | None, generators: list[torch.Generator], extra: int
    ) -> dict[str, Any]:
        """What differs between the two pipelines: the size, the first noise, and the condition."""
        scale, dtype = self.checkpoint.scale, self._pipeline.unet.dtype
        shape = (1, self.checkpoint.latent_channels, self.height_px // scale, self._latent_width)
        noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators]).to(self._device)
        if views is None:
            width = 2 * self.height_px + extra * scale
            return {"height": self.height_px, "width": width, "latents": _wider(noise, extra).to(dtype)}
        condition = view_condition(views, self.height_px, fov_deg=self.view_fov_deg).to(self._device)
        # The published pipeline is image-to-image of strength 1: it starts at the noised condition, not at noise alone.
        vae, scheduler = self._pipeline.vae, self._pipeline.scheduler
        scheduler.set_timesteps(self.num_steps, device=self._device)
        drawn = vae.encode((condition[:, 1:] * 2 - 1).to(vae.dtype)).latent_dist.mode() * vae.config.scaling_factor
        noise = noise + drawn.float() / float(scheduler.init_noise_sigma)
        return {
            "latents": _wider(noise, extra).to(dtype),
            "image": _wider(condition, extra * scale).to(dtype),
            "controlnet_conditioning_scale": self.controlnet_scale,
        }

    def _encoded(self, image: NDArray[np.uint8]) -> bytes:
        from PIL import Image

        stream = io.BytesIO()
        options: dict[str, Any] = {"quality": self.quality, "subsampling": 0} if self.image_format == "jpeg" else {}
        Image.fromarray(image).save(stream, self.image_format, **options)
        return stream.getvalue()


def _wider(values: Tensor, extra: int) -> Tensor:
    return extend_wrap(values, extra) if extra else values
