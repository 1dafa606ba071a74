"""hedwig: where on Earth was this panorama taken, and what is the evidence?

``import hedwig`` loads neither torch nor ray: `Hedwig`, for a run folder, and `Client`, for a service, are resolved on
first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hedwig.retrieve import Hedwig, Prediction
    from hedwig.serving.client import Client

__version__ = "0.1.0"
__all__ = ["Client", "Hedwig", "Prediction", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("Hedwig", "Prediction"):
        from hedwig import retrieve

        return getattr(retrieve, name)
    if name == "Client":
        from hedwig.serving.client import Client

        return Client
    raise AttributeError(f"module 'hedwig' has no attribute {name!r}")
