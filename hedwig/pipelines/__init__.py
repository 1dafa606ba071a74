"""Every flow of hedwig on Ray, and the run that strings them together.

The names below are imported when they are asked for: the small actors that run beside a flow live in this package too,
and must not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hedwig.pipelines.cluster import ray_running, use_storage
    from hedwig.pipelines.experiment import plan, run_experiment, run_job
    from hedwig.pipelines.rows import TooManyRejected
    from hedwig.pipelines.run import Run
    from hedwig.pipelines.world import render_world

__all__ = ["Run", "TooManyRejected", "plan", "ray_running", "render_world", "run_experiment", "run_job", "use_storage"]

_HOMES = {
    "Run": "run",
    "TooManyRejected": "rows",
    "plan": "experiment",
    "ray_running": "cluster",
    "render_world": "world",
    "run_experiment": "experiment",
    "run_job": "experiment",
    "use_storage": "cluster",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
