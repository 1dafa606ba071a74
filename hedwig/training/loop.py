"""What both trainings share: starting Ray Train, checkpoints, resuming, the schedule and the sums over workers.

Ray Train keeps the newest checkpoints of a run under ``scratch/run_name`` and restarts its workers from them; the same
call after the driver was killed continues there, and a finished run returns without starting anything. Every worker
count runs the same code; 0 workers is Ray Train's local mode, in this process and without restarts. Ray Train only
takes up a report when it polls, so the poll is made shorter than its default of 2 s, and epochs that are shorter still
share a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, LoggingConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch import Tensor

from hedwig.storage import exists, join, resolve

__all__ = [
    "Reporter",
    "gather",
    "jsonl",
    "payload_of",
    "restore",
    "run",
    "schedule",
    "seeded",
    "settings_digest",
    "sum_over_workers",
]

POLL_S = "0.2"
MAX_FAILURES = 3
STATE = "state.pt"


def run(
    worker: Callable[[dict[str, Any]], None],
    settings: Mapping[str, Any],
    *,
    payload: Any,
    scratch: str,
    run_name: str,
    num_workers: int,
    use_gpu: bool,
    datasets: Mapping[str, Any] | None = None,
    min_workers: int | None = None,
    cpus_per_worker: int = 1,
) -> dict[str, Any]:
    """Run `worker(settings)` on `num_workers` Ray Train workers, and return the state it reported last.

    Args:
        worker: reports through a `Reporter`, at the end with ``finished=True``.
        settings: what JSON can hold; it decides whether an earlier run of this name may be continued.
        payload: arrays for the workers, through Ray's object store; they find it with `payload_of`.
        scratch: folder or URI of the runs; all workers must reach it.
        run_name: the same name continues a run, another one starts afresh.
        num_workers: DDP processes; 0 trains in this process, without restarts.
        use_gpu: one GPU per worker, else its CPUs.
        datasets: Ray datasets by name, split among the workers.
        min_workers: start with so many where the cluster has no room for more, and go on with as many as are left
            when a node is lost; None asks for exactly `num_workers`. Ray looks for room to grow once a minute.
        cpus_per_worker: CPUs of a worker without a GPU, and its threads.

    Raises:
        ValueError: the run was started with other settings or on other data.
        ray.train.TrainingFailedError: a worker failed more than three times.
    """
    if num_workers < 0:
        raise ValueError(f"num_workers must be at least 0, got {num_workers}.")
    if min_workers is not None and not 1 <= min_workers <= num_workers:
        raise ValueError(f"min_workers must be 1 to num_workers ({num_workers}), got {min_workers}.")
    if cpus_per_worker < 1:
        raise ValueError(f"cpus_per_worker must be at least 1, got {cpus_per_worker}.")
    scratch, digest = resolve(scratch), settings_digest(settings)
    earlier = _earlier(join(scratch, run_name)) if num_workers else None
    if earlier is not None and earlier.metrics is not None and earlier.checkpoint is not None:
        if earlier.metrics["settings_digest"] != digest:
            raise ValueError(
                f"The run {run_name!r} in {scratch!r} was made with other settings or data; choose another "
                "run_name, or delete that folder to start afresh."
            )
        if earlier.metrics["finished"]:
            return _state(earlier.checkpoint)
    with ExitStack() as stack:
        stack.enter_context(_quiet_and_quick())
        local = stack.enter_context(tempfile.TemporaryDirectory(prefix="hedwig-train-")) if num_workers == 0 else None
        internal = {
            "settings_digest": digest,
            "checkpoint_folder": local,
            "payload": ray.put(payload) if num_workers else payload,
            "num_threads": cpus_per_worker if num_workers and not use_gpu else None,
        }
        trainer = TorchTrainer(
            worker,
            train_loop_config={**settings, **internal},
            scaling_config=ScalingConfig(
                num_workers=num_workers if min_workers in (None, num_workers) else (min_workers, num_workers),
                use_gpu=use_gpu,
                resources_per_worker={"GPU": 1} if use_gpu else {"CPU": cpus_per_worker},
            ),
            run_config=RunConfig(
                storage_path=scratch,
                name=run_name,
                failure_config=FailureConfig(max_failures=MAX_FAILURES),
                checkpoint_config=CheckpointConfig(num_to_keep=2),
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
            datasets=dict(datasets or {}),
        )
        result = trainer.fit()
        if result.checkpoint is None:
            raise RuntimeError(f"The run {run_name!r} ended without a checkpoint. This is a bug: report it.")
        return _state(result.checkpoint)


def settings_digest(settings: Mapping[str, Any]) -> str:
    """sha256 of settings that JSON can hold."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def payload_of(settings: Mapping[str, Any]) -> Any:
    """The payload that `run` was given, in the worker."""
    payload = settings["payload"]
    return ray.get(payload) if isinstance(payload, ray.ObjectRef) else payload


def _earlier(folder: str) -> Result | None:
    # Ray makes the folder before the first checkpoint, and the snapshot with it.
    if not exists(join(folder, "checkpoint_manager_snapshot.json")):
        return None
    return Result.from_path(folder)


def _state(checkpoint: Checkpoint) -> dict[str, Any]:
    with checkpoint.as_directory() as folder:
        state: dict[str, Any] = torch.load(Path(folder, STATE), map_location="cpu", weights_only=True)
    return state


@contextmanager
def _quiet_and_quick() -> Iterator[None]:
    """Environment of a fit, put back afterwards, with the signal handler that fit replaces."""
    wanted = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": POLL_S}
    if ray.is_initialized() and sum(node["Alive"] for node in ray.nodes()) == 1:
        wanted["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # nobody outlives the only node; saves a process
    added = {key: value for key, value in wanted.items() if key not in os.environ}
    os.environ.update(added)
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    log = logging.getLogger("ray.train")  # local mode does not heed LoggingConfig
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
        for key in added:
            os.environ.pop(key, None)
        if in_main:
            signal.signal(signal.SIGINT, handler)


class Reporter:
    """Reports states to Ray Train, at most one per `interval_s` unless it is the last.

    Args:
        settings: what `run` handed to the worker.
        interval_s: the least time between two checkpoints; 0 for one per epoch.
    """

    def __init__(self, settings: Mapping[str, Any], interval_s: float) -> None:
        self.settings = settings
        self.interval_s = interval_s
        self.last = time.monotonic()

    def __call__(self, state: Callable[[], dict[str, Any]], metrics: Mapping[str, Any], *, finished: bool) -> None:
        """Report `metrics` and, from the first worker, a checkpoint of `state()`; all workers must call.

        The first worker's clock decides for all, so that none waits for a report that others skip.
        """
        due = torch.tensor(float(finished or time.monotonic() - self.last >= self.interval_s))
        if dist.is_initialized():
            device = ray.train.torch.get_device() if dist.get_backend() == "nccl" else torch.device("cpu")
            due = due.to(device)
            dist.broadcast(due, src=0)
        if not due.item():
            return
        report = {**metrics, "finished": finished, "settings_digest": self.settings["settings_digest"]}
        checkpoint = None
        if ray.train.get_context().get_world_rank() == 0:
            folder = tempfile.mkdtemp(prefix="checkpoint-", dir=self.settings["checkpoint_folder"])
            torch.save(state(), Path(folder, STATE))
            checkpoint = Checkpoint.from_directory(folder)
        ray.train.report(report, checkpoint=checkpoint, delete_local_checkpoint_after_upload=True)
        self.last = time.monotonic()


def restore() -> dict[str, Any] | None:
    """The state to continue from, tensors on the CPU; None at the start of a run."""
    checkpoint = ray.train.get_checkpoint()
    return None if checkpoint is None else _state(checkpoint)


def schedule(step: int, num_steps: int, warmup_fraction: float) -> float:
    """Factor on the learning rate: linear from 0 over the warm-up, then half a cosine down to 0 (SGDR, one cycle)."""
    warmup = warmup_fraction * num_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1.0, num_steps - warmup))))


def seeded(*words: int) -> torch.Generator:
    """A generator decided by `words`, for instance seed, epoch and rank; close words give unrelated streams."""
    state = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator().manual_seed(state)


def sum_over_workers(values: Tensor) -> Tensor:
    """Elementwise sum of a CPU tensor over all workers."""
    if not dist.is_initialized():
        return values
    on_device = values.to(ray.train.torch.get_device()) if dist.get_backend() == "nccl" else values.clone()
    dist.all_reduce(on_device)
    return on_device.to(values.device)


def gather(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The arrays of all workers, one after the other by rank."""
    if not dist.is_initialized():
        return values
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, values)
    return np.concatenate(parts)


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    """One JSON object per line."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
