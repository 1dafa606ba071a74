"""From embeddings to an answer: cell, then neighbour, with the evidence and a calibrated radius.

`Retriever` needs only arrays. `Hedwig` and `Predictor` open a run folder; neither reads the experiment.
"""

from __future__ import annotations

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
