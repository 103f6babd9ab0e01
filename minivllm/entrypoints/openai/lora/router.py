"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter: refused while the engine takes no adapters."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from minivllm.exceptions import NotImplementedHereError

router = APIRouter()


@router.post("/v1/load_lora_adapter")
@router.post("/v1/unload_lora_adapter")
async def adapters() -> Response:
    raise NotImplementedHereError("this server takes no LoRA adapters; merge the adapter into the model's weights")
