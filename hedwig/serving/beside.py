"""The deployments beside the replicas that answer: encoders and shards, bound and ready to be handed to these.

Only replicas ask them. What waits is bounded by what the replicas hold, so nothing is refused here.
"""

from __future__ import annotations

from typing import Any

from ray import serve

from hedwig.serving.layout import Layout
from hedwig.serving.shards import ShardReplica
from hedwig.storage import resolve

__all__ = ["encoders", "shards"]

_SHARD_QUESTIONS = 64  # that one of its processes takes at once; the rest wait with who asks


def encoders(run: str, layout: Layout, request_timeout_s: float) -> Any:
    """The encoders' deployment, bound; None where they are with the replicas that answer."""
    if not layout.encoder_apart:
        return None
    from hedwig.serving.encoder_pool import EncoderReplica

    num_gpus = layout.encoder_num_gpus
    options = {"num_cpus": layout.encoder_num_cpus, "num_gpus": num_gpus}
    deployment = _beside("encoder", layout.encoder_replicas, 2 * layout.encoder_batch, options, request_timeout_s)
    return deployment(EncoderReplica).bind(
        resolve(run),
        "cuda" if num_gpus > 0 else "cpu",
        layout.encoder_batch,
        layout.encoder_wait_ms / 1000,
        max(1, int(layout.encoder_num_cpus)),
        _keep_s(request_timeout_s),
    )


def shards(run: str, layout: Layout, num_shards: int, num_threads: int, request_timeout_s: float) -> list[Any]:
    """The deployment of every shard, bound; none where there is but one."""
    if num_shards == 1:
        return []
    options = {"num_cpus": layout.shard_num_cpus}
    return [
        _beside(f"shard-{shard}", layout.shard_replicas, _SHARD_QUESTIONS, options, request_timeout_s)(
            ShardReplica
        ).bind(resolve(run), shard, num_shards, num_threads, _keep_s(request_timeout_s))
        for shard in range(num_shards)
    ]


def _beside(name: str, num_replicas: int, at_once: int, options: dict[str, Any], request_timeout_s: float) -> Any:
    """A deployment that only replicas ask: bounded by what these hold, and quickly missed when it dies."""
    return serve.deployment(
        name=name,
        num_replicas=num_replicas,
        max_ongoing_requests=at_once,
        ray_actor_options=options,
        health_check_period_s=2.0,
        health_check_timeout_s=30.0,
        graceful_shutdown_timeout_s=request_timeout_s,
        max_constructor_retry_count=2,
    )


def _keep_s(request_timeout_s: float) -> float:
    """How long a version may go unasked before it is unloaded: well beyond the last request that began with it."""
    return max(60.0, 4 * request_timeout_s)
