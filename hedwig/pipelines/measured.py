"""Where the time of a row flow goes: measured in the workers, summed beside the driver, told to Prometheus.

After every batch a worker reports what the chain spent: rows, rejected rows, bytes of images, and for each stage the
seconds on the clock and of the CPU. One small actor sums them for the manifest, the progress and the summary; Ray's
metrics carry the same as ``ray_hedwig_*`` at every node's metrics port. The sums are of one run: rows that an earlier,
killed run had done are not in them. They live in memory, and a lost sum loses no row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

__all__ = ["Meter", "Reporter", "measured_record", "meter_actor"]

COUNTERS = {
    "rows": ("hedwig_rows", "Rows that came out of a chain, rejected ones included."),
    "rejected": ("hedwig_rows_rejected", "Rows that were rejected."),
    "bytes_in": ("hedwig_image_bytes", "Bytes of encoded images read."),
}
CLOCKS = {"wall_s": "clock", "cpu_s": "cpu"}


class Meter:
    """Sums of what workers report; lives in an actor without CPUs."""

    def __init__(self) -> None:
        self._sums: defaultdict[str, float] = defaultdict(float)

    def add(self, spent: Mapping[str, float]) -> None:
        """Add one batch."""
        for name, value in spent.items():
            self._sums[name] += value

    def totals(self) -> dict[str, float]:
        """All sums so far."""
        return dict(self._sums)


def meter_actor() -> Any:
    """A `Meter` in an actor of this driver."""
    import ray

    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Meter).remote()


class Reporter:
    """What a worker tells after every batch.

    Args:
        kind: the artefact being made, for the metrics' tag.
        meter: handle of the `Meter`; None reports to Prometheus alone.
    """

    def __init__(self, kind: str, meter: Any) -> None:
        from ray.util.metrics import Counter

        self._kind, self._meter = kind, meter
        self._counters = {n: Counter(name, text, tag_keys=("kind",)) for n, (name, text) in COUNTERS.items()}
        seconds = "Seconds in a stage, by the clock and of the CPU (all threads of the worker)."
        self._seconds = Counter("hedwig_stage_seconds", seconds, tag_keys=("kind", "stage", "clock"))

    def __call__(self, spent: Mapping[str, float]) -> None:
        """Report one batch, as `hedwig.pipelines.chain.Chain.spent` has it."""
        if self._meter is not None:
            self._meter.add.remote(dict(spent))
        for name, value in spent.items():
            if value <= 0:  # a counter takes no zero
                continue
            what, _, stage = name.partition(":")
            if stage:
                self._seconds.inc(value, {"kind": self._kind, "stage": stage, "clock": CLOCKS[what]})
            elif what in self._counters:
                self._counters[what].inc(value, {"kind": self._kind})


def measured_record(
    totals: Mapping[str, float], seconds: float, num_workers: int, plan: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The sums as a manifest keeps them.

    Returns:
        ``rows, rejected, bytes_in`` of this run, ``seconds`` on the driver's clock, ``workers``, what `plan` holds, and
        per stage ``wall_s`` and ``cpu_s``, summed over the workers.
    """
    record: dict[str, Any] = {name: int(totals.get(name, 0)) for name in COUNTERS}
    record |= {"seconds": round(seconds, 3), "workers": num_workers, **(plan or {})}
    for clock in CLOCKS:
        stages = {name.split(":", 1)[1]: round(value, 3) for name, value in totals.items() if name.startswith(clock)}
        record[clock] = stages
    return record
