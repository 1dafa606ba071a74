"""What reaches TensorBoard and MLflow, by doubles of both packages: neither is a dependency."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import ClassVar

import pytest

from hedwig.training import tracking
from hedwig.training.tracking import Tracker

ROW = {"epoch": 3, "train_loss": 1.5, "val_loss": 2}


class Board:
    made: ClassVar[list[Board]] = []

    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder, self.purge_step, self.calls = folder, purge_step, []
        Board.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.calls.append((name, value, step))

    def flush(self) -> None:
        self.calls.append("flush")

    def close(self) -> None:
        self.calls.append("close")


@pytest.fixture
def doubles(monkeypatch: pytest.MonkeyPatch) -> list:
    calls: list = []
    flow = types.ModuleType("mlflow")
    for name in ("start_run", "log_params", "log_metrics", "end_run"):
        setattr(flow, name, lambda *args, name=name, **options: calls.append((name, args, options)))
    board = types.ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = Board
    monkeypatch.setitem(sys.modules, "mlflow", flow)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setattr(Board, "made", [])
    known = importlib.util.find_spec
    monkeypatch.setattr(
        tracking.importlib.util, "find_spec", lambda name: name in ("tensorboard", "mlflow") or known(name)
    )
    return calls


def test_curves_reach_both(doubles, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    track = Tracker(str(tmp_path), "run", {"loss": "ce", "rates": [1, 2], "payload": object()}, first_epoch=3)
    track(ROW)
    track.close()
    (board,) = Board.made
    assert Path(board.folder) == tmp_path / "run" / "tensorboard"
    assert board.purge_step == 3
    assert board.calls == [("train_loss", 1.5, 3), ("val_loss", 2.0, 3), "flush", "close"]
    assert doubles == [
        ("start_run", (), {"run_name": "run"}),
        ("log_params", ({"loss": '"ce"', "rates": "[1, 2]"},), {}),
        ("log_metrics", ({"train_loss": 1.5, "val_loss": 2.0},), {"step": 3}),
        ("end_run", (), {}),
    ]


def test_nothing_is_written_where_nobody_asked(doubles, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    track = Tracker("s3://bucket/scratch", "run", {}, first_epoch=0)
    track(ROW)
    track.close()
    assert Board.made == doubles == []
