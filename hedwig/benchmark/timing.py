"""Timing of steps that are compared: one after the other in every round, so that noise meets all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

__all__ = ["interleaved"]


def interleaved(steps: dict[str, Callable[[], object]], num_rounds: int) -> dict[str, float]:
    """Median CPU seconds of each step over `num_rounds`, one after the other in every round; the first is dropped."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(num_rounds + 1):
        for name, step in steps.items():
            start = time.process_time()
            step()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}
