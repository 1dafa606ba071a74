"""A matrix of experiments: one base, several axes, and every combination of their values as one experiment each.

The file is YAML with the same strictness as an experiment: ``base`` is an experiment without output, each axis maps a
label to the settings that it changes, ``exclude`` names combinations to leave out: ``{Axis: label}`` or, for any one of
several, ``{Axis: [label, label]}``. Labels are what the tables print.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hedwig.config.loading import ConfigError, merged_settings, override, read_settings, validate_experiment
from hedwig.config.sections import Experiment
from hedwig.schema import suggestion

__all__ = ["Cell", "Matrix", "load_matrix"]

KEYS = ("name", "output", "base", "axes", "exclude", "tables")
TABLES = (1, 3, 4)


@dataclass(frozen=True)
class Cell:
    """One combination.

    Attributes:
        labels: axis -> the label of its value.
        experiment: what to run.
    """

    labels: dict[str, str]
    experiment: Experiment

    @property
    def name(self) -> str:
        """The labels, joined."""
        return " · ".join(self.labels.values())


@dataclass(frozen=True)
class Matrix:
    """All experiments of a matrix file.

    Attributes:
        name: of the whole.
        output: folder; each experiment runs in a folder below it.
        axes: axis -> labels, in the order of the file.
        cells: the combinations, the last axis moving fastest.
        tables: which of the paper's tables to print.
    """

    name: str
    output: str
    axes: dict[str, list[str]]
    cells: list[Cell]
    tables: tuple[int, ...]


def load_matrix(path: str | Path, overrides: Iterable[str] = ()) -> Matrix:
    """Read a matrix file and apply ``key=value`` overrides, such as ``base.data.panoramas=listing.csv``.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: the file, an override, or one of the experiments is wrong.
    """
    where, settings = str(path), read_settings(path)
    for assignment in overrides:
        override(settings, assignment)
    for key in settings:
        if key not in KEYS:
            raise ConfigError(f"{where}: unknown key {key!r}; a matrix has {', '.join(KEYS)}.{suggestion(key, KEYS)}")
    base, axes = settings.get("base"), settings.get("axes")
    output = settings.get("output")
    if not isinstance(base, Mapping) or not isinstance(axes, Mapping) or not isinstance(output, str):
        raise ConfigError(f"{where}: a matrix needs base (settings), axes (label -> settings) and output (a folder).")
    for axis, values in axes.items():
        if not isinstance(values, Mapping) or not values or not all(isinstance(v, Mapping) for v in values.values()):
            raise ConfigError(f"{where}: axes.{axis} must map labels to settings, for example {{A: {{seed: 0}}}}.")
    tables = tuple(settings.get("tables", TABLES))
    wrong = [table for table in tables if table not in TABLES]
    if wrong:
        raise ConfigError(f"{where}: there is no table {wrong[0]!r}; the paper's are {', '.join(map(str, TABLES))}.")
    labels = {str(axis): [str(label) for label in values] for axis, values in axes.items()}
    excluded = [_combination(item, labels, where) for item in settings.get("exclude", [])]
    cells = []
    for chosen in itertools.product(*([(str(a), str(k), v) for k, v in axes[a].items()] for a in axes)):
        named = {axis: label for axis, label, _ in chosen}
        if any(all(named[axis] in some for axis, some in item.items()) for item in excluded):
            continue
        merged: dict[str, Any] = dict(base)
        for _, _, change in chosen:
            merged = merged_settings(merged, change)
        folder = "-".join(re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-") for label in named.values())
        merged |= {"output": f"{output.rstrip('/')}/{folder}", "name": " ".join(named.values())}
        cells.append(Cell(named, validate_experiment(merged, where=f"{where}, {' · '.join(named.values())}")))
    outputs = [cell.experiment.output for cell in cells]
    if len(set(outputs)) < len(outputs):
        raise ConfigError(f"{where}: two combinations have the same folder; use labels that differ in letters.")
    if not cells:
        raise ConfigError(f"{where}: no combination is left.")
    return Matrix(str(settings.get("name", "matrix")), output, labels, cells, tables)


def _combination(item: Any, axes: Mapping[str, list[str]], where: str) -> dict[str, list[str]]:
    """One entry of ``exclude``, checked: axis -> the labels, any of which counts."""
    if not isinstance(item, Mapping) or not item:
        raise ConfigError(f"{where}: exclude holds {item!r}; an entry maps axes to a label or a list of labels.")
    known = ", ".join(f"{name}: {'|'.join(values)}" for name, values in axes.items())
    chosen = {}
    for axis, given in item.items():
        some = given if isinstance(given, list) else [given]
        if not some:
            raise ConfigError(f"{where}: exclude names no label of {axis}; leave the axis out to mean all of them.")
        for label in some:
            if axis not in axes or str(label) not in axes[axis]:
                raise ConfigError(f"{where}: exclude names {axis}={label}, which no axis has; there are {known}.")
        chosen[str(axis)] = [str(label) for label in some]
    return chosen
