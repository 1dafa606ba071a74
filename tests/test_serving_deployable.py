"""Serve config files: what Ray accepts, and what it would silently pass over."""

from __future__ import annotations

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema
from test_serving_releases import version_folder
from typer.testing import CliRunner

from hedwig.cli import app
from hedwig.config import ServeConfig
from hedwig.serving import build
from hedwig.serving.deployable import check_deployable, deployable
from hedwig.serving.deployment import application, needed


def test_what_is_written_can_be_deployed_and_builds_the_same(monkeypatch):
    monkeypatch.delenv("HEDWIG_API_KEYS", raising=False)
    monkeypatch.delenv("HEDWIG_API_KEYS_FILE", raising=False)
    settings = {**ServeConfig().model_dump(), "cors_origins": ("https://a.example",), "num_replicas": 2}
    config, text = deployable("s3://bucket/runs/x", settings)
    assert yaml.safe_load(text) == config
    parsed = ServeDeploySchema.model_validate(yaml.safe_load(text))
    assert (parsed.http_options.host, parsed.http_options.port) == ("127.0.0.1", 8000)
    assert parsed.http_options.request_timeout_s == 75.0
    arguments = parsed.applications[0].args
    assert arguments["run"] == "s3://bucket/runs/x"
    assert arguments["cors_origins"] == ["https://a.example"]
    with pytest.raises(ValueError, match="no API keys"):
        application(arguments)
    bound = application({**arguments, "insecure": True})._bound_deployment
    assert bound._deployment_config.num_replicas == 2
    assert bound._deployment_config.graceful_shutdown_timeout_s == settings["request_timeout_s"]


def test_beyond_loopback_every_node_answers_and_names_are_the_gateways_business():
    config, _ = deployable("/runs/x", {"host": "0.0.0.0", "port": 9000}, insecure=True)
    assert config["proxy_location"] == "EveryNode"
    assert config["applications"][0]["args"] == {"run": "/runs/x", "allowed_hosts": ["*"], "insecure": True}


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ((), "aplications"),
        (("http_options",), "hots"),
        (("applications", 0), "import_pth"),
        (("applications", 0, "args"), "num_replica"),
        (("applications", 0, "args"), "keys"),
    ],
)
def test_a_misspelt_name_is_refused(where, name):
    config, _ = deployable("/runs/x", ServeConfig().model_dump())
    section = config
    for step in where:
        section = section[step]
    section[name] = 1
    with pytest.raises(ValueError, match=rf"nobody reads: .*{name}"):
        check_deployable(config)


def test_a_value_that_ray_refuses_is_refused():
    config, _ = deployable("/runs/x", ServeConfig().model_dump())
    config["http_options"]["port"] = "eight"
    with pytest.raises(ValueError, match="port"):
        check_deployable(config)


def test_replicas_grow_between_bounds():
    scaling = build("/runs/x", num_replicas=2, max_replicas=6, max_ongoing_requests=8, downscale_delay_s=60, keys=None)
    config = scaling._bound_deployment._deployment_config.autoscaling_config
    assert (config.min_replicas, config.max_replicas, config.target_ongoing_requests) == (2, 6, 4.0)
    assert (config.upscale_delay_s, config.downscale_delay_s) == (10, 60)
    fixed = build("/runs/x", num_replicas=2, max_replicas=2, keys=None)._bound_deployment._deployment_config
    assert (fixed.num_replicas, fixed.autoscaling_config) == (2, None)
    with pytest.raises(ValueError, match="max_replicas is 1"):
        build("/runs/x", num_replicas=2, max_replicas=1, keys=None)


def test_the_command_writes_the_file_and_serves_nothing(tmp_path):
    version_folder(tmp_path / "run", ".")
    path = tmp_path / "serve.yaml"
    done = CliRunner().invoke(
        app, ["serve", str(tmp_path / "run"), "--replicas", "3", "--port", "8123", "--write-config", str(path)]
    )
    assert done.exit_code == 0, done.output
    config = yaml.safe_load(path.read_text())
    assert config["applications"][0]["args"]["num_replicas"] == 3
    assert config["http_options"]["port"] == 8123
    assert path.read_text().startswith(f"# serve deploy {path}")


def bound_in(made):
    """The ingress's deployment, and those that it is handed: the encoder, the shards."""
    handed = made._bound_deployment.init_kwargs
    return made._bound_deployment, handed["encoder"], handed["shards"]


def test_by_default_there_is_one_deployment_and_a_layout_adds_others():
    _, encoder, shards = bound_in(build("/runs/x", keys=None))
    assert (encoder, shards) == (None, [])
    options = {
        **ServeConfig(
            encoder="apart", encoder_replicas=2, encoder_num_gpus=0.5, shards=3, shard_replicas=2
        ).model_dump(),
        "num_replicas": 4,
    }
    arguments = deployable("/runs/x", options)[0]["applications"][0]["args"]
    assert (arguments["encoder"], arguments["shards"]) == ("apart", 3)
    assert "max_index_mb" not in arguments
    ingress, encoder, shards = bound_in(application({**arguments, "insecure": True}))
    assert ingress.ray_actor_options["num_gpus"] == 0
    encoder = encoder._bound_deployment
    assert (encoder.name, encoder.num_replicas, encoder.ray_actor_options["num_gpus"]) == ("encoder", 2, 0.5)
    assert encoder.init_args[:4] == ("/runs/x", "cuda", 16, 0.005)
    assert encoder.max_ongoing_requests >= 2 * 16  # else Serve never fills a batch
    names = [shard._bound_deployment.name for shard in shards]
    assert names == ["shard-0", "shard-1", "shard-2"]
    for number, shard in enumerate(shards):
        assert shard._bound_deployment.num_replicas == 2
        assert shard._bound_deployment.init_args[:3] == ("/runs/x", number, 3)
    assert needed("/runs/x", options) == {"CPU": 4 + 2 + 6, "GPU": 1.0}
    assert needed("/runs/x", {**options, "max_replicas": 5}, most=True)["CPU"] == 13
    assert needed("/runs/x", ServeConfig().model_dump()) == {"CPU": 1.0, "GPU": 0.0}
    with pytest.raises(ValueError, match="encoder_num_gpus"):
        build("/runs/x", encoder="apart", num_gpus=1, keys=None)
