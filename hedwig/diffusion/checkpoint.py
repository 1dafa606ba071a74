"""Opening a Stable Diffusion checkpoint: its layout checked before anything is loaded, its keys checked after.

A checkpoint is a local folder in the official layout: model_index.json and the folders unet, vae, text_encoder,
tokenizer and scheduler. Every part is loaded as the one class that it must be, so nothing a folder says decides which
code runs; weights are safetensors or PyTorch archives that are read with ``weights_only=True``, never pickles. A key
that is missing, left over or of another shape is an error with its name: the libraries only log it, and go on with
random numbers. Which member of the family it is (text width, prediction type) is read, not assumed.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hedwig.models.weights import name_some
from hedwig.storage import is_remote, resolve

__all__ = ["Checkpoint", "Parts", "check_checkpoint", "library", "load_controlnet", "load_parts", "quiet"]

WEIGHTS = {
    "unet": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    "vae": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    "text_encoder": ("model.safetensors", "pytorch_model.bin"),
    "controlnet": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
}
CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
FAMILIES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2"}
PREDICTION_TYPES = ("epsilon", "v_prediction")


def library(name: str) -> Any:
    """Import diffusers, peft or transformers, which take seconds and which only the extra `synthesis` installs.

    Raises:
        ImportError: it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"Making panoramas by diffusion needs the package {name!r} ({error}); install the extra: "
            "pip install 'hedwig[synthesis]'"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no deprecation notes of diffusers, which a user of hedwig cannot act on."""
    library("diffusers").utils.logging.disable_progress_bar()
    library("transformers").utils.logging.disable_progress_bar()
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # its schedulers under numpy 2
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose layout is whole.

    Attributes:
        folder: local path.
        name: the folder's name, by which rows and manifests call the model.
        family: which Stable Diffusion, by the width of its text encoder.
        text_width: D of the text states that the denoiser attends to.
        prediction_type: 'epsilon' or 'v_prediction'.
        latent_channels: channels of the latents.
        scale: pixels per latent column and row.
        files: the weights and settings it consists of, relative to the folder.
    """

    folder: Path
    name: str
    family: str
    text_width: int
    prediction_type: str
    latent_channels: int
    scale: int
    files: tuple[str, ...]

    def digest(self) -> str:
        """sha256 over the contents of all its files; reads gigabytes."""
        total = hashlib.sha256()
        for name in self.files:
            with open(self.folder / name, "rb") as stream:
                total.update(f"{name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
        return total.hexdigest()


def check_checkpoint(folder: str | Path) -> Checkpoint:
    """Check the layout of a checkpoint folder without loading weights.

    Raises:
        FileNotFoundError: the folder, or a part of it, is not there; the message names what.
        ValueError: the parts do not belong together, or are of a kind that makes no panoramas.
    """
    if is_remote(str(folder)):
        raise ValueError(f"The model {str(folder)!r} must be a local folder; copy it to every machine first.")
    root = Path(resolve(str(folder)))
    if not root.is_dir():
        raise FileNotFoundError(f"No checkpoint folder at {str(root)!r}; give the folder that holds model_index.json.")
    if not (root / "model_index.json").is_file() and (root / "sd-base" / "model_index.json").is_file():
        raise ValueError(
            f"{str(root)!r} holds several checkpoints; name one of them, such as {str(root / 'sd-base')!r}."
        )
    index = _json(root, "model_index.json")
    for part, wanted in CLASSES.items():
        named = index.get(part)
        if not isinstance(named, list) or named[-1] != wanted:
            raise ValueError(
                f"{root.name}: model_index.json says that {part} is {named}; hedwig makes panoramas with a {wanted} "
                "(Stable Diffusion 1 or 2)."
            )
    unet, vae, text, scheduler = (
        _json(root, path) for path in
        ("unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json")
    )  # fmt: skip
    files = [_weights(root / part, part, root) for part in CLASSES]
    tokenizer = [n for n in ("vocab.json", "merges.txt", "tokenizer.json") if (root / "tokenizer" / n).is_file()]
    if "tokenizer.json" not in tokenizer and len(tokenizer) < 2:
        raise FileNotFoundError(f"{root.name} lacks tokenizer/vocab.json and tokenizer/merges.txt; fetch it again.")
    facts = _facts(root, unet, vae, text, scheduler)
    return Checkpoint(
        folder=root,
        name=root.name,
        family=FAMILIES.get(facts["text_width"], f"text width {facts['text_width']}"),
        **facts,
        files=(
            *files, *(f"tokenizer/{name}" for name in tokenizer),
            *(f"{part}/config.json" for part in CLASSES), "scheduler/scheduler_config.json",
        ),
    )  # fmt: skip


def _facts(
    root: Path, unet: dict[str, Any], vae: dict[str, Any], text: dict[str, Any], scheduler: dict[str, Any]
) -> dict[str, Any]:
    """The facts of a checkpoint that follow from its settings, after a check that the parts fit each other."""
    width, text_width = unet.get("cross_attention_dim"), text.get("hidden_size")
    if text_width is None or width != text_width:
        raise ValueError(
            f"{root.name}: the unet attends to text states of width {width} and the text encoder makes width "
            f"{text_width}; these parts are of two models (Stable Diffusion 1 has 768, 2 has 1024)."
        )
    channels = vae.get("latent_channels", 4)
    if unet.get("in_channels", 4) != channels:
        raise ValueError(
            f"{root.name}: the unet reads {unet.get('in_channels')} channels and the latents have {channels}; this is "
            "an inpainting or depth model. Use a text-to-image one."
        )
    prediction_type = scheduler.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"{root.name}: the scheduler's prediction_type is {prediction_type!r}, not one of {PREDICTION_TYPES}."
        )
    return {
        "text_width": int(text_width),
        "prediction_type": prediction_type,
        "latent_channels": int(channels),
        "scale": 2 ** (len(vae.get("block_out_channels", (1,) * 4)) - 1),
    }


def _json(root: Path, path: str) -> dict[str, Any]:
    if not (root / path).is_file():
        raise FileNotFoundError(f"{root.name} lacks {path}; a checkpoint has model_index.json and the folders "
                                "unet, vae, text_encoder, tokenizer and scheduler.")  # fmt: skip
    try:
        content = json.loads((root / path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{root.name}: {path} is not JSON ({error}); fetch it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{root.name}: {path} holds a {type(content).__name__}, expected an object.")
    return content


def _weights(folder: Path, part: str, root: Path) -> str:
    for name in WEIGHTS[part]:
        if (folder / name).is_file():
            return f"{part}/{name}" if folder != root else name
    raise FileNotFoundError(f"{root.name} lacks the weights of its {part}: {' or '.join(WEIGHTS[part])} in {part}/.")


@dataclass(frozen=True)
class Parts:
    """The loaded models of a checkpoint, all of them frozen and in evaluation mode."""

    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler_config: Any


def load_parts(checkpoint: Checkpoint, *, dtype: Any = None, device: Any = "cpu") -> Parts:
    """Load the models of a checkpoint.

    Args:
        checkpoint: what `check_checkpoint` found.
        dtype: of the weights; None for float32.
        device: where they go.

    Raises:
        ValueError: keys do not fit the model, or a weights file is damaged or holds more than tensors.
    """
    import torch

    diffusers, transformers = library("diffusers"), library("transformers")
    dtype = dtype or torch.float32
    modules = {"unet": diffusers, "vae": diffusers, "text_encoder": transformers}
    with quiet():
        loaded = {
            part: _load(getattr(modules[part], CLASSES[part]), checkpoint.folder / part, part, checkpoint.name, dtype)
            for part in CLASSES
        }
        tokenizer = transformers.CLIPTokenizer.from_pretrained(
            str(checkpoint.folder / "tokenizer"), local_files_only=True
        )
    for model in loaded.values():
        model.requires_grad_(False).eval().to(device)
    config = _json(checkpoint.folder, "scheduler/scheduler_config.json")
    return Parts(**loaded, tokenizer=tokenizer, scheduler_config=config)


def load_controlnet(folder: str | Path, *, text_width: int, dtype: Any = None, device: Any = "cpu") -> Any:
    """Load the ControlNet that turns one view into a panorama: it reads a mask and an image, 4 channels.

    Raises:
        FileNotFoundError: the folder or its weights are not there.
        ValueError: it is of another kind, or does not belong to the checkpoint.
    """
    import torch

    root = Path(resolve(str(folder)))
    if not root.is_dir():
        raise FileNotFoundError(
            f"No ControlNet folder at {str(root)!r}; it is the folder sd-i2p of the panorama model."
        )
    config = _json(root, "config.json")
    _weights(root, "controlnet", root)
    if config.get("conditioning_channels", 3) != 4 or config.get("cross_attention_dim") != text_width:
        raise ValueError(
            f"The ControlNet {root.name} reads {config.get('conditioning_channels', 3)} channels and text states of "
            f"width {config.get('cross_attention_dim')}; needed are 4 (mask and image) and {text_width}."
        )
    with quiet():
        model = _load(library("diffusers").ControlNetModel, root, "controlnet", root.name, dtype or torch.float32)
    return model.requires_grad_(False).eval().to(device)


def _load(kind: Any, folder: Path, part: str, name: str, dtype: Any) -> Any:
    """One model, with every key of it accounted for."""
    file = folder / Path(_weights(folder, part, folder)).name
    safe = file.suffix == ".safetensors"
    # `dtype` in transformers, `torch_dtype` in diffusers; both read a .bin with weights_only=True.
    precision = {"dtype" if part == "text_encoder" else "torch_dtype": dtype}
    try:
        model, report = kind.from_pretrained(
            str(folder), use_safetensors=safe, local_files_only=True, output_loading_info=True, **precision
        )
    except (OSError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{name}: {part}/{file.name} ({file.stat().st_size} bytes) could not be loaded as a {kind.__name__}: it is "
            "damaged, of another model, or holds pickled objects besides tensors, which are never loaded. "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from error
    problems = {
        "missing": sorted(report["missing_keys"]),
        "unexpected": sorted(report["unexpected_keys"]),
        "misshapen": sorted(str(item[0] if isinstance(item, tuple) else item) for item in report["mismatched_keys"]),
    }
    wrong = "; ".join(f"{len(keys)} {what}: {name_some(keys)}" for what, keys in problems.items() if keys)
    if wrong:
        raise ValueError(f"{name}: the weights in {part}/{file.name} do not fit its {kind.__name__}: {wrong}.")
    return model
