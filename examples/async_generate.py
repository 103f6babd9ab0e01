"""Stream two requests at once from AsyncLLM: python examples/async_generate.py [model directory or hub id]"""

from __future__ import annotations

import asyncio
import sys

from minivllm import AsyncEngineArgs, AsyncLLM, SamplingParams


async def stream(engine: AsyncLLM, request_id: str, prompt: str) -> None:
    params = SamplingParams(max_tokens=24, temperature=0)
    async for output in engine.generate(prompt, params, request_id):
        print(f"{request_id}: {len(output.outputs[0].token_ids)} tokens")
    print(f"{request_id}: {output.outputs[0].text!r} ({output.outputs[0].finish_reason})")


async def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else ""
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=model))
    try:
        await asyncio.gather(
            stream(engine, "first", "Once upon a time"),
            stream(engine, "second", "The capital of France is"),
        )
    finally:
        engine.shutdown()


if __name__ == "__main__":  # the engine core is a process of its own, started by spawning
    asyncio.run(main())
