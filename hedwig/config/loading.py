"""From YAML and ``key=value`` overrides to a validated Experiment, with errors that say what to type instead."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from hedwig.config.sections import Experiment
from hedwig.schema import suggestion

__all__ = [
    "ConfigError",
    "json_schema",
    "load_experiment",
    "merged_settings",
    "override",
    "parse_yaml",
    "read_settings",
    "validate_experiment",
]

MAX_CONFIG_BYTES = 1_000_000


class ConfigError(ValueError):
    """The experiment file or an override is wrong; the message has one line per key."""


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
        "retrieve": {"refine": "prototype"},
    },
    "hedwig": {
        "encoder": {"long_captions": "chunks"},
        "training": {"hidden_dim": 512, "cosine": True, "caption_dropout": 0.3},
        "index": {"embedding": "whitened", "tune": True},
        "retrieve": {"refine": "mean", "num_cells": 20, "cell_mass": 0.95, "num_neighbours": 10},
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


def merged_settings(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`below` with what `above` sets; sections are merged, values replaced."""
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merged_settings(merged[key], value)
        else:
            merged[key] = value
    return merged


def override(settings: dict[str, Any], assignment: str) -> None:
    """Apply one ``key=value`` in place."""
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
    merged = merged_settings(PRESETS.get(preset, {}) if isinstance(preset, str) else {}, settings)
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
    settings = read_settings(path)
    for assignment in overrides:
        override(settings, assignment)
    return validate_experiment(settings, where=str(path))


def read_settings(path: str | Path) -> dict[str, Any]:
    """The plain settings in a YAML file, not validated.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: it is too large, no YAML, or no mapping.
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
    return settings


def json_schema() -> dict[str, Any]:
    """JSON Schema of an experiment file, for editors."""
    return Experiment.model_json_schema()
