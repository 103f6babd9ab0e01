"""How a front end reaches the engine core: over sockets from an event loop or from plain code, or in one process.

Owns sending requests and receiving outputs. Knows nothing of prompts, text or users' outputs.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import zmq

from minivllm.config.engine import EngineConfig
from minivllm.engine.core_launcher import CoreConnection, CoreProcess
from minivllm.exceptions import ConflictError, EngineDeadError, EngineError
from minivllm.messages.codec import Decoder, encode
from minivllm.messages.engine import (
    ENGINE_CORE_DEAD,
    EngineCoreOutputs,
    EngineCoreReady,
    EngineCoreRequest,
    RequestType,
    UtilityOutput,
    UtilityRequest,
)

_SHUT_DOWN = "the engine was shut down"


class _SocketClient:
    """What both socket clients do: start the core, send to it, and know whether it lives."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        num_clients: int = 1,
        connection: CoreConnection | None = None,
        client_index: int = 0,
    ) -> None:
        """connection: to a core that runs already; else one is started, for this client and num_clients - 1 others."""
        self.dead_error: EngineDeadError | None = None
        self._decode = Decoder(EngineCoreOutputs)
        self._call_ids = itertools.count()
        self._client_index = client_index
        self._core = connection or CoreProcess(config, on_death=self.die, num_clients=num_clients)

    def wait_ready(self) -> EngineCoreReady:
        """Wait until the core serves.

        Raises:
            EngineStartError: it could not start; it is cleaned up.
        """
        return self._core.wait_ready()

    @property
    def core_pid(self) -> int | None:
        return self._core.pid

    @property
    def addresses(self) -> tuple[str, str]:
        """What a further client of the core that we started needs."""
        return self._core.addresses

    def die(self, cause: str) -> None:
        """Remember the first account of the core's death. From any thread."""
        if self.dead_error is None:
            self.dead_error = EngineDeadError(cause)

    def _raise_if_dead(self) -> None:
        if self.dead_error is not None:
            raise self.dead_error

    def add_request(self, request: EngineCoreRequest) -> None:
        """Hand a request to the core. Never blocks.

        Raises:
            EngineDeadError: the core is gone.
        """
        self._raise_if_dead()
        request.client_index = self._client_index
        self._send_request(encode(request))

    def _send_request(self, request: bytes) -> None:
        self._send(RequestType.ADD, request)

    def _send(self, kind: RequestType, *payloads: bytes) -> None:
        self._core.send(kind, *payloads)

    def abort_requests(self, request_ids: list[str]) -> None:
        """Tell the core to end these requests; a dead core has ended them already. Never blocks."""
        if request_ids and self.dead_error is None:
            self._send(RequestType.ABORT, encode(request_ids))

    def _send_call(self, method: str, args: tuple) -> int:
        self._raise_if_dead()
        call_id = next(self._call_ids)
        self._send(RequestType.UTILITY, encode(UtilityRequest(call_id, method, list(args), self._client_index)))
        return call_id

    def _read(self, frames: list[bytes]) -> EngineCoreOutputs:
        """Decode one message.

        Raises:
            EngineDeadError: it is the death notice.
        """
        if frames[0] == ENGINE_CORE_DEAD:
            self.die(bytes(frames[1]).decode())
            raise self.dead_error
        return self._decode(frames[0])


class SyncMPClient(_SocketClient):
    """For plain code: one thread calls, and `get_output` blocks."""

    def get_output(self) -> EngineCoreOutputs:
        """The next outputs.

        Raises:
            EngineDeadError: the core is gone.
        """
        self._raise_if_dead()
        return self._read(self._core.output_socket.recv_multipart())

    def call_utility(self, method: str, *args: Any) -> Any:
        """Call a utility of the core. Not while requests are open: their outputs would be lost.

        Raises:
            EngineDeadError, EngineError: the core is gone; the utility failed. ConflictError: not now.
        """
        call_id = self._send_call(method, args)
        while True:
            answer = self.get_output().utility_output
            if answer is not None and answer.call_id == call_id:
                return _result(answer)

    def shutdown(self, timeout_s: float = 0.0) -> None:
        """End the core; idempotent."""
        self.die(_SHUT_DOWN)
        self._core.shutdown(timeout_s)


class AsyncMPClient(_SocketClient):
    """For an event loop: outputs are read as the socket becomes readable, and `get_output` waits for them.

    `attach` ties it to the running loop. Sending never blocks and needs no await, so an abort can be
    sent from wherever a generator is closed. Requests that come together, as those of streams that end together do, are
    one message: to send one, and to wake the core for it, costs more than all else that is done for it here.
    """

    def __init__(self, config: EngineConfig, **options: Any) -> None:
        super().__init__(config, **options)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._received: deque[EngineCoreOutputs] = deque()
        self._reader: asyncio.Future[None] | None = None  # while `get_output` waits
        self._calls: dict[int, asyncio.Future] = {}
        self._unsent: list[bytes] = []  # requests of this turn of the loop

    def attach(self) -> bool:
        """Read outputs on the running event loop; False when that is so already."""
        loop = asyncio.get_running_loop()
        if self._loop is loop:
            return False
        self._send_requests()  # a loop that has ended does not
        self._loop = loop
        if self.dead_error is None:
            loop.add_reader(self._core.output_socket.FD, self._on_readable)
            loop.call_soon(self._on_readable)  # what came before: the descriptor signals only changes
        else:
            self._wake_reader()
        return True

    def _send_request(self, request: bytes) -> None:
        self._unsent.append(request)
        if self._loop is None:
            self._send_requests()
        elif len(self._unsent) == 1:
            self._loop.call_soon(self._send_requests)

    def _send_requests(self) -> None:
        if self._unsent:
            requests, self._unsent = self._unsent, []
            self._core.send(RequestType.ADD, *requests)

    def _send(self, kind: RequestType, *payloads: bytes) -> None:
        self._send_requests()  # in their order
        super()._send(kind, *payloads)

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _on_readable(self) -> None:
        """Read all there is: the descriptor does not signal again for what is left (zmq_getsockopt(3), ZMQ_FD)."""
        socket = self._core.output_socket
        try:
            while socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:  # asking costs less than an exception at the end
                data = socket.recv(zmq.NOBLOCK)
                self._receive([data] if data != ENGINE_CORE_DEAD else [data, *socket.recv_multipart()])
        except (EngineDeadError, zmq.ZMQError):
            self._stop_reading()
        self._wake_reader()

    def _receive(self, frames: list[bytes]) -> None:
        outputs = self._read(frames)
        answer = outputs.utility_output
        if answer is None:
            self._received.append(outputs)
            return
        call = self._calls.pop(answer.call_id, None)
        if call is not None and not call.done():
            call.set_result(answer)

    async def get_output(self) -> EngineCoreOutputs:
        """The next outputs.

        Raises:
            EngineDeadError: the core is gone, and all it had sent was given out.
        """
        while not self._received:
            self._raise_if_dead()
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        return self._received.popleft()

    async def call_utility(self, method: str, *args: Any) -> Any:
        """Call a utility of the core.

        Raises:
            EngineDeadError, EngineError: the core is gone; the utility failed. ConflictError: not now.
        """
        call = asyncio.get_running_loop().create_future()
        self._calls[self._send_call(method, args)] = call
        return _result(await call)

    def _stop_reading(self) -> None:
        """On the loop's thread. Wake everyone who waits for the core."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._core.output_socket.FD)
        for call in self._calls.values():
            if not call.done():
                call.set_exception(self.dead_error or EngineDeadError())
        self._calls.clear()
        self._wake_reader()

    def shutdown(self, timeout_s: float = 0.0) -> None:
        """End the core; idempotent, from any thread. Outputs of the last moments are still read if the loop runs."""
        self._core.stop(timeout_s)
        if self._loop is not None and not self._loop.is_closed():
            self.run_on_loop(self._on_readable)  # what the core said last, before it counts as gone
        self.die(_SHUT_DOWN)
        self.run_on_loop(self._stop_reading)
        self._core.shutdown()

    def run_on_loop(self, call: Callable[[], None]) -> None:
        """Run a call on the loop's thread and wait for it; here, when no loop runs."""
        loop = self._loop
        if loop is None or not loop.is_running() or _running_loop() is loop:
            call()
            return
        done = threading.Event()

        def run() -> None:
            try:
                call()
            finally:
                done.set()

        with contextlib.suppress(RuntimeError):  # the loop was closed at this very moment
            loop.call_soon_threadsafe(run)
            done.wait(1.0)


class InprocClient:
    """The core in this process, without sockets: a step is taken when an output is asked for. Imports torch."""

    def __init__(self, config: EngineConfig) -> None:
        from minivllm.engine.core import EngineCore

        self.dead_error: EngineDeadError | None = None
        self._core = EngineCore(config, on_death=self._die, on_progress=lambda phase: None)

    def wait_ready(self) -> EngineCoreReady:
        return self._core.ready

    def _die(self, cause: str) -> None:
        if self.dead_error is None:
            self.dead_error = EngineDeadError(cause)

    def add_request(self, request: EngineCoreRequest) -> None:
        if self.dead_error is not None:
            raise self.dead_error
        self._core.add_request(request)

    def abort_requests(self, request_ids: list[str]) -> None:
        self._core.abort_requests(request_ids)

    def get_output(self) -> EngineCoreOutputs:
        """The outputs of one step.

        Raises:
            EngineDeadError: this step, or one before it, failed.
        """
        if self.dead_error is not None:
            raise self.dead_error
        try:
            return self._core.step().get(0) or EngineCoreOutputs()
        except Exception as error:
            self._die(f"the engine core failed: {type(error).__name__}: {error}")
            raise self.dead_error from error

    def call_utility(self, method: str, *args: Any) -> Any:
        return _result(self._core.call_utility(UtilityRequest(0, method, list(args))))

    def shutdown(self, timeout_s: float = 0.0) -> None:
        self._die(_SHUT_DOWN)
        self._core.shutdown()


def _result(answer: UtilityOutput) -> Any:
    if answer.failure is not None:
        raise EngineError(answer.failure)
    if answer.conflict is not None:
        raise ConflictError(answer.conflict)
    return answer.result


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
