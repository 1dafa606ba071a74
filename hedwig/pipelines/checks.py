"""What can be known to be wrong with an experiment's encoders and captions before anything runs.

An embedding pass may take days and captions may cost money, so that combinations that cannot end well are refused when
the stages are planned, a dry run included. Only names, sizes and the presence of files are looked at; no weights are
read. What a single setting may be is in `hedwig.config`; here is what settings mean together.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Collection

from hedwig import storage
from hedwig.captions.folders import model_folder
from hedwig.captions.openai import open_endpoint
from hedwig.captions.prompts import TOKEN_BUDGETS, TokenizerName
from hedwig.config import EncoderConfig, Experiment
from hedwig.models.encoder import ENCODER_NAMES, EncoderSpec, encoder_spec
from hedwig.models.fetched import resolve_weights
from hedwig.models.weights import weights_file
from hedwig.training.finetune import check_finetuning
from hedwig.web import Politeness

__all__ = ["check_captions", "check_encoders", "keeps_frames", "sizes_of", "token_budget_of", "weights_of"]

logger = logging.getLogger(__name__)
NO_VLLM = (
    "captions.source=vllm needs vLLM on the GPU nodes: pip install 'hedwig[captions]'. Without a GPU use "
    "captions.source=openai with an endpoint, transformers, or template."
)
ENCODING_STAGES = ("caption", "frames", "encoder", "embed", "baseline")


def keeps_frames(fusion: str) -> bool:
    """Whether this fusion leaves the choice between frames to later stages, which then need each frame's vector."""
    return fusion in ("max_sim", "attention")


def weights_of(encoder: EncoderConfig) -> str | None:
    """Where the encoder's weights are: of a fetched model, or of a path that counts from the working directory.

    Raises:
        FileNotFoundError: a model that `hedwig fetch` knows, and that is not here.
    """
    if encoder.weights is None:
        return None
    found = resolve_weights(encoder.weights)
    return found if found != encoder.weights else storage.resolve(encoder.weights)


def sizes_of(encoder: EncoderConfig) -> EncoderSpec:
    """The encoder's sizes, without its weights."""
    return encoder_spec(encoder.name, None if encoder.name in ENCODER_NAMES else weights_of(encoder))


def token_budget_of(x: Experiment) -> tuple[int | None, TokenizerName]:
    """The longest caption that a model is asked for, None where it is not cut; and whose tokens are counted."""
    tokenizer: TokenizerName = "viclip" if x.encoder.name.startswith("viclip") else "clip"
    if x.captions.token_budget is not None:
        return x.captions.token_budget, tokenizer
    whole = x.captions.prompt == "verbose" or x.encoder.long_captions == "chunks"
    return None if whole else TOKEN_BUDGETS[tokenizer], tokenizer


def check_captions(x: Experiment, stages: Collection[str]) -> None:
    """Refuse caption settings that cannot work, where captions are to be asked for.

    What only asking needs (a key, vLLM) is not missed where there are captions already: they may be up to date.

    Raises:
        FileNotFoundError: the model's folder is not there.
        ImportError: vLLM is not installed.
        PermissionError: there is no key in the environment.
        ValueError: settings that contradict each other; says which, and what to set instead.
    """
    section = x.captions
    if "caption" not in stages or section.source in ("none", "template"):
        return
    budget, tokenizer = token_budget_of(x)
    if budget is not None and budget > TOKEN_BUDGETS[tokenizer]:
        raise ValueError(
            f"captions.token_budget is {budget}, and {x.encoder.name} reads {TOKEN_BUDGETS[tokenizer]} tokens at a "
            "time; set it lower, or leave it out and set encoder.long_captions=chunks, which reads longer ones whole."
        )
    if section.images == "sheet" and not section.source.startswith("openai"):
        raise ValueError(
            f"captions.images is 'sheet', and captions.source={section.source} shows every frame by itself; set "
            "captions.images=frames."
        )
    if section.source in ("transformers", "vllm"):
        model_folder(resolve_weights(str(section.model)))
    if section.source == "openai-batch" and storage.is_remote(storage.resolve(x.output)):
        raise ValueError(
            f"captions.source=openai-batch keeps its shards on a local disk, and output is {x.output}; use a local "
            "output, or captions.source=openai."
        )
    if storage.exists(storage.join(storage.resolve(x.output), "captions", storage.MANIFEST)):
        return
    if section.source == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ImportError(NO_VLLM)
    if section.base_url is not None and section.source.startswith("openai"):
        open_endpoint(section.base_url, section.api_key_env, Politeness())


def check_encoders(x: Experiment, stages: Collection[str]) -> None:
    """Refuse encoder settings that cannot work in the stages that are to run.

    Raises:
        FileNotFoundError: weights that are to be used and are not there.
        ValueError: unknown encoder, or settings that contradict each other; says which, and what to set instead.
    """
    if x.encoder.fusion == "max_sim" and x.index.embedding == "projected":
        raise ValueError(
            f"encoder.fusion is 'max_sim', which compares the frames' own vectors, and index.embedding is "
            f"{x.index.embedding!r}; set index.embedding=image or whitened."
        )
    if not set(stages) & set(ENCODING_STAGES):
        return
    spec = _check_encoder(x.encoder, "encoder")
    _check_finetuning(x, spec)
    if x.training.use_text and not spec.has_text:
        raise ValueError(
            f"training.use_text is true, and {x.encoder.name} reads no text; set training.use_text=false, or choose an "
            "encoder with a text tower."
        )
    if x.training.use_text and x.captions.source == "none":
        logger.warning(
            "captions.source is 'none': the head will be trained on zeros in place of captions; "
            "training.use_text=false leaves them out"
        )
    if x.evaluate.baseline is not None:
        if keeps_frames(x.evaluate.baseline.fusion):
            raise ValueError(
                f"evaluate.baseline.fusion is {x.evaluate.baseline.fusion!r}, and the baseline is compared by one "
                "vector per panorama; set evaluate.baseline.fusion=mean."
            )
        if (
            x.encoder.train is not None
            and x.encoder.name == x.evaluate.baseline.name
            and not x.evaluate.baseline.weights
        ):
            raise ValueError(
                f"{x.encoder.name} would be trained twice, as encoder and as baseline, into the same folder; name "
                "another evaluate.baseline, or give it weights."
            )
        _check_encoder(x.evaluate.baseline, "evaluate.baseline", trained=x.encoder.train is not None)


def _check_finetuning(x: Experiment, spec: EncoderSpec) -> None:
    if x.evaluate.baseline is not None and x.evaluate.baseline.is_trained:
        raise ValueError(
            "evaluate.baseline.train and evaluate.baseline.finetune do nothing: a baseline without weights gets "
            "encoder.train's training, any other stays as it is; leave them out."
        )
    section = x.encoder.finetune
    if section is None:
        return
    check_finetuning(x.encoder.name, blocks=section.blocks, lora_rank=section.lora_rank)
    if section.text_weight > 0 and (x.captions.source == "none" or not spec.has_text):
        why = f"captions.source is {x.captions.source!r}" if spec.has_text else f"{x.encoder.name} reads no text"
        raise ValueError(f"encoder.finetune.text_weight is {section.text_weight}, and {why}; set it to 0.")
    if x.encoder.weights is None:
        logger.warning(
            "encoder.finetune starts from random weights (encoder.weights is not set); encoder.train would train all "
            "of a small encoder"
        )


def _check_encoder(encoder: EncoderConfig, key: str, *, trained: bool = False) -> EncoderSpec:
    """One encoder; `trained` says whether a baseline without weights will be trained beside the encoder."""
    spec = sizes_of(encoder)
    joint = encoder.name.startswith("viclip-")
    fusion = ("viclip" if joint else "mean") if encoder.fusion == "auto" else encoder.fusion
    if fusion == "viclip" and not joint:
        raise ValueError(
            f"{key}.fusion is 'viclip', and {encoder.name} sees one frame at a time; set {key}.fusion=mean, or choose "
            "a viclip-* encoder."
        )
    if encoder.temporal == "interpolate" and fusion != "viclip":
        raise ValueError(
            f"{key}.temporal is 'interpolate', and {encoder.name} with fusion {fusion!r} has no temporal embedding to "
            f"interpolate; set {key}.temporal=select."
        )
    trained = encoder.train is not None or (trained and encoder.weights is None)
    if trained and encoder.name not in ENCODER_NAMES:
        raise ValueError(
            f"{encoder.name} cannot be trained from scratch here, only {', '.join(ENCODER_NAMES)}; give {key}.weights "
            "and leave encoder.train out, or choose one of these."
        )
    if trained:
        return spec
    place = weights_of(encoder)
    if place is not None:
        weights_file(place)
    elif encoder.sha256 is not None:
        raise ValueError(f"{key}.sha256 is that of a weights file, and {key}.weights is not set; set it.")
    return spec
