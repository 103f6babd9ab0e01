"""The OpenAI-compatible server, from arguments to exit.

    setup_server ─▶ run_server ─▶ run_server_worker ─▶ build_async_engine_client ─▶ build_app ─▶ init_app_state
                                                                                            ─▶ launcher.serve_http

Never imports torch. What takes time to import is imported while the engine core loads the model.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn

from minivllm.config.frontend import FrontendConfig
from minivllm.entrypoints.openai.app import api_keys, build_app, frontend_config
from minivllm.entrypoints.openai.app_state import StatLoggers, init_app_state
from minivllm.entrypoints.openai.listen import (
    create_server_socket,
    create_unix_socket,
    remove_unix_socket,
    url_of,
)
from minivllm.logger import configure, init_logger
from minivllm.utils.sockets import RunDirectory
from minivllm.version import __version__

if TYPE_CHECKING:
    from argparse import Namespace

    from fastapi import FastAPI

    from minivllm.config.engine import EngineConfig
    from minivllm.engine.async_llm import AsyncLLM

logger = init_logger("minivllm.entrypoints.openai.api_server")  # __name__ is __main__ when run as a module

END_SIGNALS = (signal.SIGINT, signal.SIGTERM)
NUM_OPEN_FILES = 65535  # a connection is one
METRICS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client's
ALL_INTERFACES = ("", "0.0.0.0", "::")
_LATER_MODULES = (  # what serving an app needs beside it
    "launcher",
    "completion.serving",
    "chat_completion.serving",
    "tokenize.serving",
)


def setup_server(args: Namespace) -> tuple[str, socket.socket]:
    """Bind the address, raise the limit of open files, and make signals end the process cleanly until it serves.

    Returns the URL and the bound socket; nothing is spawned yet.

    Raises:
        ConfigError: the address cannot be bound; the message names it, and who holds it if that can be seen.
    """
    frontend = frontend_config(args)
    for signum in END_SIGNALS:
        signal.signal(signum, _exit_on_signal)
    _raise_open_files_limit()
    host = frontend.host or ""
    sock = create_server_socket(host, frontend.port) if frontend.uds is None else create_unix_socket(frontend.uds)
    url = url_of(host, sock, tls=frontend.ssl_certfile is not None)
    logger.info("minivllm %s: %s is bound; it answers when the model is loaded", __version__, url)
    if frontend.uds is None and host in ALL_INTERFACES and not api_keys(frontend):
        logger.warning(
            "THE SERVER LISTENS ON ALL INTERFACES WITHOUT A KEY: whoever reaches port %d can use it; "
            "pass --host 127.0.0.1 or --api-key",
            sock.getsockname()[1],
        )
    return url, sock


def _raise_open_files_limit() -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = NUM_OPEN_FILES if hard == resource.RLIM_INFINITY else min(NUM_OPEN_FILES, hard)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError) as error:
        logger.warning(
            "at most %d files may be open (%s); raise it with ulimit -n for many clients", soft, error
        )


def _exit_on_signal(signum: int, _frame: Any) -> NoReturn:
    """Before anything is spawned there is nothing to clean up: end at once, as shells expect."""
    os._exit(128 + signum)


async def run_server(args: Namespace) -> None:
    """Bind, then serve until a signal or the engine's death. Run it on uvloop, as `main` does.

    Raises:
        ConfigError: it cannot start as asked; EngineDeadError: the engine died.
    """
    url, sock = setup_server(args)
    try:
        await run_server_worker(url, sock, args)
    finally:
        remove_unix_socket(sock, args.uds)


async def run_server_worker(url: str, sock: socket.socket, args: Namespace) -> None:
    """The first API server process, which starts the engine core and with --api-server-count further servers."""
    from minivllm.entrypoints.openai.api_servers import ApiServers

    frontend = frontend_config(args)
    stats = StatLoggers()
    app: Future[FastAPI] = Future()
    async with build_async_engine_client(args, stats, meanwhile=lambda: _build_into(app, args)) as engine:
        servers = ApiServers(engine, sock, args, frontend.api_server_count)
        try:
            await serve_app(
                engine,
                sock,
                args,
                stats,
                app=await asyncio.wrap_future(app),
                on_listening=lambda app: _announce(engine, app, url, frontend),
                on_signal=servers.on_signal,
            )
        finally:
            await servers.stop(frontend.shutdown_timeout)


async def serve_app(
    engine: AsyncLLM,
    sock: socket.socket,
    args: Namespace,
    stats: StatLoggers,
    *,
    app: FastAPI | None = None,
    on_listening: Callable[[FastAPI], None] = lambda app: None,
    on_signal: Callable[[int], None] = lambda signum: None,
    signals: Sequence[signal.Signals] = END_SIGNALS,
) -> None:
    """One API server process: its app on its engine client, served until one of `signals`, or the engine's death.

    app: of `build_app`, if it has been made already.
    """
    from minivllm.entrypoints.openai.launcher import serve_http

    app = build_app(args) if app is None else app
    init_app_state(engine, args, app, stats)
    gc.freeze()  # what lives as long as the server is not to be scanned again and again
    gc.enable()
    statistics = asyncio.ensure_future(_log_statistics(stats))
    try:
        await serve_http(
            app,
            sock,
            engine=engine,
            lifecycle=app.state.lifecycle,
            frontend=frontend_config(args),
            on_listening=lambda: on_listening(app),
            on_signal=on_signal,
            signals=signals,
        )
    finally:
        statistics.cancel()
        app.state.renderer.shutdown()  # the interpreter would wait for what is still queued there
        if app.state.tracer is not None:
            await asyncio.to_thread(app.state.tracer.shutdown)


@contextlib.asynccontextmanager
async def build_async_engine_client(
    args: Namespace, stats: StatLoggers | None = None, *, meanwhile: Callable[[], None] = lambda: None
) -> AsyncIterator[AsyncLLM]:
    """Start the engine core and wait until it serves; it is shut down at the end, however that comes.

    meanwhile: called on a thread as the core starts, if it is started.

    Raises:
        ConfigError, EngineStartError: it cannot start.
    """
    from minivllm.engine.arg_utils import AsyncEngineArgs

    num_servers = getattr(args, "api_server_count", 1)
    config = _share(AsyncEngineArgs.from_cli_args(args).create_engine_config("serve"), num_servers)

    from minivllm.engine.async_llm import AsyncLLM

    threading.Thread(target=meanwhile, name="build-app", daemon=True).start()
    loggers = [] if stats is None or config.observability.disable_log_stats else [stats]
    engine = await _start_unless_signalled(
        lambda: AsyncLLM.from_engine_config(config, stat_loggers=loggers, num_clients=num_servers)
    )
    try:
        yield engine
    finally:
        engine.shutdown(timeout_s=0)


def _share(config: EngineConfig, num_servers: int) -> EngineConfig:
    """The configuration of one of several API servers: each counts only its own requests, so it has a share of the
    limits on what may be queued."""
    limits = {
        name: max(1, limit // num_servers)
        for name in ("max_num_queued_reqs", "max_num_queued_tokens")
        if (limit := getattr(config.scheduler, name)) is not None
    }
    return replace(config, scheduler=replace(config.scheduler, **limits))


async def _start_unless_signalled(start_engine: Callable[[], AsyncLLM]) -> AsyncLLM:
    """Start the engine on a thread; SIGINT or SIGTERM ends its processes, and then ours, as shells expect.

    A signal handler that raises would be simpler, and wrong: amid imports the exception can be lost, or leave an
    import lock held for good.
    """
    loop = asyncio.get_running_loop()
    signalled: asyncio.Future[int] = loop.create_future()
    for signum in END_SIGNALS:
        loop.add_signal_handler(
            signum, lambda signum=signum: signalled.done() or signalled.set_result(signum)
        )
    starting = loop.run_in_executor(None, start_engine)
    await asyncio.wait({starting, signalled}, return_when=asyncio.FIRST_COMPLETED)
    if not signalled.done():
        return starting.result()
    logger.info("%s while the engine starts", signal.Signals(signalled.result()).name)
    await _end_start(starting)
    raise SystemExit(128 + signalled.result())


async def _end_start(starting: asyncio.Future[AsyncLLM]) -> None:
    """Stop the core that the start has made, or is about to, until it gives up and has cleaned up behind itself."""
    from minivllm.engine.core_launcher import stop_all

    while not starting.done():
        await asyncio.get_running_loop().run_in_executor(None, stop_all)
        await asyncio.wait({starting}, timeout=0.02)
    if starting.exception() is None:
        starting.result().shutdown(timeout_s=0)


def _build_into(app: Future[FastAPI], args: Namespace) -> None:
    """Build the app while the core, which needs seconds to import torch and read the weights, is not ready."""
    try:
        for name in _LATER_MODULES:
            import_module(f"minivllm.entrypoints.openai.{name}")
        app.set_result(build_app(args))
    except BaseException as error:
        app.set_exception(error)


async def _log_statistics(stats: StatLoggers) -> None:
    from minivllm.metrics.logging import INTERVAL_S

    while True:
        await asyncio.sleep(INTERVAL_S)
        stats.log(time.monotonic())


def _announce(engine: AsyncLLM, app: FastAPI, url: str, frontend: FrontendConfig) -> None:
    """The last words before silence: what is served, and a line to paste."""
    ready, name = engine.ready, app.state.models.names[0]
    body: dict[str, Any] = {"model": name, "prompt": "Once upon a time", "max_tokens": 32}
    route = "completions"
    if engine.tokenizer is None:
        body["prompt"] = [1, 2, 3]
    elif engine.tokenizer.chat_template is not None:
        route = "chat/completions"
        body = {"model": name, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 32}
    key = ' -H "Authorization: Bearer $MINIVLLM_API_KEY"' if api_keys(frontend) else ""
    base = url if frontend.uds is None else f"--unix-socket {shlex.quote(frontend.uds)} http://localhost"
    curl = f"curl -s {base}/v1/{route} -H 'Content-Type: application/json'{key} -d {shlex.quote(json.dumps(body))}"
    has_page = not (frontend.disable_playground or frontend.uds)
    lines = [
        "",
        f"  minivllm {__version__} serves {name} ({ready.dtype}, context {ready.max_model_len} tokens)",
        f"  kv cache {ready.kv_cache_size_tokens} tokens = {ready.kv_cache_max_concurrency:.1f} x the context",
        f"  listen   {url}   docs: {url}/docs   metrics: {url}/metrics",
        *([f"  look     {url}/   chat with it, and watch the engine"] if has_page else []),
        f"  try      {curl}",
        "",
    ]
    print("\n".join(lines), flush=True)


def run(args: Namespace) -> None:
    """Serve until the end, on uvloop where there is one."""
    gc.disable()  # until it serves: what is imported until then is no garbage
    try:
        with _metrics_directory(args.api_server_count):
            _run(args)
    finally:
        gc.enable()


@contextlib.contextmanager
def _metrics_directory(num_servers: int) -> Iterator[None]:
    """Where several servers put their counts, so that each can show the sum. To be set before prometheus_client is
    imported, which looks only then."""
    if num_servers == 1 or os.environ.get(METRICS_VARIABLE):
        yield
        return
    directory = RunDirectory()
    os.environ[METRICS_VARIABLE] = str(directory.path)
    try:
        yield
    finally:
        del os.environ[METRICS_VARIABLE]
        directory.remove()


def _run(args: Namespace) -> None:
    try:
        import uvloop
    except ImportError:
        asyncio.run(run_server(args))
    else:
        uvloop.run(run_server(args))


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m minivllm.entrypoints.openai.api_server`."""
    from minivllm.entrypoints.errors import exit_on_error

    with exit_on_error():
        from minivllm.entrypoints.openai.cli_args import make_arg_parser, validate_args

        args = make_arg_parser().parse_args(argv)
        validate_args(args)
        configure("APIServer", args.log_level, config_file=args.log_config_file)
        run(args)


if __name__ == "__main__":
    main(sys.argv[1:])
