"""What a weights file holds, told by its keys: the architecture, its sizes, its digests, and whether it would load.

Loading is tried on the meta device, where a model has shapes and no memory, so the answer costs no more than reading
the file. Every key that is missing, unexpected or of another shape is named. A folder of `transformers` is described
by its config.json and its headers; whether that library would load it is not tried here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from hedwig.models.catalogue import CATALOGUE
from hedwig.models.clip import NOT_WEIGHTS, known_quick_gelu, open_clip_card
from hedwig.models.fetched import file_sha256
from hedwig.models.geolocator import Geolocator, GeolocatorConfig
from hedwig.models.shapes import shapes_only
from hedwig.models.viclip import B16, L14, TINY, ViCLIP, load_viclip
from hedwig.models.weights import read_state_dict, weights_digest, weights_file

__all__ = ["Identity", "identify"]

Shapes = dict[str, tuple[int, ...]]

VICLIPS = {"viclip-l14": L14, "viclip-b16": B16, "viclip-tiny": TINY}
# (width, patch in px, positions) of a vision tower: the architecture of open_clip with these sizes
OPEN_CLIPS = {
    (1024, 14, 257): "ViT-L-14",
    (1024, 14, 577): "ViT-L-14-336",
    (768, 16, 197): "ViT-B-16",
    (768, 32, 50): "ViT-B-32",
}
ACTIVATION_UNKNOWN = ", activation not in the file"


@dataclass(frozen=True)
class Identity:
    """What was found.

    Attributes:
        path: what was looked at.
        architecture: viclip-l14, viclip-b16, viclip-tiny, viclip, open_clip:ARCH, open_clip, geolocator,
            transformers:MODEL_TYPE, or unknown. Where GELU and QuickGELU share an ARCH's keys and nothing tells
            which one the weights were trained with, ", activation not in the file" follows.
        num_keys: tensors.
        num_parameters: numbers in them.
        dims: sizes by name, as far as the architecture has them.
        dtypes: number of tensors by dtype.
        size_bytes: of the file, or of all weights files of a folder.
        sha256: of the file; None for several.
        tensors_sha256: over the float32 tensors, which begins a ViCLIP's model id; None for several files.
        loads: whether it fits the architecture strictly; None if that was not tried.
        missing: keys the architecture has and the file has not.
        unexpected: keys the file has and the architecture has not.
        misshapen: keys of another shape, with both shapes.
        problem: what is wrong besides keys, or "".
    """

    path: str
    architecture: str
    num_keys: int
    num_parameters: int
    dims: dict[str, int]
    dtypes: dict[str, int]
    size_bytes: int
    sha256: str | None
    tensors_sha256: str | None
    loads: bool | None
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()
    problem: str = ""

    @property
    def good(self) -> bool:
        """Whether nothing speaks against using it."""
        return self.loads is not False and not self.problem and self.architecture != "unknown"


def identify(path: str | Path, *, name: str | None = None) -> Identity:
    """Look at a weights file, or at the folder of a model.

    Args:
        path: a .safetensors or PyTorch file, or a folder.
        name: what it ought to be: an encoder's name, or a name of the catalogue, whose checksum is then compared.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: unreadable file, or a name that is neither.
    """
    pinned = {model.name: model for model in CATALOGUE}
    if name is not None and name not in pinned and name not in VICLIPS and name != "clip-vit-l14":
        raise ValueError(f"Cannot check for {name!r}; there are {', '.join(sorted({*pinned, *VICLIPS}))}.")
    if Path(path).is_dir() and (Path(path) / "config.json").is_file():
        return _folder(Path(path), name)
    file = weights_file(path)
    stored = read_state_dict(file)
    state = {key: value for key, value in stored.items() if key not in NOT_WEIGHTS}
    shapes: Shapes = {key: tuple(value.shape) for key, value in state.items()}
    wanted = _encoder_name(name)
    architecture, dims, module, problem = _recognise(shapes, file, wanted, from_openai=len(stored) > len(state))
    sha256 = file_sha256(file)
    entry = None if name is None else pinned.get(name)
    if entry is not None and entry.sha256 not in (None, sha256):
        problem = problem or f"its sha256 is not the pinned {entry.sha256} of {name}"
    plain = architecture.removesuffix(ACTIVATION_UNKNOWN).removesuffix("-quickgelu")
    if wanted is not None and plain not in (wanted, _as_open_clip(wanted)):
        problem = f"it is {architecture}, not {wanted}" + (f"; {problem}" if problem else "")
    expected = None if module is None else {key: tuple(value.shape) for key, value in module.state_dict().items()}
    return Identity(
        path=str(path),
        architecture=architecture,
        num_keys=len(state),
        num_parameters=sum(value.numel() for value in state.values()),
        dims=dims,
        dtypes=dict(Counter(str(value.dtype).removeprefix("torch.") for value in state.values())),
        size_bytes=file.stat().st_size,
        sha256=sha256,
        tensors_sha256=weights_digest({key: value.float() for key, value in state.items()}),
        loads=None if expected is None else expected == shapes,
        **_differences(shapes, expected),
        problem=problem,
    )


def _encoder_name(name: str | None) -> str | None:
    return None if name is None else name.removesuffix("-10m-flt-pth")


def _as_open_clip(name: str) -> str | None:
    return "open_clip:ViT-L-14" if name == "clip-vit-l14" else None


def _differences(shapes: Shapes, expected: Shapes | None) -> dict[str, tuple[str, ...]]:
    if expected is None:
        return {}
    return {
        "missing": tuple(key for key in expected if key not in shapes),
        "unexpected": tuple(key for key in shapes if key not in expected),
        "misshapen": tuple(
            f"{key} {shapes[key]} instead of {shape}"
            for key, shape in expected.items()
            if key in shapes and shapes[key] != shape
        ),
    }


def _recognise(
    shapes: Shapes, file: Path, wanted: str | None, *, from_openai: bool
) -> tuple[str, dict[str, int], nn.Module | None, str]:
    """Architecture, dims, a model of it on the meta device if one can be made, and what is wrong."""
    if any(key.startswith(("vision_encoder.", "text_encoder.")) for key in shapes):
        return _viclip(shapes, file, wanted)
    if "visual.conv1.weight" in shapes and "text_projection" in shapes:
        return _open_clip(shapes, file, from_openai)
    if "projection.weight" in shapes and "classifier.weight" in shapes:
        return _geolocator(shapes, file)
    return "unknown", {}, None, f"no architecture has keys such as {', '.join(sorted(shapes)[:5])}"


def _viclip(shapes: Shapes, file: Path, wanted: str | None) -> tuple[str, dict[str, int], nn.Module | None, str]:
    # Two tensors say which size it is; the rest is compared with that size.
    proj, conv = shapes.get("vision_encoder.proj", ()), shapes.get("vision_encoder.conv1.weight", ())
    sizes = {(config.vision_width, config.embed_dim, config.patch_px): size for size, config in VICLIPS.items()}
    name = wanted
    if len(proj) == 2 and len(conv) == 5:
        name = sizes.get((proj[0], proj[1], conv[4]), wanted)
    if name is not None and name in VICLIPS:
        config = VICLIPS[name]
        with shapes_only():
            module = ViCLIP(config)
        dims = {"image_dim": config.embed_dim, "num_frames": config.num_frames, "context": config.context_length}
        return name, dims, module, ""
    try:
        config = load_viclip(file).config
    except ValueError as error:
        return "viclip", {}, None, str(error)
    dims = {"image_dim": config.embed_dim, "num_frames": config.num_frames, "context": config.context_length}
    with shapes_only():
        return "viclip", dims, ViCLIP(config), ""


def _open_clip(shapes: Shapes, file: Path, from_openai: bool) -> tuple[str, dict[str, int], nn.Module | None, str]:
    import open_clip  # seconds to import

    conv, positions = shapes["visual.conv1.weight"], shapes.get("visual.positional_embedding", (0,))
    dims = {"image_dim": shapes["text_projection"][-1], "context": shapes.get("positional_embedding", (0,))[0]}
    name = OPEN_CLIPS.get((conv[0], conv[-1], positions[0]))
    if name is None:
        return "open_clip", dims, None, ""
    with shapes_only():
        module: nn.Module = open_clip.CLIP(**open_clip.get_model_config(name))
    quick_gelu = known_quick_gelu(name, NOT_WEIGHTS if from_openai else (), open_clip_card(file))
    suffix = {True: "-quickgelu", False: "", None: ACTIVATION_UNKNOWN}[quick_gelu]
    return f"open_clip:{name}{suffix}", dims, module, ""


def _geolocator(shapes: Shapes, file: Path) -> tuple[str, dict[str, int], nn.Module | None, str]:
    num_cells, projection_dim = shapes["classifier.weight"]
    dims = {"num_cells": num_cells, "projection_dim": projection_dim, "input_dim": shapes["projection.weight"][-1]}
    card = file.with_name("model.json")
    if not card.is_file():
        return "geolocator", dims, None, "model.json is missing beside it"
    try:
        config = GeolocatorConfig(**json.loads(card.read_text(encoding="utf-8"))["config"])
    except (KeyError, TypeError, ValueError) as error:
        return "geolocator", dims, None, f"its model.json does not describe a geolocator: {error}"
    with shapes_only():
        return "geolocator", dims, Geolocator(config), ""


def _folder(folder: Path, name: str | None) -> Identity:
    """A folder of `transformers`: its config.json and the headers of its weights."""
    try:
        config: Mapping[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(folder / 'config.json')!r} is not JSON: {error}") from error
    files = sorted(folder.glob("*.safetensors"))
    dtypes: Counter[str] = Counter()
    num_keys = num_parameters = 0
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 - not a dict
                    part = tensors.get_slice(key)
                    num_keys += 1
                    num_parameters += prod(part.get_shape())
                    dtypes[str(part.get_dtype())] += 1
        except SafetensorError as error:
            raise ValueError(f"{str(file)!r} is not readable, perhaps truncated. ({error})") from error
    listed = folder / "model.safetensors.index.json"
    shards = set(json.loads(listed.read_text(encoding="utf-8"))["weight_map"].values()) if listed.is_file() else set()
    absent = sorted(shards - {file.name for file in files})
    problem = "it has no .safetensors file" if not files else f"{', '.join(absent)} missing" if absent else ""
    vision = config.get("vision_config") if isinstance(config.get("vision_config"), Mapping) else config
    sizes = {key: dict(vision or {}).get(key) for key in ("hidden_size", "image_size", "patch_size")}
    dims = {key: value for key, value in sizes.items() if isinstance(value, int)}
    return Identity(
        path=str(folder),
        architecture=f"transformers:{config.get('model_type', 'unknown')}",
        num_keys=num_keys,
        num_parameters=num_parameters,
        dims=dims,
        dtypes=dict(dtypes),
        size_bytes=sum(file.stat().st_size for file in files),
        sha256=file_sha256(files[0]) if len(files) == 1 else None,
        tensors_sha256=None,
        loads=None,
        problem=problem if name not in VICLIPS else f"it is a folder of transformers, not {name}",
    )
