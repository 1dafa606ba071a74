"""The HTTP service: images and embeddings in, places and their evidence out, on Ray Serve or without it.

`create_app` is plain FastAPI around anything that can locate; `build`, `start` and `stop` run it on Ray Serve;
`Client` asks a running service. Names are resolved on first use, so that asking needs neither Ray nor FastAPI.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hedwig.serving.app import create_app
    from hedwig.serving.client import Client
    from hedwig.serving.deployment import build, start, start_ray, stop
    from hedwig.serving.limits import LOOPBACK_NAMES, Limits
    from hedwig.serving.messages import ErrorAnswer, LocateAnswer
    from hedwig.serving.releases import Locator, Release

__all__ = [
    "LOOPBACK_NAMES",
    "Client",
    "ErrorAnswer",
    "Limits",
    "LocateAnswer",
    "Locator",
    "Release",
    "build",
    "create_app",
    "start",
    "start_ray",
    "stop",
]

_HOMES = {
    "app": ("create_app",),
    "client": ("Client",),
    "deployment": ("build", "start", "start_ray", "stop"),
    "limits": ("LOOPBACK_NAMES", "Limits"),
    "messages": ("ErrorAnswer", "LocateAnswer"),
    "releases": ("Locator", "Release"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"hedwig.serving.{module}"), name)
    raise AttributeError(f"module 'hedwig.serving' has no attribute {name!r}")
