"""The embedding job against the bare model loop on the same decoded batches, and what Ray costs beside them.

`TimedEmbedder` embeds each batch twice inside the worker: once as the job does, and once more as the bare loop would,
the frames being there already. So the two meet the same load and clock, batch by batch. What the second pass takes is
left out of the job's time. Efficiency is the bare loop's seconds over the job's, from the first batch to the last, the
job's being everything from one batch to the next: reading, decoding, slicing, embedding, Ray. Ray's own CPU is that of
all processes below this one, less what the worker used inside its stages.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hedwig.embed import Embedder
from hedwig.schema import PANORAMAS
from hedwig.storage import join, read_table, write_bytes, write_table

__all__ = ["PipelineFigures", "StartClock", "TimedEmbedder", "figures_of", "measure_pipeline", "tree_cpu_s"]

Batch = dict[str, NDArray[Any]]
CLOCKS = ("began_s", "ended_s", "bare_s", "used_cpu_s")
TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")


class StartClock:
    """First stage of the job: notes when a batch began, as seconds since the epoch, and the CPU used by then."""

    reads = ("pano_id",)
    writes = ("began_s", "began_cpu_s")

    def __call__(self, batch: Batch) -> Batch:
        """(B,) float64 each, the same in all rows."""
        size = len(batch["pano_id"])
        return {**batch, "began_s": np.full(size, time.time()), "began_cpu_s": np.full(size, time.process_time())}


class TimedEmbedder:
    """Last stage of the job: an `Embedder` that does its work twice and notes what the second time took.

    Args:
        **options: of `Embedder`.
    """

    reads = (*Embedder.reads, "began_cpu_s")
    writes = (*Embedder.writes, "ended_s", "bare_s", "used_cpu_s")

    def __init__(self, **options: Any) -> None:
        self._embedder = Embedder(**options)

    def __call__(self, batch: Batch) -> Batch:
        """Seconds (B,) float64: of the end, of the second pass, and of CPU from the batch's begin to its end."""
        out = self._embedder(batch)
        began = time.perf_counter()
        self._embedder(batch)
        bare_s = time.perf_counter() - began
        used = time.process_time() - batch["began_cpu_s"]
        size = len(used)
        return {**out, "bare_s": np.full(size, bare_s), "ended_s": np.full(size, time.time()), "used_cpu_s": used}


@dataclass(frozen=True)
class PipelineFigures:
    """The figures of one job; see the module's text.

    Attributes:
        efficiency: bare loop's seconds over the job's in the steady state, 1 at best.
        startup_s: from the call to the first batch's begin, the model being loaded by then.
        panoramas_per_s: in the steady state, without the second pass.
        bare_panoramas_per_s: of the second pass alone.
        ray_cpu_ms_per_panorama: CPU of all processes in the steady state outside the worker's stages.
        num_panoramas: all of them.
        num_steady: those between the end of the first batch and the end of the last.
        batch_size: rows of a batch.
        model: name of the encoder.
    """

    efficiency: float
    startup_s: float
    panoramas_per_s: float
    bare_panoramas_per_s: float
    ray_cpu_ms_per_panorama: float
    num_panoramas: int
    num_steady: int
    batch_size: int
    model: str

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def text(self) -> str:
        """For readers."""
        return "\n".join(
            [
                f"{self.model}: {self.panoramas_per_s:.4g} panoramas/s end to end, {self.bare_panoramas_per_s:.4g} by "
                f"the bare model loop on the same batches of {self.batch_size}: efficiency {self.efficiency:.3f}",
                f"  the first batch began after {self.startup_s:.1f} s; {self.num_steady} of {self.num_panoramas} "
                "panoramas measured after it",
                f"  Ray's own CPU {self.ray_cpu_ms_per_panorama:.2f} ms per panorama",
            ]
        )


def measure_pipeline(
    job: Callable[[str, str, list[tuple[Any, dict[str, Any]]], pa.Schema], None],
    images: Sequence[bytes],
    folder: str,
    *,
    stages: Sequence[tuple[Any, dict[str, Any]]],
    model: str,
    num_panoramas: int,
    batch_size: int,
    **options: Any,
) -> PipelineFigures:
    """Embed a listing of `num_panoramas` rows and read the clocks.

    Args:
        job: what runs stages over a table: called with the source's folder, the result's, the stages (class and
            arguments) and the schema of the result.
        images: files to embed; rows repeat them.
        folder: where to work.
        stages: reading and slicing, before the encoder.
        model: name of the encoder.
        num_panoramas: N.
        batch_size: of the job, for the record and the encoder.
        **options: of `Embedder`.
    """
    paths = [join(folder, "images", f"{i}.jpg") for i in range(len(images))]
    for path, content in zip(paths, images, strict=True):
        write_bytes(path, content)
    rows = [
        {"pano_id": f"{i:08d}", "projection": "equirectangular", "split": "train", "image_uri": paths[i % len(paths)]}
        for i in range(num_panoramas)
    ]
    table = pa.Table.from_pylist(rows, schema=PANORAMAS)
    table = table.append_column("caption", pa.array([f"a street, number {i % 97}" for i in range(num_panoramas)]))
    write_table(join(folder, "source", "part-00000.parquet"), table)
    schema = pa.schema([("pano_id", pa.string()), *((name, pa.float64()) for name in CLOCKS)])
    whole = [(StartClock, {}), *stages, (TimedEmbedder, {"encoder_name": model, "batch_size": batch_size, **options})]
    began_s = time.time()
    with _Watch() as watch:
        job(join(folder, "source"), join(folder, "result"), whole, schema)
    clocks = read_table(join(folder, "result"))
    columns = {name: clocks[name].to_numpy() for name in CLOCKS}
    return figures_of(columns, watch.samples, began_s=began_s, batch_size=batch_size, model=model)


def figures_of(
    clocks: dict[str, NDArray[np.float64]],
    samples: Sequence[tuple[float, float]],
    *,
    began_s: float,
    batch_size: int,
    model: str,
) -> PipelineFigures:
    """The figures of one worker's clocks.

    Args:
        clocks: (N,) each of ``began_s, ended_s, bare_s, used_cpu_s``, the same in all rows of a batch.
        samples: (seconds since the epoch, CPU seconds of all processes) while the job ran.
        began_s: when it was called.
        batch_size: as set.
        model: name.

    Raises:
        ValueError: there were fewer than two batches.
    """
    ends, first, counts = np.unique(clocks["ended_s"], return_index=True, return_counts=True)
    if len(ends) < 2:
        raise ValueError(f"{len(clocks['ended_s'])} panoramas are {len(ends)} batch; take more, or smaller batches.")
    bare_s, used_s = clocks["bare_s"][first[1:]], clocks["used_cpu_s"][first[1:]]
    num = int(counts[1:].sum())
    job_s = ends[-1] - ends[0] - bare_s.sum()
    at, cpu_s = np.array(samples).T
    all_cpu_s = np.interp(ends[-1], at, cpu_s) - np.interp(ends[0], at, cpu_s)
    return PipelineFigures(
        efficiency=float(bare_s.sum() / job_s),
        startup_s=float(clocks["began_s"].min() - began_s),
        panoramas_per_s=float(num / job_s),
        bare_panoramas_per_s=float(num / bare_s.sum()),
        ray_cpu_ms_per_panorama=float(1000 * (all_cpu_s - used_s.sum()) / num),
        num_panoramas=len(clocks["ended_s"]),
        num_steady=num,
        batch_size=batch_size,
        model=model,
    )


class _Watch:
    """Samples the CPU of this process and all below it twice a second while the block runs."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, float]] = []
        self._seen: dict[tuple[int, int], float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._seen.update(tree_cpu_s(os.getpid()))  # those that have ended keep their last value
            self.samples.append((time.time(), sum(self._seen.values())))
            if self._stop.wait(0.5):
                return


def tree_cpu_s(root: int) -> dict[tuple[int, int], float]:
    """CPU seconds of a process and its descendants, by pid and start time, from /proc."""
    stats: dict[int, tuple[int, int, float]] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat", encoding="utf-8", errors="replace") as stream:
                fields = stream.read().rsplit(")", 1)[1].split()
        except (OSError, IndexError):
            continue  # it ended meanwhile
        stats[int(entry)] = (int(fields[1]), int(fields[19]), (int(fields[11]) + int(fields[12])) * TICK_S)
    found, below = {}, [root]
    while below:
        pid = below.pop()
        if pid in stats:
            found[(pid, stats[pid][1])] = stats[pid][2]
            below += [child for child, (parent, _, _) in stats.items() if parent == pid]
    return found
