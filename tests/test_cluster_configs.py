import os
import re
import subprocess
import sys

import pytest
import yaml


@pytest.fixture
def root(pytestconfig):
    return pytestconfig.rootpath


def test_the_autoscaler_accepts_the_aws_configuration(root, monkeypatch):
    from ray.autoscaler._private.util import prepare_config, validate_config

    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    config = yaml.safe_load((root / "cluster_configs" / "aws.yaml").read_text())
    validate_config(prepare_config(config))
    with pytest.raises(Exception, match="max_wrokers"):
        validate_config(prepare_config({**config, "max_wrokers": 3}))
    assert config["available_node_types"]["head"]["resources"]["CPU"] == 0
    starts = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    assert all("RAY_AUTH_MODE=token" in command for command in starts if "ray start" in command)


def test_the_kuberay_job_has_tokens_scales_to_zero_gpus_and_drops_privileges(root):
    job = yaml.safe_load((root / "cluster_configs" / "kuberay.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"]["mode"] == "token"
    assert cluster["enableInTreeAutoscaling"] is True
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert groups["gpu"]["minReplicas"] == 0
    templates = [cluster["headGroupSpec"]["template"]] + [group["template"] for group in groups.values()]
    for template in templates:
        for container in template["spec"]["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]


def test_the_ray_version_is_the_one_we_pin(root):
    pinned = re.search(r"^ray==(\S+)", (root / "constraints.txt").read_text(), re.M).group(1)
    job = yaml.safe_load((root / "cluster_configs" / "kuberay.yaml").read_text())
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == pinned


def test_the_constraints_name_no_address(root):
    text = (root / "constraints.txt").read_text()
    assert "://" not in text
    assert "torch==" in text
    assert "torchvision==" in text


@pytest.mark.parametrize("name", ["caption", "embed", "evaluate", "geocells", "index", "predict", "run", "train"])
def test_job_scripts_are_thin_and_name_a_stage_that_exists(root, name):
    from hedwig.pipelines.run import STAGE_FOLDERS

    text = (root / "ray_jobs" / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 25
    stage = re.search(r'stage="(\w+)"', text)
    assert (stage is None) == (name == "run")
    assert stage is None or stage.group(1) in STAGE_FOLDERS


def test_a_job_without_an_experiment_says_what_it_wants(root):
    command = [sys.executable, str(root / "ray_jobs" / "embed.py")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)})
    assert done.returncode != 0
    assert "usage: EXPERIMENT" in done.stderr


def test_docker_files_copy_what_the_package_needs(root):
    for name in ("cpu", "gpu"):
        text = (root / "docker" / f"{name}.Dockerfile").read_text()
        for needed in ("pyproject.toml constraints.txt README.md LICENSE NOTICE", "COPY hedwig hedwig", "USER hedwig"):
            assert needed in text
    assert "uninstall --yes faiss-cpu" in (root / "docker" / "gpu.Dockerfile").read_text()
