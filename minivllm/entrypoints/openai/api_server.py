"""The OpenAI-compatible server, from arguments to exit.

    setup_server ─▶ run_server ─▶ run_server_worker ─▶ build_async_engine_client ─▶ build_app ─▶ init_app_state
                                                                                            ─▶ launcher.serve_http

Never imports torch. What takes time to import is imported while the engine core loads the model.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import json
import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from minivllm import envs
from minivllm.config.frontend import FrontendConfig
from minivllm.config.profiler import read_profiler_config
from minivllm.entrypoints.openai.listen import (
    create_server_socket,
    create_unix_socket,
    remove_unix_socket,
    url_of,
)
from minivllm.logger import configure, init_logger
from minivllm.tracing import RequestTracer
from minivllm.utils.box_model import is_box_model
from minivllm.utils.sockets import RunDirectory
from minivllm.version import __version__

if TYPE_CHECKING:
    from argparse import Namespace

    from fastapi import APIRouter, FastAPI

    from minivllm.config.engine import EngineConfig
    from minivllm.engine.async_llm import AsyncLLM
    from minivllm.engine.front import StatLogger
    from minivllm.entrypoints.answer_format import AnswerFormat
    from minivllm.entrypoints.openai.request_log import RequestLog
    from minivllm.messages.stats import IterationStats, SchedulerStats

logger = init_logger("minivllm.entrypoints.openai.api_server")  # __name__ is __main__ when run as a module

END_SIGNALS = (signal.SIGINT, signal.SIGTERM)
NUM_OPEN_FILES = 65535  # a connection is one
METRICS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client's
ALL_INTERFACES = ("", "0.0.0.0", "::")
_APP_MODULES = (
    "launcher",
    "completion.serving",
    "chat_completion.serving",
    "tokenize.serving",
    "metrics.router",
)


class StatLoggers:
    """Hands the engine's numbers to loggers that are made once the engine is known."""

    def __init__(self) -> None:
        self.loggers: list[StatLogger] = []

    def record(self, scheduler_stats: SchedulerStats | None, iteration: IterationStats) -> None:
        for stat_logger in self.loggers:
            stat_logger.record(scheduler_stats, iteration)

    def log(self, now: float) -> None:
        for stat_logger in self.loggers:
            stat_logger.log(now)


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


def frontend_config(args: Namespace) -> FrontendConfig:
    """The server's own part of the arguments."""
    return FrontendConfig(
        **{f.name: getattr(args, f.name) for f in fields(FrontendConfig) if hasattr(args, f.name)}
    )


def api_keys(frontend: FrontendConfig) -> list[str]:
    """Keys that a request may carry; without any, none is needed. vLLM's variable counts when nothing else is said."""
    keys = [key for key in [*(frontend.api_key or []), envs.get("MINIVLLM_API_KEY")] if key]
    return keys or [key for key in [envs.get("VLLM_API_KEY")] if key]


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
    async with build_async_engine_client(args, stats) as engine:
        servers = ApiServers(engine, sock, args, frontend.api_server_count)
        try:
            await serve_app(
                engine,
                sock,
                args,
                stats,
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
    on_listening: Callable[[FastAPI], None] = lambda app: None,
    on_signal: Callable[[int], None] = lambda signum: None,
    signals: Sequence[signal.Signals] = END_SIGNALS,
) -> None:
    """One API server process: its app on its engine client, served until one of `signals`, or the engine's death."""
    from minivllm.entrypoints.openai.launcher import serve_http

    app = build_app(args)
    init_app_state(engine, args, app, stats)
    gc.collect()
    gc.freeze()  # what lives as long as the server is not to be scanned again and again
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
    args: Namespace, stats: StatLoggers | None = None
) -> AsyncIterator[AsyncLLM]:
    """Start the engine core and wait until it serves; it is shut down at the end, however that comes.

    Raises:
        ConfigError, EngineStartError: it cannot start.
    """
    from minivllm.engine.arg_utils import AsyncEngineArgs

    num_servers = getattr(args, "api_server_count", 1)
    config = _share(AsyncEngineArgs.from_cli_args(args).create_engine_config("serve"), num_servers)

    from minivllm.engine.async_llm import AsyncLLM

    # The core needs seconds to import torch and read the weights; FastAPI and the routes are imported meanwhile.
    threading.Thread(target=_import_app, name="import-app", daemon=True).start()
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


def _import_app() -> None:
    for name in _APP_MODULES:
        with contextlib.suppress(Exception):  # the import that needs it reports it
            import_module(f"minivllm.entrypoints.openai.{name}")


def build_app(args: Namespace) -> FastAPI:
    """The application: routes, error bodies, middleware. It answers once `init_app_state` has given it an engine."""
    from fastapi import FastAPI

    from minivllm.entrypoints.openai.errors import install_error_handlers
    from minivllm.entrypoints.openai.ignored_fields import IgnoredFields
    from minivllm.entrypoints.openai.lifecycle import Lifecycle
    from minivllm.metrics.prometheus import make_registry

    frontend = frontend_config(args)
    docs = {"openapi_url": None, "docs_url": None, "redoc_url": None} if frontend.disable_fastapi_docs else {}
    app = FastAPI(title="minivllm", version=__version__, **docs)
    state = app.state
    state.lifecycle = Lifecycle()
    state.ignored_fields = IgnoredFields(strict=frontend.strict_fields)
    state.tracks_load = frontend.enable_server_load_tracking
    state.log_error_stack = frontend.log_error_stack
    state.registry = make_registry(multiprocess=frontend.api_server_count > 1)
    state.frontend = frontend
    for router in _routers(frontend, profiles=getattr(args, "profiler_config", None) is not None):
        app.include_router(router)
    install_error_handlers(app)
    _add_middleware(app, frontend, counts_requests=not getattr(args, "disable_log_stats", False))
    return app


def _routers(frontend: FrontendConfig, *, profiles: bool) -> list[APIRouter]:
    """Every endpoint there is, and those that the operator opens. profiles: --profiler-config is given."""
    from minivllm.entrypoints.openai.batch.router import router as batch_router
    from minivllm.entrypoints.openai.chat_completion.router import router as chat_router
    from minivllm.entrypoints.openai.completion.router import router as completion_router
    from minivllm.entrypoints.openai.dev import router as dev
    from minivllm.entrypoints.openai.health.router import router as health_router
    from minivllm.entrypoints.openai.invocations.router import router as invocations_router
    from minivllm.entrypoints.openai.lora.router import router as lora_router
    from minivllm.entrypoints.openai.messages.router import router as messages_router
    from minivllm.entrypoints.openai.metrics.router import router as metrics_router
    from minivllm.entrypoints.openai.models.router import router as models_router
    from minivllm.entrypoints.openai.playground.router import router as playground_router
    from minivllm.entrypoints.openai.profile.router import router as profile_router
    from minivllm.entrypoints.openai.responses.router import router as responses_router
    from minivllm.entrypoints.openai.tokenize import router as tokenize

    routers = [health_router, metrics_router, models_router, tokenize.router, completion_router, chat_router]
    routers += [batch_router, responses_router, messages_router, invocations_router, lora_router]
    is_dev = frontend.enable_dev_endpoints or envs.get("VLLM_SERVER_DEV_MODE") not in (None, "0")
    if is_dev or profiles:
        routers.append(profile_router)
    if not frontend.disable_playground:
        routers.append(playground_router)
    if frontend.enable_tokenizer_info_endpoint:
        routers.append(tokenize.info_router)
    if is_dev:
        logger.warning("the development endpoints are open: /server_info, /abort_requests, /collective_rpc, …")
        routers += [dev.router, dev.json_router]
    return routers


def _add_middleware(app: FastAPI, frontend: FrontendConfig, *, counts_requests: bool) -> None:
    """In the order that `middleware.py` draws, from its end: the last added is the first a request meets."""
    from fastapi.middleware.cors import CORSMiddleware

    from minivllm.entrypoints.openai import middleware as ours
    from minivllm.entrypoints.openai.errors import Failures
    from minivllm.metrics.http import HttpMetrics

    app.add_middleware(ours.BodyLimit)
    app.add_middleware(ours.Admission, lifecycle=app.state.lifecycle)
    if keys := api_keys(frontend):
        app.add_middleware(ours.Authentication, keys=keys, open_paths=_open_paths(frontend))
    for import_path in frontend.middleware:
        middleware = ours.load_middleware(import_path)
        if isinstance(middleware, type):
            app.add_middleware(middleware)
        else:
            app.middleware("http")(middleware)
    app.add_middleware(Failures)
    if counts_requests:
        app.add_middleware(HttpMetrics, registry=app.state.registry)
    app.add_middleware(ours.RequestId, always=frontend.enable_request_id_headers)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=frontend.allowed_origins,
        allow_credentials=frontend.allow_credentials,
        allow_methods=frontend.allowed_methods,
        allow_headers=frontend.allowed_headers,
        expose_headers=["X-Request-Id", "X-Ignored-Fields"],
    )
    if frontend.root_path:
        app.add_middleware(ours.RootPath, path=frontend.root_path)


def _open_paths(frontend: FrontendConfig) -> frozenset[str]:
    """What needs no key: probes and scrapers have none, and a browser gets the page before its user can give one."""
    from minivllm.entrypoints.openai.middleware import OPEN_PATHS
    from minivllm.entrypoints.openai.playground.files import OPEN_PATHS as PAGE_PATHS

    closed = {"/metrics"} if frontend.protect_metrics else set()
    return OPEN_PATHS - closed | (frozenset() if frontend.disable_playground else PAGE_PATHS)


def init_app_state(engine: AsyncLLM, args: Namespace, app: FastAPI, stats: StatLoggers | None = None) -> None:
    """Give the app its engine, and build what serves each route."""
    from minivllm.entrypoints.openai.batch.serving import ServingBatch
    from minivllm.entrypoints.openai.chat_completion.serving import ServingChat
    from minivllm.entrypoints.openai.completion.serving import ServingCompletion
    from minivllm.entrypoints.openai.messages.serving import ServingMessages
    from minivllm.entrypoints.openai.models.serving import ServedModels
    from minivllm.entrypoints.openai.playground.feed import EngineFeed
    from minivllm.entrypoints.openai.profile.serving import ServingProfile
    from minivllm.entrypoints.openai.render import Renderer, TemplateSettings
    from minivllm.entrypoints.openai.responses.serving import ServingResponses
    from minivllm.entrypoints.openai.serving_base import ServingSettings
    from minivllm.entrypoints.openai.tokenize.serving import ServingTokenize
    from minivllm.metrics.logging import LoggingStatLogger
    from minivllm.metrics.prometheus import PrometheusStatLogger
    from minivllm.metrics.serving import SleepMetrics, ToolCallMetrics

    frontend, ready, state = frontend_config(args), engine.ready, app.state
    names = engine.config.model.served_model_name or [args.model]
    state.engine = engine
    state.engine_feed = EngineFeed(engine, state.lifecycle)
    state.models = ServedModels(names, root=args.model, max_model_len=ready.max_model_len)
    several = frontend.api_server_count > 1
    if stats is not None and not engine.config.observability.disable_log_stats:
        stats.loggers += [
            PrometheusStatLogger(state.registry, names[0], ready, multiprocess=several),
            LoggingStatLogger(time.monotonic()),
        ]
    templates = TemplateSettings(
        chat_template=read_chat_template(frontend.chat_template),
        content_format=frontend.chat_template_content_format,
        template_kwargs=frontend.default_chat_template_kwargs or {},
        trust_request_template=frontend.trust_request_chat_template,
    )
    _warn_of_other_template(engine, templates.chat_template)
    renderer = state.renderer = Renderer(
        engine.tokenizer, max_model_len=ready.max_model_len, templates=templates
    )
    counts = not engine.config.observability.disable_log_stats
    state.sleep_metrics = SleepMetrics(state.registry)
    endpoint = engine.config.observability.otlp_traces_endpoint
    state.tracer = None if endpoint is None else RequestTracer(endpoint, names[0])
    settings = ServingSettings(
        response_role=frontend.response_role,
        return_tokens_as_token_ids=frontend.return_tokens_as_token_ids,
        force_include_usage=frontend.enable_force_include_usage,
        system_fingerprint=_fingerprint(engine, names[0]),
        exclude_tools_when_none=frontend.exclude_tools_when_tool_choice_none,
        answer_format=answer_format(frontend, engine.config),
        shows_cached_tokens=frontend.enable_prompt_tokens_details,
        keep_alive_s=frontend.sse_keep_alive_interval,
        request_log=_request_log(frontend),
        tracer=state.tracer,
        tool_metrics=ToolCallMetrics(state.registry, names[0]) if counts else None,
    )
    common = (engine, state.models, renderer, state.lifecycle, settings)
    state.serving_completion = ServingCompletion(*common)
    state.serving_chat = ServingChat(*common)
    state.serving_profile = ServingProfile(
        engine, read_profiler_config(engine.config.observability.profiler_config)
    )
    state.serving_tokenize = ServingTokenize(state.models, renderer)
    chat = state.serving_chat
    state.serving_batch = ServingBatch(chat)
    state.serving_messages = ServingMessages(chat, state.lifecycle, settings.keep_alive_s)
    # Several servers share no memory: what one had stored, the next request would not find.
    state.serving_responses = ServingResponses(chat, state.lifecycle, settings.keep_alive_s, stores=not several)


def answer_format(frontend: FrontendConfig, config: EngineConfig) -> AnswerFormat:
    """How the model writes calls and reasoning, as the arguments say; of the model in the box it is known.

    Raises:
        ConfigError: a parser is unknown, or a plug-in fails.
    """
    from minivllm.entrypoints.answer_format import AnswerFormat
    from minivllm.reasoning.registry import reasoning_parser_class
    from minivllm.tool_parsers.registry import TOOL_PARSERS

    if frontend.tool_parser_plugin:
        TOOL_PARSERS.import_plugin(frontend.tool_parser_plugin)
    name, auto = frontend.tool_call_parser, frontend.enable_auto_tool_choice
    if name is None and is_box_model(config.model.model):
        name, auto = "hermes", True
    parser = TOOL_PARSERS.get(name) if name is not None else None
    return AnswerFormat(parser, reasoning_parser_class(config.reasoning), auto, frontend.tool_strict_level)


def _warn_of_other_template(engine: AsyncLLM, template: str | None) -> None:
    own = None if engine.tokenizer is None else engine.tokenizer.chat_template
    if template is not None and own is not None and template.strip() != own.strip():
        logger.warning("--chat-template differs from the model's own template, which it was trained on")


def _request_log(frontend: FrontendConfig) -> RequestLog | None:
    from minivllm.entrypoints.openai.request_log import RequestLog

    if not frontend.enable_log_requests:
        return None
    return RequestLog(
        outputs=frontend.enable_log_outputs, deltas=frontend.enable_log_deltas, max_len=frontend.max_log_len
    )


def _fingerprint(engine: AsyncLLM, name: str) -> str:
    """Changes when answers may change: with the version, the model, its type, the kernels' instruction family."""
    parts = [name, engine.ready.dtype, engine.ready.numerics_id, str(engine.config.model.seed)]
    return f"minivllm-{__version__}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]}"


def read_chat_template(value: str | None) -> str | None:
    """The template of --chat-template: the text itself, or a file (`validate_args` has checked that it is one)."""
    if value is None or "{" in value:
        return value
    return Path(value).read_text(encoding="utf-8")


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
    lines = [
        "",
        f"  minivllm {__version__} serves {name} ({ready.dtype}, context {ready.max_model_len} tokens)",
        f"  kv cache {ready.kv_cache_size_tokens} tokens = {ready.kv_cache_max_concurrency:.1f} x the context",
        f"  listen   {url}   docs: {url}/docs   metrics: {url}/metrics",
        *([] if frontend.disable_playground or frontend.uds else [f"  look     {url}/   chat with it, and watch the engine"]),
        f"  try      {curl}",
        "",
    ]
    print("\n".join(lines), flush=True)


def run(args: Namespace) -> None:
    """Serve until the end, on uvloop where there is one."""
    with _metrics_directory(args.api_server_count):
        _run(args)


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
