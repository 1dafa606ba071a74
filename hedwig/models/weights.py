"""Reading, checking and fingerprinting weights: the one place that opens a weights file.

A file is safetensors or a PyTorch archive read with ``weights_only=True``; nothing else is ever unpickled and
nothing is ever downloaded. Loading is strict, and its error names the keys. `weights_digest` is
over the tensors, so a ``.pth`` and its ``.safetensors`` twin are the same model; `check_sha256` is over the bytes of
the file, to be compared with what its publisher says before anything in it is trusted. What a model does with its
weights often stands in files beside them; `settings_digest` is over those.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from hedwig.models.fetched import SOURCE, file_sha256
from hedwig.models.shapes import shapes_only

__all__ = [
    "build_loaded",
    "check_sha256",
    "load_strict",
    "read_card",
    "read_metadata",
    "read_state_dict",
    "settings_digest",
    "weights_digest",
    "weights_file",
]

WRAPPERS = ("model", "module", "state_dict")
SETTINGS = ("*.json", "*.txt", "*.model")  # configurations, normalisation, vocabularies


def weights_file(path: str | Path) -> Path:
    """The file meant by `path`: itself, or ``model.safetensors`` inside it when it is a folder.

    Raises:
        FileNotFoundError: there is no such file.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"No weights at {str(file)!r}; pass a .safetensors or .pth file, or its folder.")
    return file


def check_sha256(path: str | Path, sha256: str) -> None:
    """Compare a weights file's bytes with a SHA-256 in hexadecimal; nothing in it is interpreted.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the digests differ, or `sha256` is not one.
    """
    file = weights_file(path)
    if not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise ValueError(f"sha256 must be 64 hexadecimal digits, got {sha256!r}.")
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256.lower():
        raise ValueError(
            f"{str(file)!r} was not opened: its SHA-256 is {found}, expected {sha256.lower()}; fetch it again, or "
            f"correct the setting if another file is meant."
        )


def read_state_dict(path: str | Path, sha256: str | None = None) -> dict[str, Tensor]:
    """Tensors by key, on the CPU, as stored.

    A dict under ``model``, ``module`` or ``state_dict`` is unwrapped, and a ``module.`` in front of every key
    (left by distributed training) is removed.

    Args:
        path: a file, or a folder holding model.safetensors.
        sha256: what the file's SHA-256 must be; None checks nothing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another SHA-256, or the file is truncated, is no weights file, or holds pickled objects besides
            tensors.
    """
    file = weights_file(path)
    if sha256 is not None:
        check_sha256(file, sha256)
    try:
        loaded = (
            load_file(file)
            if file.suffix == ".safetensors"
            else torch.load(file, map_location="cpu", weights_only=True)
        )
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{str(file)!r} holds more than tensors (or is damaged) and was not loaded, because unpickling it could "
            f"run code. Convert it to .safetensors where you trust it. ({str(error).splitlines()[0]})"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, zipfile.BadZipFile, ValueError, KeyError) as error:
        raise ValueError(
            f"{str(file)!r} ({file.stat().st_size} bytes) is not a readable weights file, perhaps truncated; "
            f"fetch it again. ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from error
    return unwrap(loaded, str(file))


def unwrap(loaded: object, origin: str) -> dict[str, Tensor]:
    """The flat state dict inside what a file held; `origin` is named in errors."""
    for wrapper in WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping) or not loaded:
        raise ValueError(f"{origin!r} holds a {type(loaded).__name__}, expected a dict of tensors.")
    others = [str(key) for key, value in loaded.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"{origin!r} holds entries that are not tensors: {name_some(others)}.")
    prefix = "module." if all(str(key).startswith("module.") for key in loaded) else ""
    return {str(key).removeprefix(prefix): value for key, value in loaded.items()}


def read_metadata(path: str | Path) -> dict[str, str]:
    """The text metadata in a safetensors header; empty for any other kind of file."""
    file = weights_file(path)
    if file.suffix != ".safetensors":
        return {}
    try:
        with safe_open(file, framework="pt") as handle:
            return dict(handle.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{str(file)!r} is not a readable safetensors file, perhaps truncated. ({error})") from error


def read_card(path: str | Path) -> dict[str, Any]:
    """The model.json beside a weights file; empty if there is none.

    Raises:
        ValueError: it is not a JSON object.
    """
    card = weights_file(path).with_name("model.json")
    if not card.is_file():
        return {}
    try:
        content = json.loads(card.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(card)!r} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(card)!r} holds a {type(content).__name__}, expected an object.")
    return content


def load_strict(module: nn.Module, state: Mapping[str, Tensor], *, origin: str) -> None:
    """Give `module` (which may live on the meta device) the tensors of `state` as float32, without copying twice.

    Raises:
        ValueError: a key is missing, unexpected or of another shape; the message names keys and `origin`.
    """
    wanted = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in wanted]
    misshapen = [
        f"{key} {tuple(state[key].shape)} instead of {shape}"
        for key, shape in wanted.items()
        if key in state and tuple(state[key].shape) != shape
    ]
    problems = [
        f"{len(keys)} {kind}: {name_some(keys)}"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if keys
    ]
    if problems:
        raise ValueError(
            f"The weights {origin!r} do not fit {type(module).__name__}: {'; '.join(problems)}. "
            f"Check that the file belongs to this model and size."
        )
    module.load_state_dict({key: value.detach().float() for key, value in state.items()}, assign=True)


def build_loaded(
    build: Callable[[], Any],
    state: Mapping[str, Tensor],
    *,
    origin: str,
    complete: Callable[[Any], None] | None = None,
) -> Any:
    """The module that `build` makes with the tensors of `state`, without initialising it first where that can be.

    Args:
        build: makes the module; called once on the meta device, and again on the CPU if that was not enough.
        state: the tensors, for `load_strict`.
        origin: named in errors.
        complete: fills in buffers that are no weights, for instance masks.

    Raises:
        ValueError: a key is missing, unexpected or of another shape.
    """
    with shapes_only():
        module = build()
    load_strict(module, state, origin=origin)
    if complete is not None:
        complete(module)
    if any(buffer.is_meta for buffer in module.buffers()):  # computed when built, and not in the file
        with torch.random.fork_rng(devices=[]):
            module = build()
        load_strict(module, state, origin=origin)
    return module


def settings_digest(path: str | Path) -> str | None:
    """SHA-256 (hex) over names and bytes of settings and vocabularies beside a weights file; None without any.

    The record of a fetch (source.json) says when files came, not what they mean, and is left out.
    """
    file = weights_file(path)
    beside = sorted(other for pattern in SETTINGS for other in file.parent.glob(pattern))
    beside = [other for other in beside if other.is_file() and other.name not in (file.name, SOURCE)]
    if not beside:
        return None
    digests = [(other.name, file_sha256(other)) for other in beside]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def name_some(keys: list[str], limit: int = 5) -> str:
    """The first few keys and how many more there are."""
    return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "")


def weights_digest(source: Mapping[str, Tensor] | str | Path) -> str:
    """SHA-256 (hex) over keys, dtypes, shapes and values in the order of the sorted keys.

    Args:
        source: a state dict, or a path given to `read_state_dict`.
    """
    state = read_state_dict(source) if isinstance(source, str | Path) else source
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().to("cpu").contiguous()
        digest.update(f"{key}\0{str(value.dtype).removeprefix('torch.')}\0{tuple(value.shape)}\0".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
