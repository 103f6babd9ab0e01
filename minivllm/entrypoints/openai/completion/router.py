"""POST /v1/completions."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from minivllm.entrypoints.openai.completion.protocol import CompletionRequest
from minivllm.entrypoints.openai.utils import JsonRoute, load_aware_call, require_json, with_cancellation

router = APIRouter(route_class=JsonRoute, dependencies=[Depends(require_json)])


@router.post("/v1/completions")
@with_cancellation
@load_aware_call
async def create_completion(request: CompletionRequest, raw_request: Request) -> Response:
    return await raw_request.app.state.serving_completion.create(request, raw_request)
