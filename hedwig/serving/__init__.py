"""The HTTP service: one route that takes an image and says where it was taken, on Ray Serve or without it.

`create_app` is plain FastAPI around anything that can locate; `build`, `start` and `stop` run it on Ray Serve;
`locate_remote` asks a running service. Names are resolved on first use, so that asking needs neither Ray nor FastAPI.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hedwig.serving.app import Locator, create_app
    from hedwig.serving.client import locate_remote
    from hedwig.serving.deployment import build, start, stop
    from hedwig.serving.limits import LOOPBACK_NAMES, Limits
    from hedwig.serving.messages import ErrorAnswer, LocateAnswer

__all__ = [
    "LOOPBACK_NAMES",
    "ErrorAnswer",
    "Limits",
    "LocateAnswer",
    "Locator",
    "build",
    "create_app",
    "locate_remote",
    "start",
    "stop",
]

_HOMES = {
    "app": ("Locator", "create_app"),
    "client": ("locate_remote",),
    "deployment": ("build", "start", "stop"),
    "limits": ("LOOPBACK_NAMES", "Limits"),
    "messages": ("ErrorAnswer", "LocateAnswer"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"hedwig.serving.{module}"), name)
    raise AttributeError(f"module 'hedwig.serving' has no attribute {name!r}")
