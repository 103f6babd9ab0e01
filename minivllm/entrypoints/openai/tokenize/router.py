"""POST /tokenize and /detokenize; GET /tokenizer_info, where the operator opens it."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from minivllm.entrypoints.openai.protocol import json_response
from minivllm.entrypoints.openai.tokenize.protocol import DetokenizeRequest, TokenizeRequest
from minivllm.entrypoints.openai.utils import JsonRoute, require_json, with_cancellation

info_router = APIRouter()
router = APIRouter(route_class=JsonRoute, dependencies=[Depends(require_json)])


@router.post("/tokenize")
@with_cancellation
async def tokenize(request: TokenizeRequest, raw_request: Request) -> Response:
    return json_response(await raw_request.app.state.serving_tokenize.tokenize(request))


@router.post("/detokenize")
@with_cancellation
async def detokenize(request: DetokenizeRequest, raw_request: Request) -> Response:
    return json_response(await raw_request.app.state.serving_tokenize.detokenize(request))


@info_router.get("/tokenizer_info")
async def tokenizer_info(raw_request: Request) -> Response:
    state = raw_request.app.state
    return JSONResponse(state.serving_tokenize.info(state.engine.config.model))
