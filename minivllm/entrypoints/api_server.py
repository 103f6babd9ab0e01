"""The plain server: POST /generate, GET /health, nothing of OpenAI's. To try the engine, or as a start for your own.

    curl localhost:8000/generate -H 'Content-Type: application/json' -d '{"prompt": "Once", "stream": true}'

The body holds a prompt (text or token ids), `stream`, and any field of SamplingParams. The answer is
{"text": [prompt + output, …]}, one text for each of n; when streaming, one such line each time there is more, and
{"error": …} as the last line if the request fails.
"""

from __future__ import annotations

import asyncio
import sys
import uuid
from argparse import Namespace
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import msgspec
from fastapi import APIRouter, Depends, FastAPI, Request
from starlette.responses import Response

from minivllm.engine.arg_utils import AsyncEngineArgs
from minivllm.engine.async_llm import AsyncLLM
from minivllm.entrypoints.errors import exit_on_error
from minivllm.entrypoints.openai.api_server import build_async_engine_client, setup_server
from minivllm.entrypoints.openai.app import frontend_config
from minivllm.entrypoints.openai.cli_args import check_environment, refuse_option
from minivllm.entrypoints.openai.errors import Failures, install_error_handlers
from minivllm.entrypoints.openai.health.router import router as health_router
from minivllm.entrypoints.openai.ignored_fields import IgnoredFields
from minivllm.entrypoints.openai.launcher import serve_http
from minivllm.entrypoints.openai.lifecycle import Lifecycle
from minivllm.entrypoints.openai.middleware import Admission, BodyLimit, RequestId
from minivllm.entrypoints.openai.utils import ClientDisconnected, attend, require_json, with_cancellation
from minivllm.exceptions import ConfigError, MinivllmError, RequestError
from minivllm.logger import configure, init_logger
from minivllm.outputs import RequestOutput
from minivllm.sampling_params import RequestOutputKind, SamplingParams
from minivllm.utils.argparse_utils import FlexibleArgumentParser, size
from minivllm.utils.text import nearest

logger = init_logger(__name__)
router = APIRouter(dependencies=[Depends(require_json)])

# Of SamplingParams' fields: how outputs follow each other is the server's business, and one is the engine's own.
_FIELDS = frozenset(SamplingParams.__struct_fields__) - {"output_kind", "bad_words_token_ids"}


def make_arg_parser() -> FlexibleArgumentParser:
    """Where to listen, and the engine's options."""
    parser = FlexibleArgumentParser(
        prog="python -m minivllm.entrypoints.api_server", description=__doc__.split("\n\n")[0], refuse=refuse_option
    )
    parser.add_argument("--host", metavar="TEXT", help="Address to bind; default: all interfaces.")
    parser.add_argument("--port", type=size, default=8000, metavar="N", help="Port to bind.")
    return AsyncEngineArgs.add_cli_args(parser)


def parse_body(body: bytes) -> tuple[Any, bool, SamplingParams]:
    """The prompt, whether to stream, and the sampling parameters.

    Raises:
        RequestError: the body is not a JSON object, has no prompt, or a field is unknown or wrong.
    """
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise RequestError('the body must be a JSON object, such as {"prompt": "Once upon a time"}')
    prompt, stream = fields.pop("prompt", None), fields.pop("stream", False)
    if prompt is None:
        raise RequestError("the body has no prompt", param="prompt")
    if isinstance(prompt, list) and any(isinstance(one, (str, list)) for one in prompt):
        raise RequestError("prompt must be one text or one list of token ids; send a request for each", param="prompt")
    if not isinstance(stream, bool):
        raise RequestError(f"stream must be true or false, got {stream!r}", param="stream")
    for name in fields.keys() - _FIELDS:
        guess = nearest(name, _FIELDS)
        raise RequestError(f"unknown field {name!r}" + (f"; did you mean {guess!r}?" if guess else ""), param=name)
    try:
        params = msgspec.convert(fields, SamplingParams, str_keys=True)
    except msgspec.ValidationError as error:
        cause = error.__cause__
        raise cause if isinstance(cause, RequestError) else RequestError(str(error)) from None
    kind = RequestOutputKind.CUMULATIVE if stream else RequestOutputKind.FINAL_ONLY
    return prompt, stream, params.clone(output_kind=kind)


def texts(output: RequestOutput) -> bytes:
    """An output as the body of an answer."""
    prompt = output.prompt or ""
    return msgspec.json.encode({"text": [prompt + answer.text for answer in output.outputs]})


async def _read_body(raw_request: Request) -> bytes:
    """A dependency, so that it is done before `with_cancellation` listens to the connection too."""
    return await raw_request.body()


@router.post("/generate")
@with_cancellation
async def generate(raw_request: Request, body: bytes = Depends(_read_body)) -> Response:
    """Answer one prompt, whole or line by line."""
    state = raw_request.app.state
    prompt, stream, params = parse_body(body)
    state.engine.check_admission(params.n)
    outputs = state.engine.generate(prompt, params, uuid.uuid4().hex)
    if stream:
        return await LineStream(outputs, state.lifecycle).start()
    async with aclosing(outputs):
        async for output in outputs:
            final = output
    return Response(texts(final), media_type="application/json")


def build_app(engine: AsyncLLM) -> FastAPI:
    """The application, ready to answer."""
    app = FastAPI(title="minivllm /generate")
    app.state.engine = engine
    app.state.lifecycle = Lifecycle()
    app.include_router(health_router)
    app.include_router(router)
    app.state.ignored_fields = IgnoredFields()
    install_error_handlers(app)
    app.add_middleware(BodyLimit)
    app.add_middleware(Admission, lifecycle=app.state.lifecycle)
    app.add_middleware(Failures)
    app.add_middleware(RequestId, always=False)
    return app


class LineStream(Response):
    """A line of JSON for each output. Ends with an error line when the request fails."""

    def __init__(self, outputs: AsyncGenerator[RequestOutput, None], lifecycle: Lifecycle) -> None:
        super().__init__(media_type="application/x-ndjson")
        del self.headers["content-length"]  # of no body; nobody knows it before the end
        self._outputs = outputs
        self._lifecycle = lifecycle
        self._first: RequestOutput | None = None

    async def start(self) -> LineStream:
        """Wait for the first output: until then a failure is a status, not a line."""
        self._first = await anext(self._outputs)
        return self

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        last = b""
        try:
            async with aclosing(self._outputs):
                await attend(self._write(send), receive, self._lifecycle)
        except ClientDisconnected:
            logger.info("aborted: the client of /generate disconnected")
            return
        except MinivllmError as error:
            last = msgspec.json.encode({"error": str(error)}) + b"\n"
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _write(self, send: Any) -> None:
        await self._send_line(send, self._first)
        async for output in self._outputs:
            await self._send_line(send, output)

    @staticmethod
    async def _send_line(send: Any, output: RequestOutput) -> None:
        await send({"type": "http.response.body", "body": texts(output) + b"\n", "more_body": True})


async def run_server(args: Namespace) -> None:
    """Bind, start the engine, serve until a signal or the engine's death.

    Raises:
        ConfigError, EngineStartError: it cannot start as asked; EngineDeadError: the engine died.
    """
    url, sock = setup_server(args)
    with sock:
        async with build_async_engine_client(args) as engine:
            app = build_app(engine)
            await serve_http(
                app,
                sock,
                engine=engine,
                lifecycle=app.state.lifecycle,
                on_listening=lambda: print(f"minivllm answers on {url}/generate", flush=True),
                frontend=frontend_config(args),
            )


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m minivllm.entrypoints.api_server`."""
    with exit_on_error():
        args = make_arg_parser().parse_args(argv)
        check_environment()
        if args.otlp_traces_endpoint is not None:
            raise ConfigError("--otlp-traces-endpoint: only the OpenAI server sends traces; leave it out")
        configure("APIServer", args.log_level)
        asyncio.run(run_server(args))


if __name__ == "__main__":
    main(sys.argv[1:])
