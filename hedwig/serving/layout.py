"""Which deployments a service consists of: the replicas that answer, and beside them an encoder and shards, if asked.

Together in one replica is the default and the fastest where it fits: each hop between deployments costs 2 to 10 ms. The
encoder apart pays where a GPU is to be filled from several CPU replicas, shards where the vectors do not fit beside
each other. Every shard is a deployment of its own: what one deployment's replicas hold, Serve does not know, and would
ask any of them. Numbers only; what is in the deployments is in `encoder_pool` and `shards`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, Literal

from hedwig.publishing import published_folder
from hedwig.storage import exists, join, read_bytes

__all__ = ["Layout", "index_bytes"]

_MIB = 2**20


@dataclass(frozen=True)
class Layout:
    """What stands beside the replicas that answer.

    Attributes:
        encoder: "together" with them, or "apart" in replicas of its own.
        encoder_replicas: How many, apart.
        encoder_num_cpus: Reserved per encoder.
        encoder_num_gpus: Likewise; 0 encodes on the CPU.
        encoder_batch: Most panoramas that an encoder takes at once, of whatever requests.
        encoder_wait_ms: How long it waits for so many.
        shards: Pieces of the index; 1 keeps it in the replicas.
        shard_replicas: Processes that hold the same piece; from 2 on a killed one is not missed.
        shard_num_cpus: Reserved per shard and replica.
        max_index_mb: Where the vectors take more MiB, as many shards as bring each below it, and at least `shards`.
    """

    encoder: Literal["together", "apart"] = "together"
    encoder_replicas: int = 1
    encoder_num_cpus: float = 1.0
    encoder_num_gpus: float = 1.0
    encoder_batch: int = 16
    encoder_wait_ms: float = 5.0
    shards: int = 1
    shard_replicas: int = 1
    shard_num_cpus: float = 1.0
    max_index_mb: int | None = None

    def __post_init__(self) -> None:
        if self.encoder not in ("together", "apart"):
            raise ValueError(f"encoder is {self.encoder!r}; it must be 'together' or 'apart'.")
        for name in ("encoder_replicas", "encoder_batch", "shards", "shard_replicas", "max_index_mb"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        for name in ("encoder_num_cpus", "encoder_num_gpus", "encoder_wait_ms", "shard_num_cpus"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be below 0.")

    @property
    def encoder_apart(self) -> bool:
        """Whether there are encoders of their own."""
        return self.encoder == "apart"

    def num_shards(self, run: str) -> int:
        """Pieces that the index of what is published in a run folder is cut into now; 1 for none.

        The number stays when a larger index is published later; deploy again to have it cut anew.
        """
        if self.max_index_mb is None:
            return self.shards
        return max(self.shards, math.ceil(index_bytes(published_folder(run)) / (self.max_index_mb * _MIB)))

    def needed(self, num_shards: int) -> dict[str, float]:
        """CPUs and GPUs of what stands beside the replicas."""
        cpus = num_shards * self.shard_replicas * self.shard_num_cpus if num_shards > 1 else 0.0
        gpus = 0.0
        if self.encoder_apart:
            cpus += self.encoder_replicas * self.encoder_num_cpus
            gpus += self.encoder_replicas * self.encoder_num_gpus
        return {"CPU": cpus, "GPU": gpus}


def index_bytes(run: str) -> int:
    """Bytes of the coded vectors of a run's index, as its headers say; they are checked when it is opened.

    Raises:
        FileNotFoundError: there is no index.
        ValueError: its header is none.
    """
    from hedwig.index.codecs import code_bytes
    from hedwig.index.files import ADDED_FOLDER, HEADER_FILE

    total = 0
    for name in (HEADER_FILE, join(ADDED_FOLDER, HEADER_FILE)):
        path = join(run, "index", name)
        if name != HEADER_FILE and not exists(path):
            continue
        try:
            header: dict[str, Any] = json.loads(read_bytes(path))
            num = int(header["num_rows"]) * int(header["num_frames"])
            total += num * code_bytes(header["codec"], int(header["dim"]))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no header of an index ({error!r:.80}); run `hedwig index` again.") from error
    return total
