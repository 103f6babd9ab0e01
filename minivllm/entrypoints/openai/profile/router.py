"""POST /start_profile and /stop_profile; there with --profiler-config, and with the development endpoints."""

from __future__ import annotations

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse, Response

router = APIRouter()


class ProfileRequest(BaseModel):
    profile_prefix: str = Field("", pattern=r"^[A-Za-z0-9_.-]*$", max_length=64)  # of the files' names
    delay_iterations: int | None = Field(None, ge=0)
    max_iterations: int | None = Field(None, ge=0)


@router.post("/start_profile")
async def start_profile(raw_request: Request, request: ProfileRequest | None = None) -> Response:
    """Record what the worker and this API server do, until /stop_profile, or the worker for `max_iterations` steps."""
    request = request or ProfileRequest()
    await raw_request.app.state.serving_profile.start(
        request.profile_prefix, request.delay_iterations, request.max_iterations
    )
    return JSONResponse({"status": "profiling"})


@router.post("/stop_profile")
async def stop_profile(raw_request: Request) -> Response:
    """Write what was recorded; the names of the files, on the server."""
    return JSONResponse({"status": "stopped", "files": await raw_request.app.state.serving_profile.stop()})
