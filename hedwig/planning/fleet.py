"""What one panorama costs, what a fleet offers, and so how long a job takes, what it costs and what holds it up.

Arithmetic on rates that were measured or stated elsewhere; each keeps a sentence about where it comes from. Reading,
decoding and slicing happen in the actor that owns the accelerator, before its forward pass: on one lane they add up
(`Rates.overlapped` false), unless the actor decodes the next batch meanwhile, and then the slower one decides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hedwig.planning.simulate import NodeFleet, expected

__all__ = ["GPUS", "Fleet", "Gpu", "Limits", "Outlook", "Rates", "clips_per_s_of", "limits_of", "node_fleet", "outlook"]


@dataclass(frozen=True)
class Gpu:
    """An accelerator: dense bf16 peak of the maker's data sheet in TFLOP/s (T4: fp16), and memory in GB."""

    peak_tflops: float
    memory_gb: int


# Dense, without sparsity.
GPUS: Mapping[str, Gpu] = {
    "h200": Gpu(989, 141),
    "h100": Gpu(989, 80),
    "a100": Gpu(312, 80),
    "l4": Gpu(121, 24),
    "t4": Gpu(65, 16),
}
# A good matrix product reaches about 0.8 of the peak (790 of 989 TFLOP/s on Hopper), a well-built encoder 0.6 of that.
SHARE_OF_PEAK = 0.8 * 0.6


def clips_per_s_of(gpu: str, flop_per_clip: float) -> float:
    """Estimated clips per second of a named GPU; only a measurement (`hedwig bench embed`) is better.

    Raises:
        ValueError: no such GPU is listed.
    """
    if gpu not in GPUS:
        raise ValueError(f"No figures for the GPU {gpu!r}; known are {', '.join(GPUS)}. State its rate: --clips-per-s.")
    return GPUS[gpu].peak_tflops * 1e12 * SHARE_OF_PEAK / flop_per_clip


@dataclass(frozen=True)
class Rates:
    """What one panorama costs.

    Attributes:
        bytes_in: read from storage.
        bytes_out: written.
        decode_s: CPU seconds to read, decode and slice it.
        overhead_s: CPU seconds of Ray's own work for it.
        clips_per_s: of one accelerator (for "cpu": of one actor), fed without a pause.
        overlapped: whether decoding goes on during the forward pass.
        sources: name of a figure -> where it comes from.
    """

    bytes_in: float
    bytes_out: float
    decode_s: float
    clips_per_s: float
    overhead_s: float = 0.0025
    overlapped: bool = False
    sources: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (self.clips_per_s > 0 and self.decode_s >= 0 and self.bytes_in > 0 and self.overhead_s >= 0):
            raise ValueError(f"Rates must be above 0: {self}.")


@dataclass(frozen=True)
class Fleet:
    """What the job gets.

    Attributes:
        num_gpus: accelerators (for "cpu": actors).
        gpus_per_node: of a whole node.
        cores_per_gpu: CPU cores that decode for one accelerator.
        storage_bytes_per_s: of all readers together; inf where nobody knows.
        startup_s: until a node that is there embeds its first panorama.
        provision_s: until a node that was asked for is there.
        preemptions_per_hour: of one node; 0: nobody takes it away.
        price_per_hour: of one accelerator with its share of the node, in any currency; None: unknown.
        block_rows: unit of work and of what a preemption repeats.
        nodes_per_minute: how fast the autoscaler asks for nodes.
    """

    num_gpus: int
    gpus_per_node: int = 8
    cores_per_gpu: float = 16.0
    storage_bytes_per_s: float = math.inf
    startup_s: float = 60.0
    provision_s: float = 0.0
    preemptions_per_hour: float = 0.0
    price_per_hour: float | None = None
    block_rows: int = 256
    nodes_per_minute: float = math.inf

    def __post_init__(self) -> None:
        if min(self.num_gpus, self.gpus_per_node, self.block_rows) < 1 or self.cores_per_gpu <= 0:
            raise ValueError(f"A fleet needs at least one accelerator, core and row in a block: {self}.")


@dataclass(frozen=True)
class Limits:
    """Panoramas per second of the whole fleet that each part would allow alone, and what all of them together give.

    Attributes:
        accelerator: forward passes.
        decode: the cores.
        storage: the bandwidth; inf where it is unknown.
        rows_per_s: what comes out.
        bottleneck: "accelerator", "decode" or "storage": the part that allows least.
        cores_needed_per_gpu: cores that decode as fast as one accelerator embeds.
        storage_needed: bytes per second read when no accelerator waits.
    """

    accelerator: float
    decode: float
    storage: float
    rows_per_s: float
    bottleneck: str
    cores_needed_per_gpu: float
    storage_needed: float


def limits_of(rates: Rates, fleet: Fleet) -> Limits:
    """Which part of a fleet allows how much."""
    cpu_s = rates.decode_s + rates.overhead_s
    accelerator = rates.clips_per_s * fleet.num_gpus
    decode = fleet.num_gpus * fleet.cores_per_gpu / cpu_s if cpu_s else math.inf
    storage = fleet.storage_bytes_per_s / rates.bytes_in
    lanes = min(accelerator, decode) if rates.overlapped else 1 / (1 / accelerator + 1 / decode)
    allowed = {"accelerator": accelerator, "decode": decode, "storage": storage}
    bottleneck = "storage" if storage < lanes else min(("accelerator", "decode"), key=lambda name: allowed[name])
    return Limits(
        **allowed,
        rows_per_s=min(lanes, storage),
        bottleneck=bottleneck,
        cores_needed_per_gpu=rates.clips_per_s * cpu_s,
        storage_needed=accelerator * rates.bytes_in,
    )


@dataclass(frozen=True)
class Outlook:
    """What a job comes to, by arithmetic.

    Attributes:
        num_rows: panoramas.
        limits: see `Limits`.
        bytes_read: from storage, what preemptions repeat included.
        bytes_written: to storage.
        seconds: wall time.
        gpu_hours: paid.
        cost: `gpu_hours` times the price; None without a price.
        useful: share of the paid time that goes into panoramas that are kept.
        preemptions: expected number of nodes taken away.
    """

    num_rows: int
    limits: Limits
    bytes_read: float
    bytes_written: float
    seconds: float
    gpu_hours: float
    cost: float | None
    useful: float
    preemptions: float

    def record(self) -> dict[str, Any]:
        """For JSON: one level deep, None for what is unknown."""
        limits = {f"{name}_rows_per_s": getattr(self.limits, name) for name in ("accelerator", "decode", "storage")}
        record = {
            "rows": self.num_rows,
            "bytes_read": round(self.bytes_read),
            "bytes_written": round(self.bytes_written),
            "seconds": self.seconds,
            "gpu_hours": self.gpu_hours,
            "cost": self.cost,
            "rows_per_s": self.limits.rows_per_s,
            "bottleneck": self.limits.bottleneck,
            "decode_cores_needed_per_gpu": self.limits.cores_needed_per_gpu,
            "storage_bytes_per_s_needed": self.limits.storage_needed,
            **limits,
            "useful_share": self.useful,
            "preemptions": self.preemptions,
        }
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def node_fleet(rates: Rates, fleet: Fleet) -> NodeFleet:
    """The fleet as `hedwig.planning.simulate` takes it: whole nodes of equal lanes."""
    lanes = min(fleet.gpus_per_node, fleet.num_gpus)
    free = limits_of(rates, Fleet(num_gpus=1, cores_per_gpu=fleet.cores_per_gpu))
    return NodeFleet(
        num_nodes=max(1, round(fleet.num_gpus / lanes)),
        lanes_per_node=lanes,
        rows_per_s=free.rows_per_s,
        block_rows=fleet.block_rows,
        provision_s=fleet.provision_s,
        startup_s=fleet.startup_s,
        preemptions_per_hour=fleet.preemptions_per_hour,
        nodes_per_minute=fleet.nodes_per_minute,
        bytes_per_row=rates.bytes_in,
        storage_bytes_per_s=fleet.storage_bytes_per_s,
    )


def outlook(rates: Rates, fleet: Fleet, num_rows: int) -> Outlook:
    """Time, cost and bytes of a job of `num_rows` panoramas.

    With preemptions the rate is the long-run one of `hedwig.planning.simulate.expected`.
    """
    limits, nodes = limits_of(rates, fleet), node_fleet(rates, fleet)
    average = expected(nodes)
    working = num_rows / (average.rows_per_s * nodes.num_nodes)
    ramp = nodes.num_nodes / fleet.nodes_per_minute * 60 / 2  # the nodes come one by one: half of them on average
    seconds = fleet.provision_s + fleet.startup_s + ramp + working
    paid_s = (fleet.startup_s + working * average.there) * nodes.num_nodes * nodes.lanes_per_node
    preemptions = nodes.num_nodes * average.preemptions_per_s * working
    redone = preemptions * nodes.lanes_per_node * fleet.block_rows / 2  # of a lost block, half was read on average
    return Outlook(
        num_rows=num_rows,
        limits=limits,
        bytes_read=(num_rows + redone) * rates.bytes_in,
        bytes_written=num_rows * rates.bytes_out,
        seconds=seconds,
        gpu_hours=paid_s / 3600,
        cost=None if fleet.price_per_hour is None else paid_s / 3600 * fleet.price_per_hour,
        useful=average.useful if fleet.preemptions_per_hour else working / (working + fleet.startup_s),
        preemptions=preemptions,
    )
