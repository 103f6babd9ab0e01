"""POST /invocations: one route for every kind of request, as SageMaker calls a model."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.responses import Response

from minivllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from minivllm.entrypoints.openai.chat_completion.router import create_chat_completion
from minivllm.entrypoints.openai.completion.protocol import CompletionRequest
from minivllm.entrypoints.openai.completion.router import create_completion
from minivllm.entrypoints.openai.utils import JsonRoute, require_json
from minivllm.exceptions import RequestError

router = APIRouter(route_class=JsonRoute, dependencies=[Depends(require_json)])

# The field that tells a kind: its model, its handler.
KINDS: dict[str, tuple[type[BaseModel], Any]] = {
    "messages": (ChatCompletionRequest, create_chat_completion),
    "prompt": (CompletionRequest, create_completion),
}


@router.post("/invocations")
async def invocations(body: dict[str, Any], raw_request: Request) -> Response:
    for field, (model, handler) in KINDS.items():
        if field in body:
            try:
                request = model.model_validate(body)
            except ValidationError as error:
                raise RequestValidationError(error.errors()) from None
            return await handler(request=request, raw_request=raw_request)
    raise RequestError(f"the body is none of these: one with {' or '.join(KINDS)}", param=None)
