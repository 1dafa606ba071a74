"""open_clip's models as image towers: CLIP of each frame, then the mean. The baseline to beat.

Any architecture of open_clip will do whose text tower is open_clip's own. Weights come from a local file, strictly;
open_clip's own downloading is never reached. QuickGELU leaves no trace in a state dict and plain GELU merely gives
wrong numbers, so a mismatch is an error here and not a warning; so are an activation and a normalisation that nothing
tells.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hedwig.models.text import tokenise
from hedwig.models.towers import ImageTower
from hedwig.models.viclip import TINY
from hedwig.models.weights import build_loaded, read_state_dict, weights_file

__all__ = [
    "NOT_WEIGHTS",
    "MeanCLIP",
    "clip_sizes",
    "known_quick_gelu",
    "load_clip",
    "open_clip_card",
    "random_clip",
    "save_clip",
    "tiny_clip",
    "write_open_clip_card",
]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# As wide, deep and patched as ViCLIP's TINY; 32 tokens, so that both read the same captions.
TINY_CLIP: dict[str, Any] = {
    "embed_dim": TINY.embed_dim,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": TINY.frame_px,
        "patch_size": TINY.patch_px,
        "width": TINY.vision_width,
        "layers": TINY.vision_layers,
        "head_width": TINY.vision_width // TINY.vision_heads,
    },
    "text_cfg": {
        "context_length": TINY.context_length,
        "vocab_size": TINY.vocab_size,
        "width": TINY.text_width,
        "heads": TINY.text_heads,
        "layers": TINY.text_layers,
    },
}

# What OpenAI's scripted archive stores beside the weights.
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")


class MeanCLIP(ImageTower):
    """An open_clip model applied to each frame.

    Args:
        model: an `open_clip.CLIP`, `CustomTextCLIP` or `CoCa` with square images.
        image_dim: D, of images and texts.
        frame_px: height and width of its images.
        mean: see `ImageTower`.
        std: see `ImageTower`.
        tokeniser: what makes its ids, if not CLIP's byte-pair vocabulary; a text is refused if it is False.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        image_dim: int,
        frame_px: int,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        tokeniser: Any = None,
    ) -> None:
        super().__init__(model, frame_px=frame_px, image_dim=image_dim, mean=mean, std=std, text_dim=image_dim)
        self.context_length = int(self.model.context_length)
        self.tokeniser = tokeniser

    def image_features(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) normalised images to (N, D)."""
        features: Tensor = self.model.encode_image(images)
        return features

    def text_features(self, ids: Tensor) -> Tensor:
        """(B, L) token ids to (B, D), not normalised, with gradients."""
        if ids.ndim != 2 or ids.shape[1] != self.context_length:
            raise ValueError(f"Expected (B, L) = (B, {self.context_length}), got {tuple(ids.shape)}.")
        features: Tensor = self.model.encode_text(ids.to(self.model.logit_scale.device))
        return features

    def tokenise(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids (B, L) int64 of captions, and whether each was cut, (B,) bool."""
        if self.tokeniser is None:
            return tokenise(texts, self.context_length)
        if self.tokeniser is False:
            raise ValueError("This text tower has a vocabulary of its own; put its tokenizer.json beside the weights.")
        ids: Tensor = self.tokeniser(list(texts))
        whole = self.tokeniser.tokenizer([self.tokeniser.clean_fn(text) for text in texts])["input_ids"]
        return ids, torch.tensor([len(tokens) > self.context_length for tokens in whole], dtype=torch.bool)


def load_clip(
    name: str = "ViT-L-14-quickgelu",
    *,
    weights: str | Path,
    sha256: str | None = None,
    quick_gelu: bool | None = True,
    device: str | torch.device = "cpu",
) -> MeanCLIP:
    """A CLIP in evaluation mode with the weights of a local file, loaded strictly.

    The normalisation is that of an open_clip_config.json beside the file, else that of all published weights of this
    architecture. A tokenizer.json beside the file is used by architectures that have a vocabulary of their own.

    Args:
        name: an architecture of open_clip, or "tiny" for the one `tiny_clip` makes.
        weights: a .safetensors or PyTorch file in open_clip's layout, or a folder holding model.safetensors.
        sha256: what the file's SHA-256 must be; None checks nothing.
        quick_gelu: whether these weights were trained with QuickGELU (OpenAI's were); an open_clip_config.json
            beside the file overrules it. None: whatever `known_quick_gelu` finds; if that is nothing, the weights
            are refused.
        device: where to put the model.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: unknown name, an activation that is not the one the weights were trained with, an activation or
            a normalisation that cannot be known, or keys and shapes that do not fit.
    """
    file = weights_file(weights)
    architecture = _architecture(name)
    card = open_clip_card(file)
    if "model_cfg" in card:
        quick_gelu = known_quick_gelu(name, (), card)
    if quick_gelu is not None:
        _check_quick_gelu(name, architecture, quick_gelu, file)
    mean, std = _normalisation(name, file, card, _published(name))
    stored = read_state_dict(file, sha256)
    if quick_gelu is None:
        _check_quick_gelu(name, architecture, known_quick_gelu(name, stored, card), file)
    state = {key: value for key, value in stored.items() if key not in NOT_WEIGHTS}
    model = build_loaded(lambda: _build(architecture), state, origin=str(file), complete=_fill_masks)
    return _tower(model, architecture, mean=mean, std=std, folder=file.parent).to(device)


def random_clip(name: str, seed: int) -> MeanCLIP:
    """A CLIP in evaluation mode with open_clip's initialisation, decided by `seed`; the global generator is put back.

    Args:
        name: an architecture of open_clip, or "tiny".
        seed: decides the weights.
    """
    architecture, published = _architecture(name), _published(name)
    mean, std = _pair(published[0]) if published else (CLIP_MEAN, CLIP_STD)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _build(architecture)
    return _tower(model, architecture, mean=mean, std=std, folder=None)


def tiny_clip(seed: int) -> MeanCLIP:
    """A random small CLIP as costly as ViCLIP's TINY."""
    return random_clip("tiny", seed)


def clip_sizes(name: str) -> tuple[int, int]:
    """(frame side in px, dimension of images and texts) of an architecture of open_clip, without building it."""
    architecture = _architecture(name)
    return _frame_px(architecture), int(architecture["embed_dim"])


def known_quick_gelu(name: str, keys: Collection[str], card: Mapping[str, Any]) -> bool | None:
    """Whether weights of an architecture were trained with QuickGELU; None if nothing tells.

    Their card tells, or OpenAI's own entries among the keys, or that all published weights of the architecture, with
    and without the suffix -quickgelu, are alike. The suffix does not: it is how the network will compute.

    Args:
        name: an architecture of open_clip.
        keys: of the state dict, as stored.
        card: see `open_clip_card`.
    """
    if "model_cfg" in card:
        return bool(card["model_cfg"].get("quick_gelu", False))
    if set(NOT_WEIGHTS) & set(keys):
        return True
    plain = name.removesuffix("-quickgelu")
    configs = [config for each in (plain, f"{plain}-quickgelu") for config in _published(each)]
    of_all = {bool(config.get("quick_gelu", False)) for config in configs}
    return of_all.pop() if len(of_all) == 1 else None


def open_clip_card(file: Path) -> dict[str, Any]:
    """The open_clip_config.json beside a weights file; empty if there is none."""
    card = file.with_name("open_clip_config.json")
    return dict(json.loads(card.read_text(encoding="utf-8"))) if card.is_file() else {}


def save_clip(clip: ImageTower, path: str | Path) -> None:
    """Write safetensors in open_clip's layout, float32."""
    state = {
        key: value.detach().to("cpu", torch.float32).contiguous() for key, value in clip.model.state_dict().items()
    }
    save_file(state, path, metadata={"format": "pt"})


def write_open_clip_card(clip: ImageTower, name: str, folder: Path) -> None:
    """Write open_clip_config.json: the architecture with its activation, and the normalisation that `clip` has."""
    content = {
        "model_cfg": _architecture(name),
        "preprocess_cfg": {"mean": list(clip.mean), "std": list(clip.std)},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _architecture(name: str) -> dict[str, Any]:
    import open_clip  # seconds to import; who runs ViCLIP need not pay them

    known = open_clip.list_models()
    if name != "tiny" and name not in known:  # also keeps names with a scheme, which would download, out
        near = [n for n in known if n.lower().startswith(name.lower()[:8])]
        raise ValueError(f"open_clip knows no {name!r}; did you mean one of {near[:6] or ['ViT-L-14-quickgelu']}?")
    architecture: dict[str, Any] = deepcopy(TINY_CLIP) if name == "tiny" else open_clip.get_model_config(name)
    if "hf_model_name" in architecture["text_cfg"]:
        raise ValueError(
            f"The text tower of {name!r} is a language model whose sizes open_clip would download; take the model from "
            f"a local folder as transformers:LABEL, or another architecture."
        )
    return architecture


def _build(architecture: dict[str, Any]) -> Any:
    import open_clip
    from open_clip.coca_model import CoCa

    sizes = deepcopy(architecture)  # what they are made of takes entries out
    custom = sizes.pop("custom_text", False)
    kind = CoCa if "multimodal_cfg" in sizes else open_clip.CustomTextCLIP if custom else open_clip.CLIP
    return kind(**sizes)


def _fill_masks(model: Any) -> None:
    """Causal masks are not in the state dict, so still on meta."""
    import open_clip
    from open_clip.transformer import TextTransformer

    for module in model.modules():
        if isinstance(module, open_clip.CLIP | TextTransformer) and module.attn_mask is not None:
            module.attn_mask = torch.full(module.attn_mask.shape, float("-inf")).triu_(1)


def _frame_px(architecture: dict[str, Any]) -> int:
    size = architecture["vision_cfg"].get("image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise ValueError(f"This architecture takes images of {height} x {width} px, and frames are square.")
    return int(height)


def _tower(
    model: Any, architecture: dict[str, Any], *, mean: Sequence[float], std: Sequence[float], folder: Path | None
) -> MeanCLIP:
    text, tokeniser = architecture["text_cfg"], None
    if "hf_tokenizer_name" in text:
        tokeniser = False
        if folder is not None and (folder / "tokenizer.json").is_file():
            from open_clip.tokenizer import HFTokenizer

            length = int(model.context_length)
            tokeniser = HFTokenizer(str(folder), context_length=length, **text.get("tokenizer_kwargs", {}))
    return MeanCLIP(
        model,
        image_dim=int(architecture["embed_dim"]),
        frame_px=_frame_px(architecture),
        mean=mean,
        std=std,
        tokeniser=tokeniser,
    ).eval()


def _published(name: str) -> list[dict[str, Any]]:
    """What open_clip records of each of the architecture's published weights."""
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    return [get_pretrained_cfg(name, tag) for tag in list_pretrained_tags_by_model(name)]


def _pair(config: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(config.get("mean") or CLIP_MEAN), tuple(config.get("std") or CLIP_STD)


def _normalisation(
    name: str, file: Path, card: Mapping[str, Any], published: Sequence[Mapping[str, Any]]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if "preprocess_cfg" in card:
        return _pair(card["preprocess_cfg"])
    known = {_pair(config) for config in published} or {(CLIP_MEAN, CLIP_STD)}
    if len(known) > 1:
        raise ValueError(
            f"Published weights of {name!r} differ in their normalisation, so put the open_clip_config.json of "
            f"{str(file)!r} beside it."
        )
    return known.pop()


def _check_quick_gelu(name: str, architecture: Mapping[str, Any], trained: bool | None, file: Path) -> None:
    if trained is None:
        raise ValueError(
            f"Nothing tells whether the weights {str(file)!r} were trained with QuickGELU, and {name!r} is published "
            f"with and without, or not at all; put their open_clip_config.json beside them, or set encoder.quick_gelu "
            f"to true (as OpenAI trained) or false (as LAION and DataComp did)."
        )
    if bool(architecture.get("quick_gelu", False)) != trained:
        other = f"{name}-quickgelu" if trained else name.removesuffix("-quickgelu")
        raise ValueError(
            f"{name!r} computes {'GELU' if trained else 'QuickGELU'}, but the weights {str(file)!r} were trained with "
            f"{'QuickGELU' if trained else 'GELU'}; use {other!r}, or, if that is wrong, "
            f"set encoder.quick_gelu={str(not trained).lower()} or correct the open_clip_config.json beside them."
        )
