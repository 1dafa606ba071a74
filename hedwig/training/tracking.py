"""Curves of a training where somebody can watch them: TensorBoard and MLflow, each only where it is installed.

The record of a run is its metrics.jsonl; this is a window onto it, written by the first worker while it trains.
TensorBoard files need the package tensorboard (the tensorboardX that Ray brings takes seconds to import, and nothing
here could show its files); MLflow is used only where MLFLOW_TRACKING_URI says where to, because without it MLflow
would write into the current folder.
A run that is continued goes on in the same TensorBoard folder, and as another run of the same name in MLflow.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from collections.abc import Mapping
from typing import Any

from hedwig.storage import join

__all__ = ["Tracker"]

MAX_PARAMETER = 500  # characters that MLflow takes of one


class Tracker:
    """Takes one row of metrics per epoch.

    Args:
        scratch: folder or URI of the runs; TensorBoard files go to ``scratch/run_name/tensorboard`` if it is a folder.
        run_name: of this run.
        settings: of this run, for MLflow; arrays among them are left out.
        first_epoch: where it starts; TensorBoard forgets what an earlier attempt wrote from there on.
    """

    def __init__(self, scratch: str, run_name: str, settings: Mapping[str, Any], *, first_epoch: int) -> None:
        self._board: Any = None
        if "://" not in scratch and importlib.util.find_spec("tensorboard"):
            writer: Any = importlib.import_module("torch.utils.tensorboard")
            self._board = writer.SummaryWriter(join(scratch, run_name, "tensorboard"), purge_step=first_epoch)
        self._flow: Any = None
        if os.environ.get("MLFLOW_TRACKING_URI") and importlib.util.find_spec("mlflow"):
            self._flow = importlib.import_module("mlflow")
            self._flow.start_run(run_name=run_name)
            plain = {
                key: value for key, value in settings.items() if isinstance(value, str | int | float | list | dict)
            }
            self._flow.log_params({key: json.dumps(value)[:MAX_PARAMETER] for key, value in plain.items()})

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Write the numbers of an epoch; `row` has ``epoch``."""
        epoch = int(row["epoch"])
        numbers = {key: float(value) for key, value in row.items() if key != "epoch"}
        if self._board is not None:
            for key, value in numbers.items():
                self._board.add_scalar(key, value, epoch)
            self._board.flush()
        if self._flow is not None:
            self._flow.log_metrics(numbers, step=epoch)

    def close(self) -> None:
        """Finish the files and the run."""
        if self._board is not None:
            self._board.close()
        if self._flow is not None:
            self._flow.end_run()
