"""Models of transformers as image towers, from a local folder: SigLIP 2, DINOv2 and v3, CLIP and its descendants.

The folder is what a model repository holds: config.json, model.safetensors, preprocessor_config.json (or
processor_config.json) and, where the model reads text, its tokenizer. The model's own configuration decides size and
normalisation; nothing is guessed, and code in the folder is never run. Loading is strict, though transformers itself
is content with weights that it makes up. Features are those that the model pools: its projected image features if it
has a text tower, else its pooled output.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hedwig.models.towers import ImageTower
from hedwig.models.weights import check_sha256, name_some, read_metadata, weights_file

__all__ = ["TransformersTower", "load_transformers", "transformers_sizes"]

NAFLEX = "siglip2"  # the variable-resolution model; the SigLIP 2 of fixed resolution is of type "siglip"


class Sizes(NamedTuple):
    """Of a model in a folder: frame side in px, dimensions of images and of texts (None: it reads no text)."""

    frame_px: int
    image_dim: int
    text_dim: int | None


class TransformersTower(ImageTower):
    """A model of transformers applied to each frame.

    Args:
        model: the `PreTrainedModel`.
        sizes: of `model`.
        mean: see `ImageTower`.
        std: see `ImageTower`.
        tokeniser: its tokenizer; None if it reads no text.
    """

    def __init__(
        self, model: nn.Module, *, sizes: Sizes, mean: Sequence[float], std: Sequence[float], tokeniser: Any
    ) -> None:
        super().__init__(
            model,
            frame_px=sizes.frame_px,
            image_dim=sizes.image_dim,
            mean=mean,
            std=std,
            text_dim=sizes.text_dim,
        )
        self.tokeniser = tokeniser
        self.context_length = int(self.model.config.text_config.max_position_embeddings) if self.has_text else 0

    def image_features(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) normalised images to (N, D)."""
        inputs = self._naflex(images) if self.model.config.model_type == NAFLEX else {"pixel_values": images}
        out = self.model.get_image_features(**inputs) if self.has_text else self.model(**inputs)
        return _pooled(out, self.image_dim)

    def _naflex(self, images: Tensor) -> dict[str, Tensor]:
        """Patches (N, P, p·p·3), each row by row with the channel fastest, and their grid: the model's own format."""
        patch = int(self.model.config.vision_config.patch_size)
        side = self.frame_px // patch
        grid = images.reshape(len(images), 3, side, patch, side, patch).permute(0, 2, 4, 3, 5, 1)
        return {
            "pixel_values": grid.reshape(len(images), side * side, -1),
            "pixel_attention_mask": torch.ones(len(images), side * side, dtype=torch.int32, device=images.device),
            "spatial_shapes": torch.full((len(images), 2), side, dtype=torch.int64, device=images.device),
        }

    def text_features(self, ids: Tensor) -> Tensor:
        """(B, L) token ids to (B, text_dim), not normalised, with gradients."""
        if not self.has_text:
            return super().text_features(ids)
        ids = ids.to(self.model.device)
        # SigLIP was trained with its padding in sight; CLIP pads with its end token, which no earlier token can see.
        padding = None if self._is_siglip() else self.tokeniser.pad_token_id
        hidden = {} if padding in (None, self.tokeniser.eos_token_id) else {"attention_mask": (ids != padding).long()}
        return _pooled(self.model.get_text_features(input_ids=ids, **hidden), self.text_dim)

    def _is_siglip(self) -> bool:
        return str(self.model.config.model_type).startswith("siglip")

    def tokenise(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids (B, L) int64 of captions by the model's own tokenizer, and whether each was cut, (B,) bool."""
        if not self.has_text:
            return super().tokenise(texts)
        length = self.context_length
        whole = self.tokeniser(list(texts))["input_ids"]
        ids = self.tokeniser(
            list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )["input_ids"]
        return ids, torch.tensor([len(tokens) > length for tokens in whole], dtype=torch.bool)


def _pooled(out: Any, dim: int) -> Tensor:
    features = out if isinstance(out, Tensor) else getattr(out, "pooler_output", None)
    if features is None:
        raise ValueError("This model pools no features; choose one that does, for instance CLIP, SigLIP or DINOv2.")
    features = features.flatten(1)  # convolutional networks keep a map of 1 x 1
    if features.shape[1] != dim:
        raise ValueError(f"This model gives {features.shape[1]} features, its configuration promises {dim}.")
    return features


def load_transformers(folder: str | Path, *, sha256: str | None = None) -> TransformersTower:
    """A model of transformers in evaluation mode, float32, strictly from a local folder.

    Args:
        folder: holds config.json, model.safetensors, preprocessor_config.json and, for text, tokenizer files.
        sha256: what the SHA-256 of model.safetensors must be; None checks nothing.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: weights that do not fit the configuration; a model without pooled features, or whose
            configuration is not one that transformers knows.
    """
    from transformers import AutoModel, AutoTokenizer

    folder = Path(folder)
    file = weights_file(folder)
    config, sizes = _config(folder), transformers_sizes(folder)
    mean, std = _normalisation(folder)
    if sha256 is not None:
        check_sha256(file, sha256)
    read_metadata(file)  # says so if the file is truncated
    try:
        model, report = AutoModel.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that the report below can name them
            dtype=torch.float32,
        )
    except (RuntimeError, OSError) as error:
        raise ValueError(f"The weights {str(file)!r} do not fit their config.json: {error}") from error
    problems = [
        f"{len(keys)} {kind}: {name_some(sorted(map(str, keys)))}"
        for kind, keys in (
            ("missing", report["missing_keys"]),
            ("unexpected", report["unexpected_keys"]),
            ("misshapen", report["mismatched_keys"]),
            ("unreadable", report["error_msgs"]),
        )
        if keys
    ]
    if problems:
        raise ValueError(f"The weights {str(file)!r} do not fit {type(model).__name__}: {'; '.join(problems)}.")
    tokeniser = None
    if sizes.text_dim is not None:
        if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "vocab.txt")):
            raise FileNotFoundError(f"{str(folder)!r} holds a model that reads text, and no tokenizer.json.")
        tokeniser = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return TransformersTower(model, sizes=sizes, mean=mean, std=std, tokeniser=tokeniser).eval()


def transformers_sizes(folder: str | Path) -> Sizes:
    """The sizes of the model in a folder, from its configuration alone."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    config = _config(Path(folder))
    if type(config) not in MODEL_MAPPING:
        raise ValueError(f"transformers has no plain model of type {config.model_type!r} (in {str(folder)!r}).")
    reads_text = hasattr(MODEL_MAPPING[type(config)], "get_text_features")
    vision = config.vision_config if reads_text else config
    frame_px = _frame_px(Path(folder), config, vision)
    projected = getattr(config, "projection_dim", None) if reads_text else None
    if projected is not None:
        return Sizes(frame_px, int(projected), int(projected))
    hidden = getattr(vision, "hidden_size", None) or (getattr(vision, "hidden_sizes", None) or [None])[-1]
    if hidden is None:
        raise ValueError(f"The config.json in {str(folder)!r} does not tell the dimension of image features.")
    if not reads_text:
        return Sizes(frame_px, int(hidden), None)
    text = config.text_config
    return Sizes(frame_px, int(hidden), int(getattr(text, "projection_size", None) or text.hidden_size))


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"No config.json in {str(folder)!r}; pass the folder of a model of transformers.")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"transformers does not know the model in {str(folder)!r} without running code from that folder, which "
            f"is never done. ({str(error).splitlines()[0]})"
        ) from error


def _preprocessing(folder: Path) -> dict[str, Any]:
    for name, entry in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        file = folder / name
        if file.is_file():
            content = json.loads(file.read_text(encoding="utf-8"))
            found = content if entry is None else content.get(entry)
            if found:
                return dict(found)
    raise FileNotFoundError(
        f"No preprocessor_config.json in {str(folder)!r}: without the normalisation of the model's own training its "
        f"features would be wrong. Copy it from where the model is published."
    )


def _normalisation(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    settings = _preprocessing(folder)
    if abs(settings.get("rescale_factor", 1 / 255) * 255 - 1) > 0.01 or not settings.get("do_rescale", True):
        raise ValueError(f"The preprocessing in {str(folder)!r} does not scale pixels to 0..1; that is not supported.")
    if not settings.get("do_normalize", True):
        return (0.0,) * 3, (1.0,) * 3
    if "image_mean" not in settings or "image_std" not in settings:
        raise ValueError(f"The preprocessing in {str(folder)!r} names no image_mean and image_std; add them.")
    return tuple(settings["image_mean"]), tuple(settings["image_std"])


def _frame_px(folder: Path, config: Any, vision: Any) -> int:
    """The side of the images that the model's own preprocessing makes: a DINOv2 of 518 px is fed 224."""
    if config.model_type == NAFLEX:
        return isqrt(vision.num_patches) * int(vision.patch_size)
    settings = _preprocessing(folder)
    cropped = settings.get("do_center_crop", False) and settings.get("crop_size")
    size = cropped or settings.get("size") or vision.image_size
    if isinstance(size, dict):
        size = (size.get("height") or size.get("shortest_edge"), size.get("width") or size.get("shortest_edge"))
    height, width = (size, size) if isinstance(size, int) else size
    if not height or height != width:
        raise ValueError(f"The model in {str(folder)!r} takes images of {height} x {width} px, and frames are square.")
    return int(height)
