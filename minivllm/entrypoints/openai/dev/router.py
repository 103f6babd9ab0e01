"""Routes for development and for those who operate engines by hand; there only with --enable-dev-endpoints.

What this engine cannot do is an error that says so: there is no route that does nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse, Response

from minivllm.entrypoints.openai.dev.serving import collective_rpc, server_info
from minivllm.entrypoints.openai.utils import JsonRoute, require_json
from minivllm.messages.engine import PauseMode

MAX_REQUEST_IDS = 16_384

router = APIRouter()
json_router = APIRouter(route_class=JsonRoute, dependencies=[Depends(require_json)])


class RpcRequest(BaseModel):
    method: str
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    timeout: float | None = None


class AbortRequest(BaseModel):
    request_ids: list[str] = Field([], max_length=MAX_REQUEST_IDS)


@router.post("/reset_prefix_cache")
async def reset_prefix_cache(
    raw_request: Request, reset_running_requests: bool = False, reset_external: bool = False
) -> Response:
    """{"success": false} while a request still holds cached blocks, unless those are reset too: they compute again what
    they had. There is no external cache to reset."""
    done = await raw_request.app.state.engine.reset_prefix_cache(reset_running_requests)
    return JSONResponse({"success": done})


@router.post("/pause")
async def pause(raw_request: Request, mode: PauseMode = "abort", clear_cache: bool = True) -> Response:
    """Begin with nothing until /resume, new requests wait: open ones are aborted, waited for, or kept to go on then."""
    await raw_request.app.state.engine.pause_generation(mode, clear_cache)
    return JSONResponse({"status": "paused"})


@router.post("/resume")
async def resume(raw_request: Request) -> Response:
    await raw_request.app.state.engine.resume_generation()
    return JSONResponse({"status": "resumed"})


@router.get("/is_paused")
async def is_paused(raw_request: Request) -> Response:
    return JSONResponse({"is_paused": await raw_request.app.state.engine.is_paused()})


@router.post("/sleep")
async def sleep(raw_request: Request, level: int = 1, mode: PauseMode = "abort") -> Response:
    """Give back the KV cache's memory, at level 2 the weights' too. Open requests are aborted, waited for, or kept;
    those that are kept, and those that come, wait for /wake_up."""
    state = raw_request.app.state
    with state.sleep_metrics.operation("sleep"):
        await state.engine.sleep(level, mode)
    return JSONResponse({"status": "sleeping", "level": level})


@router.post("/wake_up")
async def wake_up(raw_request: Request, tags: Annotated[list[str] | None, Query()] = None) -> Response:
    """Have memory again: what the tags name (weights, kv_cache), or all of it; requests go on when all is back."""
    state = raw_request.app.state
    with state.sleep_metrics.operation("wake_up"):
        is_awake = await state.engine.wake_up(tags)
    return JSONResponse({"status": "awake" if is_awake else "sleeping", "tags": tags})


@router.get("/is_sleeping")
async def is_sleeping(raw_request: Request) -> Response:
    return JSONResponse({"is_sleeping": await raw_request.app.state.engine.is_sleeping()})


@json_router.post("/collective_rpc")
async def call_workers(request: RpcRequest, raw_request: Request) -> Response:
    """Call a method of every worker."""
    return JSONResponse({"results": await collective_rpc(raw_request.app.state.engine, request)})


@router.get("/server_info")
async def info(raw_request: Request, config_format: Literal["text", "json"] = "text") -> Response:
    """The configuration in use, without keys."""
    return JSONResponse(server_info(raw_request.app.state, as_text=config_format == "text"))


@json_router.post("/abort_requests")
async def abort_requests(request: AbortRequest, raw_request: Request) -> Response:
    """End requests by the ids their answers carry; without ids, all."""
    num_aborted = await raw_request.app.state.engine.abort_matching(request.request_ids)
    return JSONResponse({"status": "aborted", "aborted": num_aborted})
