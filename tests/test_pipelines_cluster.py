import os

import pytest
import ray

from hedwig import faults
from hedwig.config import ClusterConfig
from hedwig.pipelines import cluster


@pytest.fixture
def asked(monkeypatch):
    """What `ray.init` is called with; Ray is not started."""
    calls = []
    for name in (*faults.VARIABLES, "RAY_OVERRIDE_JOB_RUNTIME_ENV", "RAY_ADDRESS", *cluster._ENVIRONMENT):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: calls.append(options))
    monkeypatch.setattr(ray, "cluster_resources", dict)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(cluster, "ensure_token", lambda: None)
    return calls


def test_a_cluster_is_told_how_storage_is_reached_and_no_secret(asked, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    cluster.use_storage({"endpoint_url": "https://store:9000", "region": "eu-1", "anonymous": True, "max_attempts": 3})
    with cluster.ray_running(ClusterConfig(address="auto")):
        pass
    assert asked[0]["runtime_env"] == {
        "env_vars": {
            "AWS_ENDPOINT_URL_S3": "https://store:9000",
            "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
            "AWS_REGION": "eu-1",
            "AWS_DEFAULT_REGION": "eu-1",
            "AWS_MAX_ATTEMPTS": "3",
            "HEDWIG_ANONYMOUS": "1",
        }
    }
    assert "hush" not in str(asked)
    assert os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] == "1"
    assert (faults.max_attempts(), faults.is_anonymous("gs://any/x")) == (3, True)


def test_nothing_said_is_nothing_told_and_a_local_ray_inherits(asked):
    cluster.use_storage({"endpoint_url": None, "region": None, "anonymous": None, "max_attempts": None})
    with cluster.ray_running(ClusterConfig(address="auto")):
        pass
    assert asked[0]["runtime_env"] is None
    assert "RAY_OVERRIDE_JOB_RUNTIME_ENV" not in os.environ
    cluster.use_storage({"max_attempts": 2})
    with cluster.ray_running(ClusterConfig()):
        assert os.environ["AWS_MAX_ATTEMPTS"] == "2"
    assert asked[1]["address"] == "local"
    assert "runtime_env" not in asked[1]
