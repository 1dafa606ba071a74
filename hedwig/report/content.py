"""What a report is made of: one frozen record, and its plain-JSON form.

The record is filled by the pipelines and read by the pictures and the page, so that neither of them opens an artefact
or computes a metric: a number that is not in here is not in the report. `report_json` is the machine's copy of the
page; it holds no NaN (JSON has none) and no picture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Floats", "ReportContent", "column", "plain", "report_json"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ReportContent:
    """Everything the report shows.

    Attributes:
        title: the experiment in a few words.
        experiment: the resolved experiment, as it ran.
        encoder_note: what the encoder's weights are, such as ``random weights (seed 0)``.
        synthetic: the panoramas were made up; the word then stands in the title and beside every number.
        evaluation: the record that `hedwig.evaluate` writes, or None without queries of known position.
        accounting: per stage ``stage, num_in, num_out, num_rejected, reasons`` (reason -> count).
        train: positions of the reference panoramas, degrees: lat (N,), lon (N,), float64.
        queries: columns of the queries, each (Q,): ``pano_id, lat, lon, pred_lat, pred_lon, error_km, confidence,
            radius_km, country``; a missing column is drawn as nothing.
        errors_km: method name -> (Q,) great-circle errors in km, for the distribution.
        geocells: a GeoDataFrame of ``cell_id, geometry, lat, lon, num_panoramas, country``, or None.
        land: country outlines, each (K, 2) of lat, lon in degrees.
        country_shapes: a GeoDataFrame of ``country, geometry`` for the map by country, or None.
        gallery: examples: ``pano_id, strip`` ((H, W, 3) uint8 or None), ``error_km, truth, prediction`` ((lat, lon)),
            ``caption, neighbours`` (each ``pano_id, lat, lon, score, strip``) and, if wished, ``kind`` and ``frames``
            ((V, S, S, 3) uint8: what the encoder saw).
        credits: lines to be shown with the data, as their licences ask.
        versions: package -> version.
        timings: stage -> seconds.
        commands: what to type to get this report again.
    """

    title: str
    experiment: Mapping[str, Any] = field(default_factory=dict)
    encoder_note: str = ""
    synthetic: bool = False
    evaluation: Mapping[str, Any] | None = None
    accounting: list[dict[str, Any]] = field(default_factory=list)
    train: tuple[Floats, Floats] = field(default_factory=lambda: (np.empty(0), np.empty(0)))
    queries: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    errors_km: Mapping[str, Floats] = field(default_factory=dict)
    geocells: Any = None
    land: list[Floats] = field(default_factory=list)
    country_shapes: Any = None
    gallery: list[dict[str, Any]] = field(default_factory=list)
    credits: list[str] = field(default_factory=list)
    versions: Mapping[str, Any] = field(default_factory=dict)
    timings: Mapping[str, Any] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)


def column(columns: Mapping[str, Any], name: str, num_rows: int | None = None) -> Floats:
    """A numeric column as float64 (N,); what is absent or None becomes NaN, `num_rows` long."""
    values = columns.get(name)
    if values is None:
        return np.full(num_rows or 0, np.nan)
    return np.asarray([np.nan if v is None else v for v in np.ravel(values)], dtype=np.float64)


def plain(value: Any) -> Any:
    """Any nesting of mappings, sequences, arrays and scalars as plain JSON; NaN and infinities become None."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, bytes | bytearray):
        raise ValueError(f"{len(value)} raw bytes cannot go into report.json; pass text or numbers.")
    return value.as_posix() if isinstance(value, PurePath) else str(value)


def report_json(content: ReportContent) -> dict[str, Any]:
    """The report as plain JSON: the figures and where they come from, without pictures."""
    evaluation = {key: value for key, value in (content.evaluation or {}).items() if key != "errors_km"}
    methods = evaluation.pop("methods", {})
    record: dict[str, Any] = plain(
        {
            "title": content.title,
            "synthetic": content.synthetic,
            "encoder_note": content.encoder_note,
            "methods": methods,
            "evaluation": evaluation if content.evaluation is not None else None,
            "accounting": content.accounting,
            "experiment": content.experiment,
            "timings": dict(content.timings),
            "versions": dict(sorted(content.versions.items())),
            "commands": content.commands,
            "credits": content.credits,
        }
    )
    return record
