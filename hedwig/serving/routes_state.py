"""The routes that tell of the service itself: probes, ``/v1/info``, ``/metrics``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from hedwig import __version__
from hedwig.serving.answers import json_response
from hedwig.serving.messages import InfoAnswer, StateAnswer
from hedwig.serving.metrics import METRICS_TYPE
from hedwig.serving.openapi import refused, shown
from hedwig.serving.service import Service

__all__ = ["state_routes"]

_SAMPLE = 'hedwig_requests_total{method="POST",replica="a-1",route="/v1/locate",status="200"} 17.0\n'
_TEXT: dict[int | str, dict[str, Any]] = {
    200: {"description": "This replica's counters", "content": {"text/plain": {"example": _SAMPLE}}}
}


def _floor(service: Service) -> dict[str, float]:
    return {"min_precision_km": service.min_precision_km} if service.min_precision_km > 0 else {}


def _publication(service: Service) -> dict[str, Any]:
    return {"publication": dict(service.publication)} if service.publication else {}


def state_routes(service: Service) -> APIRouter:
    """The four routes, over one service."""
    router = APIRouter(tags=["state"])

    @router.get("/healthz", response_model=StateAnswer, responses=refused())
    async def healthz() -> dict[str, str]:
        """The process lives."""
        return {"status": "alive"}

    @router.get("/readyz", response_model=StateAnswer, responses=refused("not_ready"))
    async def readyz() -> dict[str, str]:
        """Model and index are loaded."""
        _ = service.release
        return {"status": "ready"}

    @router.get("/v1/info", response_model=None, responses=shown(InfoAnswer, "What is being served") | refused())
    async def get_info() -> Response:
        """What is being served."""
        return json_response(
            {
                **service.info,
                "version": __version__,
                "limits": vars(service.limits),
                **_floor(service),
                **_publication(service),
            }
        )

    @router.get(
        "/metrics",
        response_model=None,
        responses=_TEXT | refused(),
    )
    async def metrics() -> Response:
        """Prometheus text."""
        return Response(service.metrics.text(), headers={"Content-Type": METRICS_TYPE})

    return router
