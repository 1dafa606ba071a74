"""Cluster files against the schemas of their engines, offline: Ray's autoscaler and KubeRay's; Dockerfiles; scripts."""

import copy
import json
import os
import re
import runpy
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import jsonschema
import kuberay_schema
import pytest
import yaml

SCRIPTS = (
    "synth", "panoramas", "caption", "frames", "encoder", "embed", "baseline", "geocells", "train", "index", "predict",
    "evaluate",
)  # fmt: skip
COMMANDS = ("acquire", "synthesize", "experiment")


@pytest.fixture
def root(pytestconfig):
    return pytestconfig.rootpath


@pytest.fixture(params=["aws", "gcp"])
def autoscaler(request, root, monkeypatch):
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return yaml.safe_load((root / "cluster_configs" / f"{request.param}.yaml").read_text())


def test_the_autoscaler_accepts_its_configuration(autoscaler):
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(autoscaler)))
    with pytest.raises(Exception, match="max_wrokers"):
        validate_config(prepare_config({**copy.deepcopy(autoscaler), "max_wrokers": 3}))
    types = autoscaler["available_node_types"]
    assert types["head"]["resources"]["CPU"] == 0
    assert {name: t.get("min_workers") for name, t in types.items()} == {"head": None, "cpu": 0, "gpu_spot": 0}
    assert sum(t.get("max_workers", 0) for t in types.values()) == autoscaler["max_workers"]
    assert types["gpu_spot"]["labels"]["ray.io/market-type"] == "spot"
    spot = types["gpu_spot"]["node_config"]
    market = spot.get("InstanceMarketOptions", {}).get("MarketType") or spot["scheduling"]["provisioningModel"].lower()
    assert market == "spot"


def test_every_node_of_the_autoscaler_asks_for_the_token(autoscaler):
    starts = autoscaler["head_start_ray_commands"] + autoscaler["worker_start_ray_commands"]
    started = [command for command in starts if "ray start" in command]
    assert len(started) == 2
    assert all("RAY_AUTH_MODE=token ray start" in command for command in started)
    assert autoscaler["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    assert "--dashboard-host=127.0.0.1" in started[0]
    # What a stranger might have registered under our name is never installed: the checkout is.
    assert all("install" not in c or c.endswith((" .", "api-python-client")) or "uv==" in c or "venv" in c
               for c in autoscaler["setup_commands"])  # fmt: skip


def schemas():
    return json.loads(kuberay_schema.TARGET.read_text())


MANIFESTS = [
    (kind, document)
    for kind, documents in kuberay_schema.manifests().items()
    for document in documents
    if kind != "ServiceAccount"
]


@pytest.mark.parametrize(("kind", "document"), MANIFESTS, ids=[f"{k}-{d['metadata']['name']}" for k, d in MANIFESTS])
def test_the_manifests_obey_the_schema_of_their_engine(kind, document):
    jsonschema.validate(document, schemas()[kind])
    for spoil in (lambda d: d["spec"].update(shutdwon=True), lambda d: d.update(kind=3)):
        spoiled = copy.deepcopy(document)
        spoil(spoiled)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(spoiled, schemas()[kind])


def test_a_wrong_value_deep_in_a_manifest_is_found():
    job = copy.deepcopy(kuberay_schema.manifests()["RayJob"][0])
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplicas"] = "8"
    with pytest.raises(jsonschema.ValidationError, match="'8' is not of type 'integer'"):
        jsonschema.validate(job, schemas()["RayJob"])
    service = copy.deepcopy(kuberay_schema.manifests()["RayService"][0])
    service["spec"]["rayClusterConfig"]["authOptions"]["mode"] = "tokens"
    with pytest.raises(jsonschema.ValidationError, match="tokens"):
        jsonschema.validate(service, schemas()["RayService"])


def clusters():
    found = kuberay_schema.manifests()
    return {
        "RayCluster": found["RayCluster"][0]["spec"],
        "RayJob": found["RayJob"][0]["spec"]["rayClusterSpec"],
        "RayService": found["RayService"][0]["spec"]["rayClusterConfig"],
    }


def pods():
    for kind, cluster in clusters().items():
        yield f"{kind} head", cluster["headGroupSpec"]["template"]
        for group in cluster["workerGroupSpecs"]:
            yield f"{kind} {group['groupName']}", group["template"]
    yield "RayJob submitter", kuberay_schema.manifests()["RayJob"][0]["spec"]["submitterPodTemplate"]


@pytest.mark.parametrize(("name", "cluster"), list(clusters().items()))
def test_the_clusters_have_tokens_and_scale_their_gpus_to_zero(name, cluster, root):
    assert cluster["authOptions"] == {"mode": "token", "secretName": "hedwig-ray-token"}
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    gpus = [g for g in groups.values() if "nvidia.com/gpu" in containers(g["template"])[0]["resources"]["limits"]]
    assert gpus
    assert all(group["minReplicas"] == 0 for group in gpus)
    pinned = re.search(r"^ray==(\S+)", (root / "constraints.txt").read_text(), re.M).group(1)
    assert cluster["rayVersion"] == pinned


def containers(template):
    return template["spec"]["containers"]


def test_the_standing_cluster_and_that_of_a_job_are_the_same():
    assert clusters()["RayCluster"] == clusters()["RayJob"]


@pytest.mark.parametrize(("name", "template"), list(pods()))
def test_pods_run_unprivileged_on_a_read_only_root(name, template):
    spec = template["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 1000  # the user of the images
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert template["metadata"]["labels"]["app.kubernetes.io/part-of"] == "hedwig"  # what the NetworkPolicy goes by
    for container in containers(template):
        box = container["securityContext"]
        assert (box["allowPrivilegeEscalation"], box["readOnlyRootFilesystem"]) == (False, True)
        assert box["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"] or (
            "submitter" in name
        )
        assert {"name": "tmp", "mountPath": "/tmp"} in container["volumeMounts"]
        assert all("secret" not in str(entry.get("value", "")).lower() for entry in container.get("env", ()))
        if "submitter" not in name:
            assert container["livenessProbe"]["httpGet"] == {"path": "/api/healthz", "port": 52365}
            assert container["readinessProbe"]["httpGet"]["port"] in (52365, 8000)


def test_the_probed_path_needs_no_token():
    from ray.dashboard import http_server_agent

    assert "/api/healthz" in Path(http_server_agent.__file__).read_text()


def test_only_the_service_port_is_open_to_other_pods():
    opened = set()
    for policy in kuberay_schema.manifests()["NetworkPolicy"]:
        assert policy["spec"]["policyTypes"] == ["Ingress"]
        for rule in policy["spec"]["ingress"]:
            inside = [{"podSelector": {"matchLabels": {"app.kubernetes.io/part-of": "hedwig"}}}]
            operator = {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}
            if rule["from"] == inside or rule["from"][0].get("podSelector") == operator:
                continue
            opened |= {port["port"] for port in rule["ports"]}
    assert opened == {8000}


def test_the_service_is_what_serve_takes_and_the_job_is_a_script_of_ours(root):
    from ray.serve.schema import ServeDeploySchema

    found = kuberay_schema.manifests()
    config = yaml.safe_load(found["RayService"][0]["spec"]["serveConfigV2"])
    # Serve accepts misspelt keys, so they are compared with what it knows.
    assert set(config) <= set(ServeDeploySchema.model_fields)
    (application,) = ServeDeploySchema.model_validate(config).applications
    assert set(config["applications"][0]) <= set(type(application).model_fields)
    script, experiment = found["RayJob"][0]["spec"]["entrypoint"].split()[1:3]
    assert (root / script).is_file()
    assert (root / experiment).is_file()


def test_the_service_starts_with_keys_and_not_without(tmp_path, monkeypatch):
    from hedwig.serving import deployment
    from hedwig.serving.keys import new_key, write_keys

    config = yaml.safe_load(kuberay_schema.manifests()["RayService"][0]["spec"]["serveConfigV2"])["applications"][0]
    assert config["import_path"] == "hedwig.serving.deployment:application"
    built = []
    monkeypatch.setattr(deployment, "build", lambda **options: built.append(options))
    for name in ("HEDWIG_API_KEYS", "HEDWIG_API_KEYS_FILE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="no API keys"):
        deployment.application(config["args"])
    deployment.application({**config["args"], "insecure": True})
    assert built.pop()["keys"] is None
    path = tmp_path / "keys.json"
    write_keys(path, [new_key("somebody")[1]])
    monkeypatch.setenv("HEDWIG_API_KEYS_FILE", str(path))
    deployment.application(config["args"])
    assert len(built[0].pop("keys")) == 1
    assert built == [config["args"]]


def test_the_constraints_name_no_address(root):
    text = (root / "constraints.txt").read_text()
    assert "://" not in text
    assert "torch==" in text
    assert "torchvision==" in text


def test_there_is_a_job_script_for_every_stage(root):
    from hedwig.pipelines.run import STAGE_FOLDERS

    assert set(SCRIPTS) == set(STAGE_FOLDERS)
    for name in (*SCRIPTS, *COMMANDS, "run", "serve"):
        text = (root / "ray_jobs" / f"{name}.py").read_text()
        assert len(text.splitlines()) <= 25
        stage = re.search(r'stage="(\w+)"', text)
        assert (stage.group(1) if stage else None) == (name if name in SCRIPTS else None)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_job_script_of_a_command_joins_the_cluster_first(name, root, monkeypatch):
    import ray

    import hedwig.cli

    seen = []
    monkeypatch.setattr(ray, "init", lambda **options: seen.append(options))
    monkeypatch.setattr(hedwig.cli, "main", lambda: seen.append(list(sys.argv)))
    monkeypatch.setattr(sys, "argv", ["script", "x", "--out", "y"])
    runpy.run_path(str(root / "ray_jobs" / f"{name}.py"), run_name="__main__")
    assert seen[0] == {"address": "auto"}
    assert seen[1][1:] == [name, "x", "--out", "y"]


def test_a_job_without_an_experiment_says_what_it_wants(root):
    command = [sys.executable, str(root / "ray_jobs" / "embed.py")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)})
    assert done.returncode != 0
    assert "usage: EXPERIMENT" in done.stderr


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_docker_files_are_two_stages_without_root_and_copy_what_is_there(root, name):
    text = (root / "docker" / f"{name}.Dockerfile").read_text()
    assert len(re.findall(r"^FROM ", text, re.M)) == 2
    final = text.split("FROM ${BASE}\n")[1]
    assert "USER 1000:1000" in final
    assert final.index("USER") > max(m.start() for m in re.finditer(r"^(COPY|RUN) ", final, re.M))
    assert "HEALTHCHECK" in final
    assert "--constraint constraints.txt" in text
    assert not re.search(r"(?i)(key|token|secret|password)\s*=", text.replace("type=secret", ""))
    ignored = (root / ".dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.M):
        for source in sources.split():
            assert (root / source).exists()
            assert f"!{source.rstrip('/')}" in ignored
    assert ("faiss-gpu==$version" in text) == (name == "gpu")


class _Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(self.server.answer)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(("answer", "well"), [(200, True), (503, False), (None, None)])
def test_the_health_check_tells_well_from_ill_from_absent(root, answer, well):
    healthy = runpy.run_path(str(root / "docker" / "healthcheck.py"))["healthy"]
    server = HTTPServer(("127.0.0.1", 0), _Answer)
    server.answer = answer
    address = f"http://127.0.0.1:{server.server_port}/healthz"
    if answer is None:
        server.server_close()
        assert healthy(address) is None
        return
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    assert healthy(address) is well
    thread.join()
    server.server_close()


@pytest.mark.parametrize("arguments", [("-n", "99"), ("-n", "two"), ("-m", "10"), ("-x",)])
def test_the_local_cluster_refuses_what_one_machine_cannot_carry(root, arguments):
    script = root / "cluster_configs" / "local-multinode.sh"
    done = subprocess.run([script, *arguments, "--", "true"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert "local-multinode" in done.stderr
