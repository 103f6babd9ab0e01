"""Further API servers: processes that accept from the first one's socket and speak to the engine core it started.

Owns their start, their signals and their end. One that dies takes the whole server with it: a client could not know
that its connections go to fewer processes than the operator asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from minivllm.config.engine import EngineConfig
from minivllm.exceptions import EngineDeadError
from minivllm.logger import configure, init_logger
from minivllm.messages.codec import Decoder, encode
from minivllm.utils.process import describe_exit, die_with_parent, spawn, unblock_interrupts, watch_parent

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from minivllm.engine.async_llm import AsyncLLM

logger = init_logger(__name__)

_STOP_S = 5.0  # beyond --shutdown-timeout, for a server to end before it is killed
_LOOK_EVERY_S = 0.02


class ApiServers:
    """The API servers 1 … count - 1 beside this process, which is number 0. On the event loop's thread."""

    def __init__(self, engine: AsyncLLM, sock: socket.socket, args: Namespace, count: int) -> None:
        self._engine = engine
        self._stopping = False
        arguments = json.dumps(vars(args), default=sorted)
        config = encode(engine.config)
        self._processes: dict[int, BaseProcess] = {}
        for index in range(1, count):
            # The thread that starts a child must outlive it (see process.die_with_parent): this one does.
            parts = (index, config, arguments, engine.engine_core.addresses, sock)
            process = self._processes[index] = spawn(run_api_server, parts, name=f"APIServer_{index}")
            asyncio.get_running_loop().add_reader(process.sentinel, self._on_end, index)

    def _on_end(self, index: int) -> None:
        process = self._processes[index]
        asyncio.get_running_loop().remove_reader(process.sentinel)
        if not self._stopping and not self._engine.errored:
            process.join(1)
            self._engine.fail(f"API server {index} (pid {process.pid}) {describe_exit(process.exitcode)}")

    def on_signal(self, signum: int) -> None:
        """The whole server is told to end: so is each of them, with the same time to do so."""
        self._stopping = True
        for process in self._processes.values():
            if process.is_alive():
                process.terminate()

    async def stop(self, timeout_s: float) -> None:
        """End those that have not ended, and wait for them: `timeout_s` seconds and a little, then they are killed."""
        if not self._stopping:
            self.on_signal(signal.SIGTERM)
        deadline = time.monotonic() + timeout_s + _STOP_S
        while any(process.is_alive() for process in self._processes.values()):
            if time.monotonic() > deadline:
                for process in self._processes.values():
                    process.kill()
                deadline = float("inf")
            await asyncio.sleep(_LOOK_EVERY_S)
        for process in self._processes.values():
            asyncio.get_running_loop().remove_reader(process.sentinel)


def run_api_server(
    index: int, config: bytes, arguments: str, addresses: tuple[str, str], sock: socket.socket
) -> None:
    """The process's entry point. config: an EngineConfig, encoded; arguments: the command line's, as JSON."""
    args = Namespace(**json.loads(arguments))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the first server decides
    unblock_interrupts()
    configure(f"APIServer_{index}", args.log_level, config_file=args.log_config_file)
    die_with_parent(signal.SIGTERM)
    watch_parent(lambda: os._exit(1))
    with contextlib.suppress(ImportError):
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    try:
        asyncio.run(_serve(index, Decoder(EngineConfig)(config), args, addresses, sock))
    except EngineDeadError:
        sys.exit(1)  # the first server says why


async def _serve(
    index: int, config: EngineConfig, args: Namespace, addresses: tuple[str, str], sock: socket.socket
) -> None:
    from minivllm.engine.async_llm import AsyncLLM
    from minivllm.engine.core_launcher import CoreConnection
    from minivllm.entrypoints.openai.api_server import serve_app
    from minivllm.entrypoints.openai.app_state import StatLoggers

    stats = StatLoggers()
    loggers: list[Any] = [] if config.observability.disable_log_stats else [stats]
    connection = CoreConnection(index, addresses)
    engine = AsyncLLM(config, stat_loggers=loggers, connection=connection, client_index=index)
    try:
        await serve_app(engine, sock, args, stats, signals=(signal.SIGTERM,))
    finally:
        engine.shutdown()
