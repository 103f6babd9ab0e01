"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter: read, and refused while the engine takes no adapters."""

from __future__ import annotations

from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field
from starlette.responses import Response

from minivllm.entrypoints.openai.utils import JsonRoute, require_json
from minivllm.exceptions import UnsupportedError

router = APIRouter(route_class=JsonRoute, dependencies=[Depends(require_json)])


class UnloadAdapterRequest(BaseModel):
    lora_name: str = Field(min_length=1)
    lora_int_id: int | None = None


class LoadAdapterRequest(BaseModel):
    lora_name: str = Field(min_length=1)
    lora_path: str = Field(min_length=1)
    load_inplace: bool = False
    is_3d_lora_weight: bool = False


@router.post("/v1/load_lora_adapter")
async def load(request: LoadAdapterRequest) -> Response:
    raise _refused(request.lora_name)


@router.post("/v1/unload_lora_adapter")
async def unload(request: UnloadAdapterRequest) -> Response:
    raise _refused(request.lora_name)


def _refused(name: str) -> UnsupportedError:
    return UnsupportedError(
        f"the adapter {name[:200]!r} cannot be loaded or unloaded: this server takes no LoRA adapters, and its set of "
        "models does not change while it runs; merge the adapter into the model's weights",
        param="lora_name",
    )
