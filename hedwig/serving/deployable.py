"""A Serve config file for a run: what ``serve deploy`` and a RayService take.

It names `hedwig.serving.deployment.application`, and everything in it can be read by everybody who reads the cluster's
API: no key is in it, the nodes have those in their environment. Ray checks values but lets a misspelt name pass, so
names are checked here against the fields of Ray's own schema, and those of the application against `build`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel
from ray.serve.schema import HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

from hedwig.serving.deployment import build, is_loopback
from hedwig.serving.layout import Layout
from hedwig.serving.safety import Safety
from hedwig.storage import resolve

__all__ = ["check_deployable", "deployable"]

_HEADER = """# serve deploy {name}     (Ray {ray}; checked against its schema)
# API keys: HEDWIG_API_KEYS_FILE in the environment of every node; without keys the application refuses to start.
"""
_PLACES = ("host", "port", "proxy")  # of the service, not of the application
_APPLICATION = "hedwig.serving.deployment:application"
_OWN = frozenset({"insecure"})  # what `application` itself reads


def deployable(
    run: str, settings: Mapping[str, Any], *, insecure: bool = False, name: str = "serve.yaml"
) -> tuple[dict[str, Any], str]:
    """The config of a service of `run`, and its YAML.

    Args:
        run: Run folder, as every node reaches it.
        settings: The ``serve`` section of an experiment.
        insecure: Ask nobody for a key.
        name: Of the file, for its first line.

    Raises:
        ValueError: a setting that there is not, or a value that Ray or `build` refuses.
    """
    import ray
    import yaml

    host, port = settings.get("host", "127.0.0.1"), settings.get("port", 8000)
    arguments: dict[str, Any] = {"run": resolve(run)}
    arguments |= {key: _plain(value) for key, value in settings.items() if key not in _PLACES and value is not None}
    if not is_loopback(host):
        arguments.setdefault("allowed_hosts", ["*"])
    if insecure:
        arguments["insecure"] = True
    config = {
        "proxy_location": "HeadOnly" if is_loopback(host) else "EveryNode",
        # Above the replica's own limits, which answer in JSON.
        "http_options": {
            "host": host,
            "port": port,
            "request_timeout_s": 2 * settings.get("request_timeout_s", 30.0) + 15.0,
        },
        "applications": [
            {"name": "hedwig", "route_prefix": "/", "import_path": _APPLICATION, "args": arguments},
        ],
    }
    check_deployable(config)
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    return config, _HEADER.format(name=name, ray=ray.__version__) + text


def check_deployable(config: Mapping[str, Any]) -> None:
    """Check a Serve config: values by Ray's schema, names by ours.

    Raises:
        ValueError: names that Ray or the application does not know, or values that they refuse.
    """
    unknown = _unknown(config, ServeDeploySchema)
    for number, application in enumerate(config.get("applications", ())):
        where = f"applications[{number}]"
        unknown += [f"{where}.{name}" for name in _unknown(application, ServeApplicationSchema)]
        if application.get("import_path") == _APPLICATION:
            unknown += [f"{where}.args.{name}" for name in sorted(set(application.get("args", {})) - _known())]
    unknown += [f"http_options.{name}" for name in _unknown(config.get("http_options", {}), HTTPOptionsSchema)]
    if unknown:
        raise ValueError(f"The Serve config has names that nobody reads: {', '.join(unknown)}; correct or remove them.")
    ServeDeploySchema.model_validate(config)


def _known() -> set[str]:
    """Names that `application` takes."""
    makers: tuple[Callable[..., Any], ...] = (build, Layout, Safety)
    takes = {name for maker in makers for name in inspect.signature(maker).parameters} | _OWN
    return takes - {"more", "keys", "load"}


def _unknown(section: Mapping[str, Any], schema: type[BaseModel]) -> list[str]:
    fields = set(schema.model_fields) | {str(field.alias) for field in schema.model_fields.values()}
    return sorted(set(section) - fields)


def _plain(value: Any) -> Any:
    """Tuples as lists: YAML has no tuples that a safe reader takes."""
    return list(value) if isinstance(value, tuple) else value
