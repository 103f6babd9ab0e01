"""POST /tokenize and /detokenize."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from minivllm.entrypoints.openai.protocol import json_response
from minivllm.entrypoints.openai.tokenize.protocol import DetokenizeRequest, TokenizeRequest
from minivllm.entrypoints.openai.utils import JsonRoute, require_json, with_cancellation

router = APIRouter(route_class=JsonRoute, dependencies=[Depends(require_json)])


@router.post("/tokenize")
@with_cancellation
async def tokenize(request: TokenizeRequest, raw_request: Request) -> Response:
    return json_response(await raw_request.app.state.serving_tokenize.tokenize(request))


@router.post("/detokenize")
@with_cancellation
async def detokenize(request: DetokenizeRequest, raw_request: Request) -> Response:
    return json_response(await raw_request.app.state.serving_tokenize.detokenize(request))
