"""Where and how things run, and not what comes out: the sections of the service, of Ray and of object storage."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["ClusterConfig", "Section", "ServeConfig", "StorageConfig"]


class Section(BaseModel):
    """What is true of every section: no unknown keys, no conversions, and never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)


class ServeConfig(Section):
    """The HTTP service; options of `hedwig serve` win over these."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    num_replicas: int = Field(default=1, ge=1)
    max_replicas: int | None = Field(default=None, ge=1, description="most replicas; default: no autoscaling")
    upscale_delay_s: float = Field(default=10.0, ge=0, description="how long replicas are too busy before one comes")
    downscale_delay_s: float = Field(
        default=600.0, ge=0, description="how long they have too little to do before one goes; it took long to load"
    )
    proxy: Literal["auto", "python", "haproxy"] = Field(
        default="auto",
        description="haproxy: faster, repeats what a lost replica took with it; loopback only. auto: where it can be",
    )
    num_cpus: float = Field(default=1.0, gt=0)
    num_gpus: float = Field(default=0.0, ge=0)
    encoder: Literal["together", "apart"] = Field(
        default="together", description="apart: in replicas of its own, which take the requests of all in batches"
    )
    encoder_replicas: int = Field(default=1, ge=1)
    encoder_num_cpus: float = Field(default=1.0, gt=0)
    encoder_num_gpus: float = Field(default=1.0, ge=0, description="apart: 0 encodes on the CPU")
    encoder_batch: int = Field(default=16, ge=1, description="apart: most panoramas at once")
    encoder_wait_ms: float = Field(default=5.0, ge=0, description="apart: how long to wait for so many")
    shards: int = Field(default=1, ge=1, description="pieces of the index; 1: whole in every replica")
    shard_replicas: int = Field(
        default=1, ge=1, description="processes of the same piece; 2: a killed one is not missed"
    )
    shard_num_cpus: float = Field(default=1.0, gt=0)
    max_index_mb: int | None = Field(
        default=None, ge=1, description="a larger index (MiB of vectors) is cut into as many pieces as it takes"
    )
    max_ongoing_requests: int = Field(default=8, ge=1)
    max_queued_requests: int = Field(default=64, ge=1)
    request_timeout_s: float = Field(default=30.0, gt=0)
    decode: Literal["process", "thread"] = Field(
        default="process", description="process: one that is killed when an image hangs, crashes or overfills it"
    )
    decode_timeout_s: float = Field(default=5.0, gt=0)
    rate_per_s: float = Field(
        default=50.0, ge=0, description="requests of one key, or of one address where there are no keys; 0: no limit"
    )
    rate_burst: int = Field(default=100, ge=1, description="requests at once after a pause")
    cors_origins: tuple[str, ...] = Field(default=(), description="whose pages may use the API; none by default")
    min_precision_km: float = Field(default=0.0, ge=0, description="no answer is finer than squares of this side")
    audit_folder: str | None = Field(default=None, description="local folder of the audit log; none keeps no log")


class ClusterConfig(Section):
    """Which Ray: a local one made for this run, or the cluster at an address."""

    address: str | None = Field(default=None, description="None starts a local Ray; 'auto' inside a submitted job")
    num_cpus: int | None = Field(default=None, ge=1, description="logical CPUs of a local Ray; default max(4, cores)")


class StorageConfig(Section):
    """How object storage is reached; None leaves it to the environment. Credentials are never settings."""

    endpoint_url: str | None = Field(default=None, description="S3 service that is not AWS's, e.g. https://store:9000")
    region: str | None = None
    anonymous: bool | tuple[str, ...] | None = Field(
        default=None, description="true: sign nothing; or the buckets to ask so, e.g. s3://open-data"
    )
    max_attempts: int | None = Field(default=None, ge=1, description="how often a request is tried in all")
