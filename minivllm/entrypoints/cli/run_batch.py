"""`minivllm run-batch`: a file of requests in OpenAI's batch format to a file of answers, by an engine of its own.

Each request goes through the server's own routes, without a socket, so that it is checked and answered as there.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import tempfile
import time
import uuid
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minivllm.config.frontend import FrontendConfig
from minivllm.entrypoints.openai.cli_args import make_arg_parser, validate_args
from minivllm.exceptions import ConfigError
from minivllm.logger import configure, init_logger
from minivllm.utils.argparse_utils import FlexibleArgumentParser, default_of

logger = init_logger(__name__)

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
OF_A_LISTENER = frozenset(
    """
    uds api_server_count ssl_keyfile ssl_certfile ssl_ca_certs enable_ssl_refresh ssl_cert_reqs ssl_ciphers
    h11_max_incomplete_event_size h11_max_header_count sse_keep_alive_interval shutdown_timeout
    uvicorn_log_level disable_uvicorn_access_log disable_access_log_for_endpoints
    """.split()
)
NUM_TRIES = 5  # of an upload, which may fail while a long batch must not be lost
_NUM_WAITING = 2  # requests handed to the engine for each it can run at once


@dataclasses.dataclass(frozen=True)
class BatchLine:
    custom_id: str
    url: str
    body: dict[str, Any]


def make_parser() -> FlexibleArgumentParser:
    parser = FlexibleArgumentParser(
        prog="minivllm run-batch", description="Answer a file of requests in OpenAI's batch format."
    )
    group = parser.add_argument_group("batch")
    group.add_argument("-i", "--input-file", required=True, metavar="FILE", help="A path, or an http(s) URL to get.")
    group.add_argument("-o", "--output-file", required=True, metavar="FILE", help="The same, to write or put to.")
    group.add_argument("--output-tmp-dir", metavar="DIR", help="Where answers are put together; default: beside.")
    group.add_argument("--enable-metrics", action="store_true", help="Serve /metrics on --host and --port meanwhile.")
    parser = make_arg_parser(parser)
    parser.common = ("--help", "--input-file", "--output-file", *parser.common)
    parser.usage = "%(prog)s -i FILE -o FILE --model MODEL [options]"
    return parser


def check_no_listening(args: Namespace) -> None:
    """Raises ConfigError when an option is given that only a server which listens could heed."""
    for field in dataclasses.fields(FrontendConfig):
        if field.name in OF_A_LISTENER and getattr(args, field.name) != default_of(field):
            option = field.name.replace("_", "-")
            raise ConfigError(f"--{option} is for a server, and run-batch answers a file; leave it out")


def run(args: Namespace) -> None:
    check_no_listening(args)
    validate_args(args)
    configure("RunBatch", args.log_level, config_file=args.log_config_file)
    lines = read_lines(_read(args.input_file))
    if not _is_url(args.output_file) and not Path(args.output_file).absolute().parent.is_dir():
        raise ConfigError(f"--output-file {args.output_file}: there is no such directory")
    began = time.monotonic()
    answers = asyncio.run(_answer_all(args, lines))
    _write(args, "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers))
    num_failed = sum(answer["error"] is not None for answer in answers)
    elapsed_s = time.monotonic() - began
    print(f"{len(answers)} requests in {elapsed_s:.1f} s, {num_failed} of them failed; see {args.output_file}")


def read_lines(text: str) -> list[BatchLine]:
    """The requests of a batch file; empty lines are skipped.

    Raises:
        ConfigError: a line is no request; the message has its number.
    """
    lines, seen = [], set()
    for number, line in enumerate(text.split("\n"), 1):  # only there: a JSON string may hold U+2028 and U+0085
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"--input-file, line {number} is not JSON: {error}") from None
        reason = _why_no_request(fields)
        if reason is None and fields["custom_id"] in seen:
            reason = f"custom_id {fields['custom_id']!r} is there already"
        if reason is not None:
            raise ConfigError(f"--input-file, line {number}: {reason}")
        seen.add(fields["custom_id"])
        lines.append(BatchLine(fields["custom_id"], fields["url"], fields["body"]))
    if not lines:
        raise ConfigError("--input-file holds no request")
    return lines


def _why_no_request(fields: Any) -> str | None:
    if not isinstance(fields, dict):
        return "it must be an object with custom_id, method, url and body"
    if not isinstance(fields.get("custom_id"), str) or not _is_unicode(fields["custom_id"]):
        return "custom_id must be a string, without halves of surrogate pairs"
    if fields.get("method", "POST") != "POST":
        return "method must be POST"
    if fields.get("url") not in URLS:
        return f"url {fields.get('url')!r} must be one of {', '.join(URLS)}"
    if not isinstance(fields.get("body"), dict):
        return "body must be an object"
    return "stream does not go together with a batch; leave it out" if fields["body"].get("stream") else None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


async def _answer_all(args: Namespace, lines: list[BatchLine]) -> list[dict[str, Any]]:
    from minivllm.entrypoints.openai.api_server import build_async_engine_client
    from minivllm.entrypoints.openai.app import api_keys, build_app, frontend_config
    from minivllm.entrypoints.openai.app_state import StatLoggers, init_app_state

    stats = StatLoggers()
    async with build_async_engine_client(args, stats) as engine:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, task.cancel)
        app = build_app(args)
        init_app_state(engine, args, app, stats)
        if args.enable_metrics:
            from prometheus_client import start_http_server

            start_http_server(args.port, args.host or "127.0.0.1", registry=app.state.registry)
        try:
            return await answer_lines(
                app,
                lines,
                concurrency=_NUM_WAITING * engine.ready.max_num_seqs,
                keys=api_keys(frontend_config(args)),
                shows_progress=os.isatty(2),
            )
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
        finally:
            app.state.renderer.shutdown()


async def answer_lines(
    app: Any, lines: list[BatchLine], *, concurrency: int, keys: Iterable[str] = (), shows_progress: bool = False
) -> list[dict[str, Any]]:
    """A line of output for each line of input, in the same order. app: the server's; concurrency: requests at once."""
    import httpx
    from tqdm import tqdm

    key = next(iter(keys), None)
    headers = {"Content-Type": "application/json"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    slots = asyncio.Semaphore(concurrency)
    bar = tqdm(total=len(lines), disable=not shows_progress)
    async with httpx.AsyncClient(transport=transport, base_url="http://batch", timeout=None) as client:

        async def answer(line: BatchLine) -> dict[str, Any]:
            async with slots:
                # All in ASCII: what no text can carry is this line's error, as it is over HTTP, not the run's.
                response = await client.post(line.url, content=json.dumps(line.body), headers=headers)
            bar.update(1)
            body = response.json()
            failed = response.status_code != 200
            return {
                "id": f"batch_req_{uuid.uuid4().hex}",
                "custom_id": line.custom_id,
                "response": {
                    "status_code": response.status_code,
                    "request_id": response.headers.get("x-request-id") or body.get("id"),
                    "body": body,
                },
                "error": body.get("error") if failed else None,
            }

        with contextlib.closing(bar):
            return list(await asyncio.gather(*map(answer, lines)))


def _is_url(place: str) -> bool:
    return place.startswith(("http://", "https://"))


def _read(place: str) -> str:
    import httpx

    try:
        if _is_url(place):
            response = httpx.get(place, follow_redirects=True, timeout=60)
            response.raise_for_status()
            return response.text
        return Path(place).read_text(encoding="utf-8-sig")  # a mark at the beginning is no part of the JSON
    except (OSError, ValueError, httpx.HTTPError) as error:
        raise ConfigError(f"--input-file {place} cannot be read: {error}") from error


def _write(args: Namespace, text: str) -> None:
    """The whole output or none: it goes into a file beside, which then takes the name."""
    place = args.output_file
    if _is_url(place):
        _upload(place, text)
        return
    directory = args.output_tmp_dir or Path(place).absolute().parent
    try:
        with tempfile.NamedTemporaryFile("w", dir=directory, delete=False, encoding="utf-8") as file:
            file.write(text)
        shutil.move(file.name, place)
    except OSError as error:
        raise ConfigError(f"--output-file {place} cannot be written: {error}") from error


def _upload(url: str, text: str) -> None:
    import httpx

    for attempt in range(1, NUM_TRIES + 1):
        try:
            httpx.put(url, content=text.encode(), timeout=600).raise_for_status()
            return
        except httpx.HTTPError as error:
            logger.warning("upload %d of at most %d failed: %s", attempt, NUM_TRIES, error)
            if attempt == NUM_TRIES:
                raise ConfigError(f"--output-file {url} cannot be written: {error}") from error
        time.sleep(2 ** (attempt - 1))
