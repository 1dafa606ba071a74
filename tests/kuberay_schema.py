"""Cuts KubeRay's CRDs, a megabyte each, down to what our manifests use, so that tests can check these offline.

    python tests/kuberay_schema.py FOLDER

FOLDER holds ray.io_rayclusters.yaml, ray.io_rayjobs.yaml and ray.io_rayservices.yaml of KubeRay's
ray-operator/config/crd/bases (Apache-2.0).

The manifests are checked against the whole schemas first. In what is kept every object is closed, so a misspelt key or
one that is new to our manifests fails the test until this is run again. KubeRay itself ignores unknown keys.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import jsonschema
import yaml

ROOT = Path(__file__).parents[1]
TARGET = Path(__file__).with_suffix(".json")
VERSION = "v1.7.0"
CRDS = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayService": "rayservices"}
KEPT = ("type", "enum", "minimum", "maximum", "pattern", "required")


def manifests() -> dict[str, list[dict[str, Any]]]:
    """Kind -> the documents of that kind in cluster_configs/kuberay/."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((ROOT / "cluster_configs" / "kuberay").glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            found.setdefault(document["kind"], []).append(document)
    return found


def closed(schema: Any) -> Any:
    """The schema with unknown keys refused wherever it lists the known ones."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        result.setdefault("additionalProperties", False)
    return result


def reduced(schema: dict[str, Any], values: list[Any]) -> dict[str, Any]:
    """The part of `schema` that `values` touch, closed."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    kept = {key: schema[key] for key in KEPT if key in schema}
    if "properties" in schema:
        used = sorted({key for value in values for key in value} | set(schema.get("required", ())))
        kept["properties"] = {
            key: reduced(schema["properties"][key], [value[key] for value in values if key in value]) for key in used
        }
        kept["additionalProperties"] = False
    elif isinstance(schema.get("additionalProperties"), dict):
        kept["additionalProperties"] = reduced(schema["additionalProperties"], [x for v in values for x in v.values()])
    if "items" in schema:
        kept["items"] = reduced(schema["items"], [item for value in values for item in value])
    return kept


def main(folder: Path) -> None:
    """Write kuberay_schema.json."""
    documents = manifests()
    result: dict[str, Any] = {
        "$comment": f"Reduced from the CRDs of KubeRay {VERSION} (Apache-2.0) by kuberay_schema.py."
    }
    digests: dict[str, str] = {}
    for kind, plural in CRDS.items():
        data = (folder / f"ray.io_{plural}.yaml").read_bytes()
        digests[plural] = hashlib.sha256(data).hexdigest()
        crd = yaml.load(data, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        version = next(v for v in crd["spec"]["versions"] if v["name"] == "v1" and v["storage"])
        schema = version["schema"]["openAPIV3Schema"]
        name = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
        schema["properties"]["metadata"] = name  # Kubernetes' own: the CRD says only that it is an object
        for document in documents[kind]:
            jsonschema.validate(document, closed(schema))
        result[kind] = reduced(schema, documents[kind])
        if kind == "RayCluster":
            # The CRD has the types of NetworkPolicy too, for its own option.
            rules = schema["properties"]["spec"]["properties"]["networkPolicy"]["properties"]["head"]["properties"]
            ingress, policies = rules["ingressRules"], documents["NetworkPolicy"]
            selector = ingress["items"]["properties"]["from"]["items"]["properties"]["podSelector"]
            types = {"type": "array", "items": {"type": "string", "enum": ["Ingress", "Egress"]}}
            parts = {"podSelector": selector, "policyTypes": types, "ingress": ingress}
            spec = {"type": "object", "properties": parts, "required": ["podSelector", "policyTypes"]}
            whole = {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": name, "spec": spec}
            policy = {"type": "object", "properties": whole, "required": list(whole)}
            for document in policies:
                jsonschema.validate(document, closed(policy))
            result["NetworkPolicy"] = reduced(policy, policies)
    result["sha256"] = digests
    lines = [f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in result.items()]
    TARGET.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
