"""Starting Ray, once per process: a local one for this run, or the cluster the job was submitted to.

A local Ray never attaches to somebody else's cluster on the same machine, opens no dashboard, and asks for tokens.
How storage is reached (`hedwig.faults`) is the driver's to say: its workers inherit it, on a cluster they are told.
Credentials are not told; each node has its own.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from hedwig.config import ClusterConfig
from hedwig.faults import VARIABLES, storage_variables
from hedwig.serving.tokens import ensure_token

__all__ = ["configure_data", "ray_running", "use_storage"]

logger = logging.getLogger(__name__)

# Read by Ray's processes when they start. V2 readers start up to 32 actors to read the footer of one small file;
# niceness 15, the default, starves workers beside any other program.
_ENVIRONMENT = {
    "RAY_DATA_USE_DATASOURCE_V2": "0",
    "RAY_worker_niceness": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_DEDUP_LOGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}


def use_storage(settings: Mapping[str, Any]) -> None:
    """Reach storage as an experiment says, from here and from the workers of the Ray that is started or joined next.

    Args:
        settings: keyword arguments of `hedwig.faults.storage_variables`; None leaves the environment as it is.
    """
    os.environ.update(storage_variables(**settings))


@contextmanager
def ray_running(cluster: ClusterConfig) -> Iterator[None]:
    """Ray for the length of the block; one that runs already is used and left running.

    Raises:
        ConnectionError: the cluster at ``cluster.address`` cannot be reached.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    if cluster.address is None:
        os.environ.pop("RAY_ADDRESS", None)
        ensure_token()
        cpus = cluster.num_cpus or max(4, os.cpu_count() or 1)
        # Logical CPUs: the checkpoint filter, a reader and one actor must fit at once, or Ray Data waits for ever.
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
        logger.info("started a local Ray with %d logical CPUs", cpus)
    else:
        told = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
        if told:
            os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")  # the job may have been sent with some of them
        ray.init(address=cluster.address, runtime_env={"env_vars": told} if told else None, **quiet)
        logger.info("connected to the Ray cluster at %s: %s", cluster.address, ray.cluster_resources())
    try:
        yield
    finally:
        ray.shutdown()


def configure_data(*, checkpoint: str | None = None, filesystem: object | None = None) -> None:
    """Set this process's Ray Data context: V1 readers, no progress bars of its own, and checkpoints if asked for."""
    import ray

    context = ray.data.DataContext.get_current()
    context.use_datasource_v2 = False
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.checkpoint_config = None
    if checkpoint is not None:
        from ray.data.checkpoint import CheckpointConfig

        context.checkpoint_config = CheckpointConfig(
            id_column="pano_id",
            checkpoint_path=checkpoint,
            delete_checkpoint_on_success=False,  # the next run would redo everything and append it
            override_filesystem=filesystem,
        )
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    logging.getLogger("ray").setLevel(logging.ERROR)
