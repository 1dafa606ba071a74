"""From embeddings to an answer: cell, then neighbour, with the evidence and a calibrated radius.

`Retriever` needs only arrays. `Hedwig` and `Predictor` open a run folder; neither reads the experiment. Names are
resolved on first use: whoever handles predictions, such as a client of a service, needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hedwig.retrieve.build import build_index
    from hedwig.retrieve.calibration import Calibration, fit_radius_scale
    from hedwig.retrieve.prediction import Prediction
    from hedwig.retrieve.retriever import Retriever
    from hedwig.retrieve.run import Hedwig, Predictor, load_retriever

__all__ = [
    "Calibration",
    "Hedwig",
    "Prediction",
    "Predictor",
    "Retriever",
    "build_index",
    "fit_radius_scale",
    "load_retriever",
]

_HOMES = {
    "build": ("build_index",),
    "calibration": ("Calibration", "fit_radius_scale"),
    "prediction": ("Prediction",),
    "retriever": ("Retriever",),
    "run": ("Hedwig", "Predictor", "load_retriever"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"hedwig.retrieve.{module}"), name)
    raise AttributeError(f"module 'hedwig.retrieve' has no attribute {name!r}")
