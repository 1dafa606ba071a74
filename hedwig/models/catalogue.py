"""The released models that hedwig can use: where each one is kept, what it is for, and under which terms.

A catalogue of facts and nothing that acts: `hedwig.models.fetch` downloads what is listed here. A fact that is not
known is None and shown as unknown; it is asked from the hub before a download. A model without a pinned checksum is
compared with the digest that the hub states, which proves the transfer and not the origin, and is called not pinned.
Python files of a repository are never listed: no remote code is run here.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from fnmatch import fnmatchcase

__all__ = ["CATALOGUE", "ReleasedModel", "released"]

# What a folder that `transformers` reads is made of; a pattern without a slash means the top of the repository.
FOLDER_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")

VICLIP_TERMS = (
    "unclear: the repository names no licence; the code is Apache-2.0, and the InternVid data set that trained these "
    "weights is CC BY-NC-SA 4.0. Ask the authors before commercial use"
)


@dataclass(frozen=True)
class ReleasedModel:
    """A model as its authors published it.

    Attributes:
        name: how hedwig calls it.
        use: what it is for, in the words of an experiment's settings.
        repo: owner/name on the hub.
        files: paths in the repository, or patterns; without a slash they mean its top folder only.
        entry: what of it a setting points to: a file, or a folder ("." for the whole).
        revision: the pinned commit; None for the newest, whose commit is then recorded.
        size_bytes: the sum of the files; None if unknown.
        size_is_exact: whether `size_bytes` is a count and not a rounded statement.
        sha256: hex digest of `entry`, or None if it is not pinned.
        licence: the terms as far as they are known, None if they are not.
        note: what else its user must know.
    """

    name: str
    use: str
    repo: str
    files: tuple[str, ...]
    entry: str = "."
    revision: str | None = None
    size_bytes: int | None = None
    size_is_exact: bool = False
    sha256: str | None = None
    licence: str | None = None
    note: str = ""

    def wants(self, path: str) -> bool:
        """Whether a file of the repository belongs to what is fetched."""
        return any(
            path.startswith(pattern[:-1]) if pattern.endswith("/*") else "/" not in path and fnmatchcase(path, pattern)
            for pattern in self.files
        )


CATALOGUE = (
    ReleasedModel(
        name="viclip-l14",
        use="encoder.name: viclip-l14",
        repo="OpenGVLab/ViCLIP-L-14-hf",
        files=("model.safetensors",),
        entry="model.safetensors",
        revision="1652361522e1cb41c28cdfae870f690d00e7456b",
        size_bytes=1_710_000_000,
        sha256="07d32e92a78d3e155915ffb87ad6e967a279cd1b06bfb6433dac800247a0ee8f",
        licence=VICLIP_TERMS,
    ),
    ReleasedModel(
        name="viclip-b16",
        use="encoder.name: viclip-b16",
        repo="OpenGVLab/ViCLIP-B-16-hf",
        files=("model.safetensors",),
        entry="model.safetensors",
        revision="8484a9cb5b1b86e43c3ded53abe7485f52d8b789",
        size_bytes=598_000_000,
        sha256="af9cfba8b30a4d62fec6bf7a033f748514ae86d04bd53b3a47f17dd4c7af2741",
        licence=VICLIP_TERMS,
    ),
    ReleasedModel(
        name="viclip-l14-10m-flt-pth",
        use="encoder.name: viclip-l14",
        repo="OpenGVLab/ViCLIP",
        files=("ViClip-InternVid-10M-FLT.pth",),
        entry="ViClip-InternVid-10M-FLT.pth",
        size_bytes=1_710_000_000,
        licence="MIT by the repository's tag; the InternVid data set is CC BY-NC-SA 4.0, so the terms are unclear",
        note="A PyTorch archive, read with weights_only=True.",
    ),
    ReleasedModel(
        name="clip-vit-l14",
        use="encoder.name: clip-vit-l14",
        repo="timm/vit_large_patch14_clip_224.openai",
        files=("open_clip_model.safetensors",),
        entry="open_clip_model.safetensors",
        note="OpenAI's weights; trained with QuickGELU.",
    ),
    ReleasedModel(
        name="siglip2-base",
        use="encoder.name: transformers:siglip2-base",
        repo="google/siglip2-base-patch16-224",
        files=FOLDER_FILES,
        licence="Apache-2.0",
    ),
    ReleasedModel(
        name="dinov2-large",
        use="encoder.name: transformers:dinov2-large (images only)",
        repo="facebook/dinov2-large",
        files=FOLDER_FILES,
        licence="Apache-2.0",
        note="It was CC BY-NC 4.0 until 2023-08; the newest revision is meant.",
    ),
    ReleasedModel(
        name="streetclip",
        use="encoder.name: transformers:streetclip",
        repo="geolocal/StreetCLIP",
        files=FOLDER_FILES,
        licence="CC BY-NC 4.0: not for commercial use",
        note="Its card puts geolocating people's private photographs out of scope.",
    ),
    ReleasedModel(
        name="internvl3-1b",
        use="captions.source: transformers",
        repo="OpenGVLab/InternVL3-1B-hf",
        files=FOLDER_FILES,
    ),
    ReleasedModel(
        name="smolvlm2",
        use="captions.source: transformers",
        repo="HuggingFaceTB/SmolVLM2-2.2B-Instruct",
        files=FOLDER_FILES,
        licence="Apache-2.0",
    ),
    ReleasedModel(
        name="qwen3-vl-4b",
        use="captions.source: transformers or vllm",
        repo="Qwen/Qwen3-VL-4B-Instruct",
        files=FOLDER_FILES,
        licence="Apache-2.0",
    ),
    ReleasedModel(
        name="internvideo2.5-8b",
        use="captions.source: openai, by a server of its own",
        repo="OpenGVLab/InternVideo2_5_Chat_8B",
        files=FOLDER_FILES,
        size_bytes=16_810_000_000,
        licence="Apache-2.0 by the repository's tag",
        note="Its configuration and tokenizer are the repository's own Python code, which is neither fetched nor run "
        "here: serve it elsewhere, with vLLM for one, and set captions.source=openai and captions.base_url. vLLM reads "
        "it as a plain InternVL chat model, without its video compression.",
    ),
    ReleasedModel(
        name="diffusion360",
        use="panoramas by diffusion",
        repo="archerfmy0831/sd-t2i-360panoimage",
        files=("sd-base/*",),
        entry="sd-base",
        licence="Apache-2.0 by the repository's tag; the terms of the Stable Diffusion it was tuned from are unknown",
        note="Its UNet is a .bin file, read with weights_only=True.",
    ),
)


def released(name: str) -> ReleasedModel:
    """The catalogue's entry of that name.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    by_name = {model.name: model for model in CATALOGUE}
    if name not in by_name:
        near = difflib.get_close_matches(name, by_name, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"No released model is called {name!r}; {hint}There are {', '.join(by_name)}.")
    return by_name[name]
