"""Is the server well, and which one is it."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from minivllm.exceptions import EngineDeadError
from minivllm.version import __version__

router = APIRouter()


@router.get("/health")
async def health(raw_request: Request) -> Response:
    """200 while the engine lives and requests are taken, else 503. Never asks the engine for work."""
    state = raw_request.app.state
    try:
        await state.engine.check_health()
    except EngineDeadError:
        return Response(status_code=503)
    return Response(status_code=503 if state.lifecycle.draining else 200)


@router.get("/ping")
@router.post("/ping")
async def ping(raw_request: Request) -> Response:
    return await health(raw_request)


@router.get("/load")
async def load(raw_request: Request) -> Response:
    """Requests being answered, when the server counts them; else 0."""
    return JSONResponse({"server_load": raw_request.app.state.lifecycle.num_loading})


@router.get("/version")
async def version() -> Response:
    return JSONResponse({"version": __version__})
