"""POST /v1/responses, and what is done with stored ones."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from minivllm.entrypoints.openai.responses.protocol import ResponsesRequest
from minivllm.entrypoints.openai.utils import JsonRoute, load_aware_call, require_json, with_cancellation

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/responses", dependencies=[Depends(require_json)])
@with_cancellation
@load_aware_call
async def create_response(request: ResponsesRequest, raw_request: Request) -> Response:
    return await raw_request.app.state.serving_responses.create(request, raw_request)


@router.get("/v1/responses/{response_id}")
async def retrieve_response(
    response_id: str, raw_request: Request, stream: bool = False, starting_after: int | None = None
) -> Response:
    return raw_request.app.state.serving_responses.retrieve(response_id, stream or starting_after is not None)


@router.delete("/v1/responses/{response_id}")
async def delete_response(response_id: str, raw_request: Request) -> Response:
    return raw_request.app.state.serving_responses.delete(response_id)


@router.post("/v1/responses/{response_id}/cancel")
async def cancel_response(response_id: str, raw_request: Request) -> Response:
    return raw_request.app.state.serving_responses.cancel(response_id)
