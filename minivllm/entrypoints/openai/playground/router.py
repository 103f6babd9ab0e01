"""The page at `/`, its files, and the live view's stream. The page asks this server alone, as any client does."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from minivllm.entrypoints.openai.playground.files import PAGE, PREFIX, PageFile, page_file
from minivllm.entrypoints.openai.utils import with_cancellation

router = APIRouter(include_in_schema=False)

# Nothing from elsewhere, no script or style in the page itself, and in no other site's frame.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # another version's files must not be mixed with this one's
}


@router.get("/")
async def page() -> Response:
    return _response(page_file(PAGE))


@router.get(PREFIX + "state")
@with_cancellation
async def state(raw_request: Request) -> Response:
    """How the engine stands, as events named `state`, four a second at most."""
    return await raw_request.app.state.engine_feed.stream(raw_request.scope["minivllm.request_id"])


@router.get(PREFIX + "{name}")
async def static_file(name: str) -> Response:
    found = page_file(name)
    if found is None:
        raise HTTPException(404)
    return _response(found)


def _response(file: PageFile) -> Response:
    return Response(file.content, media_type=file.media_type, headers=HEADERS)
