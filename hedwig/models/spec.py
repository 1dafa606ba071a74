"""The names of encoders and what can be known of one without its weights: sizes, to plan tables and frames with.

Five names are ours; behind three prefixes are the architectures of open_clip, those of timm, and any model of
transformers in a local folder. There is no registry: each prefix is one branch here and one in
`hedwig.models.encoder`.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from hedwig.models.viclip import B16, L14, TINY, ViCLIPConfig

__all__ = ["ENCODER_NAMES", "EncoderSpec", "check_name", "encoder_spec"]

ENCODER_NAMES = ("viclip-tiny", "viclip-b16", "viclip-l14", "clip-tiny", "clip-vit-l14")
PREFIXES = ("open_clip", "timm", "transformers")
DEFAULT_NUM_FRAMES = 8

# The two CLIPs are as large as the ViCLIPs they are compared with.
CONFIGS: dict[str, ViCLIPConfig] = {
    "viclip-tiny": TINY,
    "viclip-b16": B16,
    "viclip-l14": L14,
    "clip-tiny": TINY,
    "clip-vit-l14": L14,
}


@dataclass(frozen=True)
class EncoderSpec:
    """Sizes of an encoder.

    Attributes:
        frame_px: S; height and width of a frame.
        num_frames: V; the frames it is best given. It takes other numbers too.
        image_dim: dimension of image embeddings.
        text_dim: dimension of text embeddings; 1 (a zero that nobody reads) if it reads no text.
        has_text: whether it reads text.
    """

    frame_px: int
    num_frames: int
    image_dim: int
    text_dim: int
    has_text: bool


def encoder_spec(name: str, weights: str | None = None) -> EncoderSpec:
    """The sizes of a named encoder, without building it.

    Args:
        name: one of `ENCODER_NAMES`, or ``open_clip:ARCH``, ``timm:ARCH``, ``transformers:LABEL``.
        weights: as for `hedwig.models.encoder.load_encoder`; ``transformers:`` needs them, for the config.json
            beside them, and only that is read.

    Raises:
        FileNotFoundError: there is no such folder, or no configuration in it.
        ValueError: unknown name.
    """
    check_name(name)
    prefix, _, label = name.partition(":")
    if not label:
        config = CONFIGS[name]
        return EncoderSpec(config.frame_px, config.num_frames, config.embed_dim, config.embed_dim, True)
    if prefix == "open_clip":
        from hedwig.models.clip import clip_sizes

        frame_px, dim = clip_sizes(label)
        return EncoderSpec(frame_px, DEFAULT_NUM_FRAMES, dim, dim, True)
    if prefix == "timm":
        from hedwig.models.towers import timm_sizes

        frame_px, dim = timm_sizes(label, weights)
        return EncoderSpec(frame_px, DEFAULT_NUM_FRAMES, dim, 1, False)
    from hedwig.models.transformers_tower import transformers_sizes

    sizes = transformers_sizes(folder_of(name, weights))
    return EncoderSpec(
        sizes.frame_px, DEFAULT_NUM_FRAMES, sizes.image_dim, sizes.text_dim or 1, sizes.text_dim is not None
    )


def check_name(name: str) -> None:
    """Refuse a name that is neither ours nor behind one of the prefixes.

    Raises:
        ValueError: unknown name; the message names the nearest one.
    """
    prefix, colon, label = name.partition(":")
    if name in ENCODER_NAMES or (prefix in PREFIXES and label.strip()):
        return
    near = difflib.get_close_matches(name, ENCODER_NAMES, n=1, cutoff=0.4) if not colon else []
    near += [f"{p}:" for p in difflib.get_close_matches(prefix, PREFIXES, n=1)] if colon else []
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(
        f"Unknown encoder {name!r}; {hint}There are {', '.join(ENCODER_NAMES)}; open_clip:ARCH for an architecture of "
        f"open_clip (images and text), timm:ARCH for one of timm (images only), and transformers:LABEL, with weights, "
        f"for a model in a local folder."
    )


def folder_of(name: str, weights: str | None) -> str:
    """The folder that a ``transformers:`` name cannot do without."""
    if weights is None:
        raise ValueError(
            f"{name!r} needs weights: a local folder with config.json, model.safetensors and preprocessor_config.json."
        )
    return weights
