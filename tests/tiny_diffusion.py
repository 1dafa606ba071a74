"""A Stable Diffusion of a few thousand random weights in the official folder layout, for the tests of synthesis."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

WORDS = (
    "<360panorama>", "photorealistic", "trend", "on", "artstation", "best", "quality", "ultra", "high", "res", "a",
    "quiet", "street", "with", "trees", "and", "houses", "by", "the", "sea", "blur", "logo", "text", "red", "blue",
)  # fmt: skip


UNET: dict[str, Any] = {
    "in_channels": 4, "layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": 32, "attention_head_dim": 4,
}  # fmt: skip


def write_tokenizer(folder: Path, *, max_length: int = 77) -> None:
    """CLIP's byte-level BPE with single letters and merges that make each word of WORDS one token."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    vocab = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        if not word.isalpha():
            continue
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            if pair not in merges:
                merges.append(pair)
            if "".join(pair) not in vocab:
                vocab.append("".join(pair))
            pieces = ["".join(pair), *pieces[2:]]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "CLIPTokenizer",
                "model_max_length": max_length,
                "bos_token": "<|startoftext|>",
                "eos_token": "<|endoftext|>",
                "unk_token": "<|endoftext|>",
                "pad_token": "<|endoftext|>",
                "do_lower_case": True,
            }
        )
    )


def tiny_vae(seed: int = 0) -> Any:
    """An AutoencoderKL that makes 8 x 8 pixels of a latent, as the real one does."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, layers_per_block=1, latent_channels=4, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).eval()  # fmt: skip


def write_checkpoint(folder: Path, *, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """Write the checkpoint; returns `folder`."""
    from diffusers import PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    write_tokenizer(folder / "tokenizer")
    num_tokens = len(json.loads((folder / "tokenizer" / "vocab.json").read_text()))
    text = CLIPTextConfig(
        vocab_size=num_tokens, hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=77, bos_token_id=num_tokens - 2, eos_token_id=num_tokens - 1,
        pad_token_id=num_tokens - 1,
    )  # fmt: skip
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    UNet2DConditionModel(**UNET, out_channels=4, up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), sample_size=64
                         ).save_pretrained(folder / "unet")  # fmt: skip
    tiny_vae(seed).save_pretrained(folder / "vae")
    PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1,
        set_alpha_to_one=False, prediction_type=prediction_type,
    ).save_pretrained(folder / "scheduler")  # fmt: skip
    index = {
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.20.0",
        "feature_extractor": [None, None], "safety_checker": [None, None], "requires_safety_checker": False,
        "scheduler": ["diffusers", "PNDMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_controlnet(folder: Path, *, channels: int = 4, seed: int = 1) -> Path:
    """Write a ControlNet for the checkpoint, of which every weight is random: a new one would change nothing."""
    from diffusers import ControlNetModel

    torch.manual_seed(seed)
    net = ControlNetModel(**UNET, conditioning_channels=channels, conditioning_embedding_out_channels=(4, 4, 8, 8))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    net.save_pretrained(folder)
    return folder
