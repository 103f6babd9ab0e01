"""Serve an app on a bound socket until a signal, or the engine's death, ends it.

Owns uvicorn, the signals while serving, the watchdog and the order of stopping. Knows nothing of routes.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import uvicorn

from minivllm.config.frontend import FrontendConfig
from minivllm.entrypoints.openai.access_log import log_config, silence
from minivllm.entrypoints.openai.http_protocol import limited_protocol
from minivllm.entrypoints.openai.lifecycle import Lifecycle
from minivllm.entrypoints.openai.tls import refresh_certificates, uvicorn_tls_options
from minivllm.logger import init_logger, log_config_path

if TYPE_CHECKING:
    from fastapi import FastAPI

    from minivllm.engine.async_llm import AsyncLLM

logger = init_logger(__name__)

BACKLOG = 2048
KEEP_ALIVE_S = 5
LAST_BYTES_S = 2  # for ended answers to reach clients that read slowly
ANSWER_DEATH_S = 1.0  # after the engine's death, for open requests to hear of it and probes to see 503


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers; says when it listens."""

    def __init__(self, config: uvicorn.Config, on_listening: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_listening = on_listening

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_listening()


class _Stopper:
    """What signals do: the first drains or ends, the second ends at once."""

    def __init__(self, server: _Server, lifecycle: Lifecycle, shutdown_timeout_s: float) -> None:
        self._server = server
        self._lifecycle = lifecycle
        self._shutdown_timeout_s = shutdown_timeout_s
        self._drain: asyncio.Task[None] | None = None
        self._num_signals = 0

    def on_signal(self, signum: int) -> None:
        self._num_signals += 1
        if self._num_signals == 1:
            name = signal.Signals(signum).name
            logger.info("%s: shutting down with %d open requests", name, self._lifecycle.num_open)
            self._drain = asyncio.ensure_future(self._drain_then_end())
        else:
            self.end()
            self._server.force_exit = True

    async def _drain_then_end(self) -> None:
        self._lifecycle.begin_drain()
        if self._shutdown_timeout_s > 0 and not await self._lifecycle.wait_idle(self._shutdown_timeout_s):
            logger.warning(
                "%d requests did not finish within --shutdown-timeout %g; ending them",
                self._lifecycle.num_open,
                self._shutdown_timeout_s,
            )
        self.end()

    def end(self) -> None:
        """End every open answer, and the server once they are sent."""
        self._lifecycle.close()
        self._server.should_exit = True


async def _stop_when_dead(engine: AsyncLLM, server: _Server, lifecycle: Lifecycle) -> None:
    """The watchdog. The engine itself ends the open requests with its error; /health says 503 until the exit."""
    await engine.wait_dead()
    lifecycle.begin_drain()
    await asyncio.sleep(ANSWER_DEATH_S)
    lifecycle.close()
    server.should_exit = True


async def serve_http(
    app: FastAPI,
    sock: socket.socket,
    *,
    engine: AsyncLLM,
    lifecycle: Lifecycle,
    frontend: FrontendConfig,
    on_listening: Callable[[], None] = lambda: None,
    on_signal: Callable[[int], None] = lambda signum: None,
    signals: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM),
) -> None:
    """Serve until one of `signals`; the socket is closed at the end. `frontend` says how; where is the socket's.

    Raises:
        EngineDeadError: the engine died under it.
    """
    _log_routes(app)
    config = uvicorn.Config(
        app,
        http=limited_protocol(frontend.h11_max_incomplete_event_size, frontend.h11_max_header_count),
        lifespan="off",
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=LAST_BYTES_S,
        server_header=False,
        uds=frontend.uds,  # for its log line; the socket is bound
        log_level=frontend.uvicorn_log_level,
        access_log=not frontend.disable_uvicorn_access_log,
        # A file of the operator's has been read by `logger.configure`.
        log_config=None if log_config_path(frontend.log_config_file) else log_config(),
        **uvicorn_tls_options(frontend),
    )
    silence(frontend.disable_access_log_for_endpoints)
    server = _Server(config, on_listening)
    stopper = _Stopper(server, lifecycle, frontend.shutdown_timeout)
    loop = asyncio.get_running_loop()

    def told(signum: int) -> None:
        on_signal(signum)
        stopper.on_signal(signum)

    for signum in signals:
        loop.add_signal_handler(signum, told, signum)
    beside = [asyncio.ensure_future(_stop_when_dead(engine, server, lifecycle))]
    if frontend.enable_ssl_refresh:
        config.load()
        beside.append(asyncio.ensure_future(refresh_certificates(config.ssl, frontend)))
    # The socket was bound without it, so that no second server could bind beside it while the model loaded. Set on the
    # listener, it lets a successor bind while connections of this one are still in TIME_WAIT.
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        await server.serve(sockets=[sock])
    finally:
        for task in beside:
            task.cancel()
        sock.close()
    if engine.errored:
        raise engine.dead_error


def _log_routes(app: FastAPI) -> None:
    for route in _flat(app.routes):
        methods = sorted(getattr(route, "methods", None) or ())
        logger.info("Route: %s, Methods: %s", getattr(route, "path", "?"), ", ".join(methods))


def _flat(routes: Iterable[Any]) -> Iterator[Any]:
    """Some versions of FastAPI keep an included router whole, others copy its routes."""
    for route in routes:
        router = getattr(route, "original_router", None)
        if router is None:
            yield route
        else:
            yield from _flat(router.routes)
