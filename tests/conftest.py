"""Fixtures that every test may use: the shared reference folder, when there is one, and one Ray for the session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("RAY_DATA_USE_DATASOURCE_V2", "0")  # V2 starts 32 footer actors for one small file
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HEDWIG_STREETVIEW_KEY", "canary-streetview-key")  # workers get the environment Ray began with
os.environ.pop("RAY_ADDRESS", None)  # never attach to somebody's cluster
# Ray's workers import the stages that tests define.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference numbers and real images, kept beside the checkout; its tests are skipped where it is absent."""
    folder = Path(os.environ.get("HEDWIG_SHARED", Path(__file__).parents[1].parent / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip(f"no reference folder at {folder}; set HEDWIG_SHARED to run this test")
    return folder


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray for the whole session: starting it per test would cost minutes."""
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=512 * 1024**2,
        configure_logging=False,
    )
    yield
    ray.shutdown()
