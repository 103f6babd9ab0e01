"""POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from minivllm.entrypoints.openai.messages.protocol import CountTokensRequest, MessagesRequest
from minivllm.entrypoints.openai.utils import JsonRoute, load_aware_call, require_json, with_cancellation

router = APIRouter(route_class=JsonRoute, dependencies=[Depends(require_json)])


@router.post("/v1/messages")
@with_cancellation
@load_aware_call
async def create_message(request: MessagesRequest, raw_request: Request) -> Response:
    return await raw_request.app.state.serving_messages.create(request, raw_request)


@router.post("/v1/messages/count_tokens")
@with_cancellation
async def count_tokens(request: CountTokensRequest, raw_request: Request) -> Response:
    return await raw_request.app.state.serving_messages.count_tokens(request)
