"""POST /v1/chat/completions/batch."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from minivllm.entrypoints.openai.batch.protocol import BatchChatRequest
from minivllm.entrypoints.openai.utils import JsonRoute, load_aware_call, require_json, with_cancellation

router = APIRouter(route_class=JsonRoute, dependencies=[Depends(require_json)])


@router.post("/v1/chat/completions/batch")
@with_cancellation
@load_aware_call
async def create_chat_batch(request: BatchChatRequest, raw_request: Request) -> Response:
    return await raw_request.app.state.serving_batch.create(request, raw_request)
