"""What the development routes do beyond one call of the engine."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from minivllm import envs
from minivllm.exceptions import EngineDeadError, EngineError, RequestError
from minivllm.version import __version__

if TYPE_CHECKING:
    from minivllm.engine.async_llm import AsyncLLM
    from minivllm.entrypoints.openai.dev.router import RpcRequest

SECRETS = ("api_key",)


async def collective_rpc(engine: AsyncLLM, request: RpcRequest) -> list[Any]:
    """Every worker's answer; one that is no JSON comes as its text.

    Raises:
        RequestError: the method is private, takes keywords, failed, or took too long.
    """
    if not request.method or request.method.startswith("_"):
        raise RequestError(f"method {request.method[:100]!r} is no public method", param="method")
    if request.kwargs:
        raise RequestError("kwargs are not supported; pass args in order", param="kwargs")
    try:
        return await asyncio.wait_for(engine.collective_rpc(request.method, *request.args), request.timeout)
    except asyncio.TimeoutError:
        raise RequestError(f"no answer within timeout={request.timeout} seconds", param="timeout") from None
    except EngineDeadError:
        raise
    except EngineError as error:  # the workers are well; what was asked of them was not
        raise RequestError(f"the call failed: {error}", param="method") from None


def server_info(state: Any, *, as_text: bool) -> dict[str, Any]:
    """Version, configuration and environment variables; the values of secrets are never told."""
    frontend = {name: value for name, value in asdict(state.frontend).items() if name not in SECRETS}
    config = {"frontend": frontend, "engine": asdict(state.engine.config)}
    variables = {name: "(set)" if "KEY" in name else value for name in envs.VARIABLES if (value := envs.get(name))}
    return {"version": __version__, "config": str(config) if as_text else config, "environment": variables}
