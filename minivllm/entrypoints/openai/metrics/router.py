"""GET /metrics, in Prometheus' text format."""

from __future__ import annotations

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

from minivllm.metrics.prometheus import summed

router = APIRouter()


@router.get("/metrics")
async def metrics(raw_request: Request) -> Response:
    return Response(generate_latest(summed(raw_request.app.state.registry)), media_type=CONTENT_TYPE_LATEST)
