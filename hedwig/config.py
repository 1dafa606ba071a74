"""One experiment, one YAML file, one frozen and strict model: this is the only place where settings are declared.

A file names a preset, whose values are the defaults beneath its own; ``key=value`` overrides pass through the same
validation. Loading is safe by construction: no tags, no aliases, no duplicate keys, at most 1 MB. Unknown keys are
errors with a suggestion. There is no inheritance between files and no interpolation: `hedwig config show` prints
exactly what will run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hedwig.schema import suggestion

__all__ = [
    "CaptionsConfig",
    "ClusterConfig",
    "ConfigError",
    "DataConfig",
    "EmbedConfig",
    "EncoderConfig",
    "EncoderTrainingConfig",
    "EvaluateConfig",
    "Experiment",
    "GeocellsConfig",
    "IndexConfig",
    "PolygonsConfig",
    "RetrieveConfig",
    "ServeConfig",
    "SlicingConfig",
    "SplitConfig",
    "SyntheticConfig",
    "TrainingConfig",
    "json_schema",
    "load_experiment",
    "parse_yaml",
    "validate_experiment",
]

MAX_CONFIG_BYTES = 1_000_000


class ConfigError(ValueError):
    """The experiment file or an override is wrong; the message has one line per key."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)


class SyntheticConfig(_Section):
    """Render a synthetic world first and use it as the listing."""

    num: int = Field(gt=0, description="number of panoramas")
    width: int = Field(default=1024, ge=64, description="width in px; the height is half of it")
    seed: int = Field(default=0, ge=0, description="seed of the world")


class SplitConfig(_Section):
    """How panoramas with a position are divided; 'column' takes the listing's own split column."""

    method: Literal["spatial", "random", "column"] = "spatial"
    block_km: float = Field(default=200.0, gt=0, description="side of a spatial block")
    buffer_km: float = Field(default=1.0, ge=0, description="training rows this near to a held-out row are set aside")
    val_fraction: float = Field(default=0.1, ge=0, lt=1)
    test_fraction: float = Field(default=0.2, ge=0, lt=1)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _leaves_training_rows(self) -> SplitConfig:
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError("val_fraction + test_fraction must leave something to train on (< 1)")
        return self


class DataConfig(_Section):
    """The panorama listing."""

    panoramas: str | None = Field(default=None, description="Parquet, CSV or GeoParquet listing; local, s3:// or gs://")
    synthetic: SyntheticConfig | None = None
    layout: Literal["panoramas", "bearings"] = Field(
        default="panoramas",
        description="'bearings': one row per heading, rows of one pano_id are one panorama",
    )
    image_root: str | None = Field(
        default=None, description="what relative image_uri start from; default: the listing's folder"
    )
    max_rejected: float = Field(default=0.05, ge=0, description="below 1 a share of the rows, from 1 a count")
    split: SplitConfig = SplitConfig()


class SlicingConfig(_Section):
    """How a panorama becomes frames; the frame side in pixels is the encoder's."""

    mode: Literal["paper", "wrap", "perspective", "bearings"] = "wrap"
    num_frames: int = Field(default=8, ge=1, le=64, description="frames given to the encoder")
    select: Literal["uniform", "middle", "first"] = "uniform"
    height_px: int = Field(default=640, ge=16)
    stride_px: int = Field(default=200, ge=1)
    fov_deg: float = Field(default=90.0, gt=0, lt=180)
    pitch_deg: float = Field(default=0.0, ge=-90, le=90)
    headings_deg: tuple[float, ...] | None = None
    band_deg: float = Field(default=112.5, gt=0, le=180, description="vertical field kept of an equirectangular image")
    align_north: bool = True
    half_size: bool = Field(default=False, description="half-size DCT decode: faster, not faithful")


class CaptionsConfig(_Section):
    """Where captions come from."""

    source: Literal["template", "none"] = "template"


class EncoderTrainingConfig(_Section):
    """Train a tiny encoder from scratch on this experiment's own training split, before embedding."""

    epochs: int = Field(default=12, ge=1)
    batch_size: int = Field(default=64, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    warmup_fraction: float = Field(default=0.1, ge=0, lt=1)
    num_cells: int = Field(default=64, ge=2)
    tau_km: float = Field(default=500.0, gt=0)
    text_weight: float = Field(default=0.1, ge=0)
    hidden_patches: float = Field(default=0.5, ge=0, lt=1, description="share of patches left out of a training step")
    roll_probability: float = Field(default=0.5, ge=0, le=1, description="share of panoramas whose frames are rotated")
    brightness: float = Field(default=0.1, ge=0, lt=1, description="brightness jitter")
    num_workers: int = Field(default=1, ge=1)
    seed: int = Field(default=0, ge=0)


class EncoderConfig(_Section):
    """The video-text encoder; without weights they are random, and every report says so."""

    name: str = "viclip-l14"
    weights: str | None = Field(
        default=None, description="safetensors or .pth file, or a folder with model.safetensors"
    )
    seed: int = Field(default=0, ge=0, description="seed of random weights")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    train: EncoderTrainingConfig | None = None


class EmbedConfig(_Section):
    """The actor pool that slices and embeds."""

    num_actors: int = Field(default=1, ge=1, description="least actors")
    max_actors: int | None = Field(default=None, ge=1, description="most actors; default: no autoscaling")
    num_cpus: float = Field(default=1.0, gt=0, description="CPUs reserved by one actor")
    num_gpus: float = Field(default=0.0, ge=0, description="GPUs reserved by one actor")
    num_threads: int = Field(default=2, ge=1, description="decoding and torch threads of one actor")
    batch_size: int = Field(default=32, ge=1)
    rows_per_block: int = Field(default=256, ge=1, description="unit of work, of progress and of what a crash repeats")


class PolygonsConfig(_Section):
    """Administrative polygons to use instead of the offline default geography."""

    admin0: str
    admin1: str | None = None
    admin2: str | None = None


class GeocellsConfig(_Section):
    """How the Earth is partitioned."""

    method: Literal["admin", "kmeans"] = "admin"
    min_panoramas: int = Field(default=30, ge=1)
    max_panoramas: int = Field(default=60, ge=1)
    num_cells: int | None = Field(default=None, ge=1, description="kmeans only; default: from the bounds")
    polygons: PolygonsConfig | None = None
    seed: int = Field(default=0, ge=0)


class TrainingConfig(_Section):
    """Projection and geocell classifier."""

    use_text: bool = Field(
        default=True, description="concatenate the caption's embedding (paper) or use the image alone"
    )
    projection_dim: int = Field(default=768, ge=1)
    hidden_dim: int = Field(default=0, ge=0, description="0: one linear projection, as in the paper")
    cosine: bool = Field(default=False, description="cosine logits with a learned scale")
    loss: Literal["ce", "haversine", "haversine_raw"] = "haversine"
    tau_km: float = Field(default=75.0, gt=0)
    epochs: int = Field(default=50, ge=1)
    batch_size: int = Field(default=256, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    caption_dropout: float = Field(default=0.0, ge=0, le=1)
    patience: int = Field(default=10, ge=1, description="epochs without a better validation loss before stopping")
    num_workers: int = Field(default=1, ge=1)
    use_gpu: bool = False
    seed: int = Field(default=0, ge=0)


class IndexConfig(_Section):
    """What the retriever searches."""

    embedding: Literal["projected", "image"] = "projected"
    storage: Literal["fp16", "fp32"] = "fp16"


class RetrieveConfig(_Section):
    """Cell, then neighbour."""

    num_cells: int = Field(default=5, ge=1)
    cell_mass: float | None = Field(
        default=None, gt=0, le=1, description="smallest set of cells with this posterior mass"
    )
    num_neighbours: int = Field(default=5, ge=1)
    log_prob_weight: float = Field(default=0.0, ge=0, description="score = cosine + this x log p(cell)")
    refine: Literal["neighbour", "cell", "mean"] = "neighbour"


class EvaluateConfig(_Section):
    """Scores, intervals and floors."""

    num_bootstrap: int = Field(default=1000, ge=10)
    baseline: EncoderConfig | None = Field(default=None, description="the mean-pooled CLIP to compare with")
    seed: int = Field(default=0, ge=0)


class ServeConfig(_Section):
    """The HTTP service."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    num_replicas: int = Field(default=1, ge=1)
    num_cpus: float = Field(default=1.0, gt=0)
    num_gpus: float = Field(default=0.0, ge=0)
    max_ongoing_requests: int = Field(default=8, ge=1)
    max_queued_requests: int = Field(default=64, ge=1)
    request_timeout_s: float = Field(default=30.0, gt=0)


class ClusterConfig(_Section):
    """Which Ray: a local one made for this run, or the cluster at an address."""

    address: str | None = Field(default=None, description="None starts a local Ray; 'auto' inside a submitted job")
    num_cpus: int | None = Field(default=None, ge=1, description="logical CPUs of a local Ray; default max(4, cores)")


class Experiment(_Section):
    """Everything one run needs to know."""

    name: str = Field(default="experiment", min_length=1)
    preset: Literal["paper", "paper-fixed", "pigeon", "hedwig"] = "hedwig"
    output: str = Field(min_length=1, description="run folder; local, s3:// or gs://")
    seed: int = Field(default=0, ge=0)
    data: DataConfig = DataConfig()
    slicing: SlicingConfig = SlicingConfig()
    captions: CaptionsConfig = CaptionsConfig()
    encoder: EncoderConfig = EncoderConfig()
    embed: EmbedConfig = EmbedConfig()
    geocells: GeocellsConfig = GeocellsConfig()
    training: TrainingConfig = TrainingConfig()
    index: IndexConfig = IndexConfig()
    retrieve: RetrieveConfig = RetrieveConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    serve: ServeConfig = ServeConfig()
    cluster: ClusterConfig = ClusterConfig()


# What each preset changes of the defaults above. Differences from the paper are listed in README.md.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "slicing": {"mode": "paper", "select": "uniform", "align_north": False},
        "geocells": {"method": "kmeans", "num_cells": 100, "min_panoramas": 1, "max_panoramas": 1_000_000},
        "training": {"loss": "ce", "epochs": 1, "patience": 1},
    },
    "paper-fixed": {
        "slicing": {"mode": "wrap"},
        "geocells": {"method": "kmeans", "num_cells": 100, "min_panoramas": 1, "max_panoramas": 1_000_000},
        "training": {"loss": "ce"},
    },
    "pigeon": {
        "slicing": {"mode": "wrap"},
        "training": {"loss": "haversine_raw", "use_text": False},
        "index": {"embedding": "image"},
    },
    "hedwig": {
        "training": {"hidden_dim": 512, "cosine": True, "caption_dropout": 0.3},
        "retrieve": {"log_prob_weight": 0.1},
    },
}


class _Loader(yaml.SafeLoader):
    """SafeLoader without aliases and duplicate keys, and with ``1e-3`` read as the number it is."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.YAMLError(f"aliases (*name) are not allowed, line {mark.line + 1}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.YAMLError(f"the key {key!r} is given twice, line {key_node.start_mark.line + 1}")
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 wants a dot and a sign in a float's exponent; nobody writes learning rates that way.
_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_EXPONENT = re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$")
for _first in "-+0123456789":
    _Loader.yaml_implicit_resolvers.setdefault(_first, []).insert(0, ("tag:yaml.org,2002:float", _EXPONENT))


def parse_yaml(text: str, *, where: str) -> Any:
    """Parse YAML (or JSON) safely; errors are ConfigErrors that name `where`."""
    if len(text.encode()) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{where} is larger than {MAX_CONFIG_BYTES} bytes; an experiment file has a few kB.")
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  (a SafeLoader subclass)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{where} is nested too deeply to be an experiment.") from error


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _override(settings: dict[str, Any], assignment: str) -> None:
    key, sign, text = assignment.partition("=")
    if not sign or not key.strip():
        raise ConfigError(f"Override {assignment!r} is not of the form key=value, for example training.epochs=10.")
    *sections, last = key.strip().split(".")
    target = settings
    for depth, name in enumerate(sections):
        if target.get(name) is None:
            target[name] = {}
        target = target[name]
        if not isinstance(target, dict):
            raise ConfigError(f"Override {assignment!r}: {'.'.join(sections[: depth + 1])} is a value, not a section.")
    target[last] = parse_yaml(text, where=f"The value of override {key!r}")


def validate_experiment(settings: Mapping[str, Any], *, where: str = "The experiment") -> Experiment:
    """Turn plain settings into an Experiment, the preset's values beneath them.

    Raises:
        ConfigError: one line per wrong key, with a suggestion for a misspelt one.
    """
    preset = settings.get("preset", "hedwig")
    merged = _merge(PRESETS.get(preset, {}) if isinstance(preset, str) else {}, settings)
    try:
        # Through JSON, strict mode accepts a list for a tuple and 1 for 1.0, and still no "1" for 1.
        return Experiment.model_validate_json(json.dumps(merged))
    except ValidationError as error:
        lines = [_explain(item) for item in error.errors()]
        raise ConfigError(f"{where} has {len(lines)} error(s):\n" + "\n".join(f"  {line}" for line in lines)) from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where} cannot be read: {error}. Dates and binary values are not settings.") from error


def _explain(item: Any) -> str:
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"Unknown key {path!r}.{suggestion(str(item['loc'][-1]), _siblings(item['loc']))}"
    if item["type"] == "missing":
        return f"Missing key {path!r}."
    return f"{path}: {item['msg']}, got {item['input']!r}."


def _siblings(location: tuple[Any, ...]) -> list[str]:
    model: Any = Experiment
    for part in location[:-1]:
        annotation = model.model_fields[str(part)].annotation
        options = (annotation, *getattr(annotation, "__args__", ()))
        model = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(model.model_fields)


def load_experiment(path: str | Path, overrides: Iterable[str] = ()) -> Experiment:
    """Read an experiment YAML and apply ``key=value`` overrides.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: the file or an override is wrong.
    """
    file = Path(path)
    if not file.is_file():
        known = ", ".join(sorted(p.name for p in Path("experiments").glob("*.yaml"))) or "none here"
        raise FileNotFoundError(f"No experiment file {str(path)!r}; files in experiments/: {known}.")
    if file.stat().st_size > MAX_CONFIG_BYTES:
        raise ConfigError(f"{file} is larger than {MAX_CONFIG_BYTES} bytes; an experiment file has a few kB.")
    settings = parse_yaml(file.read_text(encoding="utf-8"), where=str(file))
    if not isinstance(settings, dict):
        raise ConfigError(f"{file} holds {type(settings).__name__}, not a mapping of sections.")
    for assignment in overrides:
        _override(settings, assignment)
    return validate_experiment(settings, where=str(file))


def json_schema() -> dict[str, Any]:
    """JSON Schema of an experiment file, for editors."""
    return Experiment.model_json_schema()
