"""The safety settings of a service in one value that travels to its replicas, and what a replica makes of them.

It holds digests of keys and no key. Files, processes and actors are opened in the replica and not before.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from hedwig.serving.keys import KeyRing
from hedwig.serving.limits import Limits

__all__ = ["Safety"]


@dataclass(frozen=True)
class Safety:
    """What protects a service.

    Attributes:
        keys: Who is let in; None lets everybody in, which only a service on loopback may do.
        rate_per_s: Requests per second of one key, or of one address where there are no keys; 0 for no limit.
        rate_burst: Requests at once after a pause.
        decode: "process" for workers that can be killed, "thread" for none.
        decode_timeout_s: For one image.
        cors_origins: Origins whose pages may use the API.
        min_precision_km: No answer is finer than squares of this side; 0 tells all.
        audit_folder: Local folder of the audit log; None keeps none.
        num_replicas: Among which the rate is divided while they cannot talk to each other.
    """

    keys: KeyRing | None = None
    rate_per_s: float = 0.0
    rate_burst: int = 100
    decode: str = "process"
    decode_timeout_s: float = 5.0
    cors_origins: Collection[str] = ()
    min_precision_km: float = 0.0
    audit_folder: str | None = None
    num_replicas: int = 1

    def __post_init__(self) -> None:
        if self.decode not in ("process", "thread"):
            raise ValueError(f"decode is {self.decode!r}; it must be 'process' or 'thread'.")
        if self.rate_burst < 1:
            raise ValueError(f"rate_burst is {self.rate_burst}; it must be at least 1.")
        if self.rate_per_s < 0 or self.min_precision_km < 0:
            raise ValueError(
                f"rate_per_s={self.rate_per_s:g} and min_precision_km={self.min_precision_km:g}: not below 0."
            )

    def open(self, limits: Limits) -> dict[str, Any]:
        """The keyword arguments of `create_app`, for one replica, with its workers and files.

        Args:
            limits: Of the same replica.
        """
        from ray import serve

        from hedwig.serving.audit import AuditLog
        from hedwig.serving.decoding import DecodePool
        from hedwig.serving.rates import Rate, open_rates

        pool = rates = audit = None
        if self.decode == "process":
            pool = DecodePool(
                limits.num_threads,
                max_pixels=limits.max_pixels,
                max_jpeg_pixels=limits.max_jpeg_pixels,
                timeout_s=self.decode_timeout_s,
            )
        if self.rate_per_s > 0:
            rates = open_rates(Rate(self.rate_per_s, self.rate_burst), num_replicas=self.num_replicas)
        if self.audit_folder is not None:
            audit = AuditLog(self.audit_folder, serve.get_replica_context().replica_tag)
        return {
            "keys": None if self.keys is None else self.keys.settled(),
            "rates": rates,
            "decode": pool,
            "cors_origins": tuple(self.cors_origins),
            "min_precision_km": self.min_precision_km,
            "audit": audit,
        }
