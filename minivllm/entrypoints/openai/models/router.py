"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from minivllm.entrypoints.openai.protocol import json_response

router = APIRouter()


@router.get("/v1/models")
@router.get("/v1/models/", include_in_schema=False)
async def list_models(raw_request: Request) -> Response:
    return json_response(raw_request.app.state.models.list())


@router.get("/v1/models/{model_id:path}")
async def retrieve_model(model_id: str, raw_request: Request) -> Response:
    return json_response(raw_request.app.state.models.card(model_id))
