"""The engine core's process: two threads around an `EngineCore`, and every way this process can end.

    input thread    decodes what the client sends, into the queue
    main thread     the busy loop: drain the queue (sleeping on it when idle), step, encode and send the outputs

Owns the core's ends of the two sockets and the conversation in `messages/engine.py`. It ends by a SHUTDOWN
message or SIGTERM (exit code 0), by an error in a step (1, after telling the client why), by a failed start
(the error's exit code), or because the client's process is gone.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing.connection
import os
import queue
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import zmq

from minivllm import logger as logging
from minivllm.config.engine import EngineConfig
from minivllm.exceptions import ConfigError, EngineError, MinivllmError, RequestError
from minivllm.messages.codec import Decoder, encode
from minivllm.messages.engine import (
    ENGINE_CORE_DEAD,
    EngineCoreOutputs,
    EngineCoreReady,
    EngineCoreRequest,
    FinishReason,
    RequestType,
    StartFailed,
    StartProgress,
    UtilityRequest,
)
from minivllm.utils.process import die_with_parent, kill_session, unblock_interrupts, watch_parent

logger = logging.init_logger(__name__)

_IDENTITY = b"\x00\x00"  # of this core on the client's ROUTER
_COPIED_BYTES = 65536  # a message of fewer costs more to share with the socket's thread than to copy
_FLUSH_MS = 1000  # how long the last messages may take to leave
_ORPHAN_GRACE_S = 2.0  # for a step to end and a worker to be stopped, once the client is gone
_DYING_S = 0.3  # between the first and the last sign that the parent is gone
_IDLE_S = 2.0  # with nothing to do, until the core may do what would disturb requests
_ENDED_BY_SIGNAL = "the engine core was ended by SIGTERM"


def client_address(address: str, client_index: int) -> str:
    """A client's own address: the first has the address itself."""
    return address if client_index == 0 else f"{address}{client_index}"


def run_engine_core(
    input_address: str, output_address: str, log_level: str, config: bytes, num_clients: int = 1
) -> None:
    """The process's entry point. All arguments are plain; config: an encoded EngineConfig."""
    gc.disable()  # until all is imported and loaded, which has the collector look in vain, a tenth of the time
    logging.configure("EngineCore", log_level)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the client decides
    unblock_interrupts()
    _make_progress_bars_leave_nothing()
    os.setsid()  # so that whatever we start can be found, should we be killed
    end = _End(input_address)
    end.listen()
    process = _CoreProcess(input_address, output_address, end, config, num_clients)
    try:
        exit_code = process.run()
    except _Terminated:
        exit_code = 0
    finally:
        process.close()
        end.clean_up_after_parent()
    sys.exit(exit_code)


def _make_progress_bars_leave_nothing() -> None:
    """Give tqdm a lock of this process: its own is a named semaphore, which outlives a process that is killed."""
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())


class _Terminated(BaseException):
    """SIGTERM came. No `except Exception` may swallow it."""


class _End:
    """How this process is told to end from outside: SIGTERM, or the death of its parent."""

    def __init__(self, input_address: str) -> None:
        self._run_directory = Path(input_address.removeprefix("ipc://")).parent
        self._is_held = False
        self._is_told = False

    def listen(self) -> None:
        self.listen_to_sigterm()
        die_with_parent(signal.SIGTERM)
        watch_parent(self._on_orphaned)

    def listen_to_sigterm(self) -> None:
        """Also to be called after code that installs a handler of its own (Ray does)."""
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, signum: int, frame: Any) -> None:
        self._is_told = True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not interrupt the cleaning up
        if not self._is_held:
            raise _Terminated

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """What must be done whole or not at all: a SIGTERM that comes meanwhile is raised at its end."""
        self._is_held = True
        yield
        self._is_held = False
        if self._is_told:
            raise _Terminated

    def _on_orphaned(self) -> None:
        """Nobody is left to answer: end the main thread as SIGTERM does, and without it if it is slow."""
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_ORPHAN_GRACE_S)
        kill_session(os.getpid())
        self.clean_up_after_parent()
        os._exit(1)

    def clean_up_after_parent(self) -> None:
        """Remove the sockets' directory, if its owner no longer can."""
        parent = multiprocessing.parent_process()
        # A dying parent's SIGTERM comes when its first thread ends, the pipe's end of file when its last one does.
        patience = _DYING_S if signal.getsignal(signal.SIGTERM) is signal.SIG_IGN else 0
        if parent is not None and multiprocessing.connection.wait([parent.sentinel], patience):
            shutil.rmtree(self._run_directory, ignore_errors=True)


class _CoreProcess:
    """One core and its sockets, from the first message to the last."""

    def __init__(
        self, input_address: str, output_address: str, end: _End, config: bytes, num_clients: int = 1
    ) -> None:
        self._end = end
        self._config = config
        self._context = zmq.Context()
        # By client_index; the first client started us, and the handshake is with it.
        self._input_sockets = [self._connect(zmq.DEALER, input_address, i) for i in range(num_clients)]
        self._output_sockets = [self._connect(zmq.PUSH, output_address, i) for i in range(num_clients)]
        self._input_socket = self._input_sockets[0]
        self._input_thread: threading.Thread | None = None
        self._inputs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._late_aborts: deque[list[str]] = deque()
        self._drain_deadline: float | None = None  # set once we have been told to end
        self._has_idled = False  # for a while, once

    def _connect(self, kind: int, address: str, client_index: int) -> zmq.Socket:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.IDENTITY, _IDENTITY)
        socket.set_hwm(0)
        socket.setsockopt(zmq.LINGER, _FLUSH_MS)
        socket.connect(client_address(address, client_index))
        return socket

    def run(self) -> int:
        """The whole conversation; the exit code of the process."""
        try:
            core = self._start()
        except _StartFailed as failure:
            return failure.exit_code
        self._core = core
        cause = None
        try:
            with self._end.held():
                for socket in self._input_sockets:
                    socket.send(encode(core.ready))
                self._input_thread = self._start_thread(self._receive_inputs, "inputs")
            self._busy_loop()
        except _Terminated:
            cause = _ENDED_BY_SIGNAL
        except Exception as error:
            logger.exception("the engine core failed in a step")
            cause = f"the engine core failed: {_one_line(error)}"
        finally:
            if cause is not None:
                for socket in self._output_sockets:
                    socket.send_multipart([ENGINE_CORE_DEAD, cause.encode()])
            core.shutdown()
        return 0 if cause in (None, _ENDED_BY_SIGNAL) else 1

    def close(self) -> None:
        """Send what still waits, for up to a second a socket, and let go of the sockets."""
        for socket in self._output_sockets:
            socket.close()
        if self._input_thread is None:
            self._close_inputs()
        self._context.term()  # ends the input thread, which closes the socket it was reading

    # -- start

    def _start(self) -> Any:
        """Build the core. Nothing is waited for: the client is as busy until it listens."""
        try:
            self._progress("importing the engine")
            config = Decoder(EngineConfig)(self._config)
            from minivllm.engine.core import EngineCore

            core = EngineCore(config, on_death=self._fail, on_progress=self._progress)
        except ConfigError as error:
            raise self._start_failed(str(error), error.exit_code) from error
        except Exception as error:
            logger.exception("the engine core failed to start")
            raise self._start_failed(f"the engine core failed to start: {_one_line(error)}", 1) from error
        self._end.listen_to_sigterm()
        # What was made so far lives as long as the process, but for a megabyte that would take 0.1 s to find.
        gc.freeze()
        gc.enable()
        return core

    def _start_failed(self, message: str, exit_code: int) -> _StartFailed:
        self._tell(StartFailed(message, exit_code))
        return _StartFailed(exit_code)

    def _tell(self, message: StartProgress | StartFailed | EngineCoreReady) -> None:
        self._input_socket.send(encode(message))

    def _progress(self, phase: str) -> None:
        self._tell(StartProgress(phase))

    def _start_thread(self, run: Callable[[], None], name: str) -> threading.Thread:
        """Run one end of the conversation; if it fails, the busy loop does, and the client hears of it."""

        def guarded() -> None:
            try:
                run()
            except Exception as error:
                logger.exception("the %s thread failed", name)
                self._fail(f"the {name} thread of the engine core failed: {_one_line(error)}")

        thread = threading.Thread(target=guarded, name=name, daemon=True)
        thread.start()
        return thread

    # -- input thread

    def _close_inputs(self) -> None:
        for socket in self._input_sockets:
            socket.close()

    def _input_messages(self) -> Iterator[list[bytes]]:
        """Messages of every client as they come.

        Raises:
            zmq.ContextTerminated: this process ends.
        """
        if len(self._input_sockets) == 1:
            while True:
                yield self._input_socket.recv_multipart()
        poller = zmq.Poller()
        for socket in self._input_sockets:
            poller.register(socket, zmq.POLLIN)
        while True:
            for socket, _ in poller.poll():
                yield socket.recv_multipart()

    def _receive_inputs(self) -> None:
        decode_request, decode_ids = Decoder(EngineCoreRequest), Decoder(list[str])
        decode_utility, decode_seconds = Decoder(UtilityRequest), Decoder(float)
        core, put = self._core, self._inputs.put
        messages = self._input_messages()
        while True:
            try:
                kind, payload, *more = next(messages)
            except zmq.ContextTerminated:
                self._close_inputs()
                return
            if kind == RequestType.ADD.value:
                requests = []
                for one in (payload, *more):
                    try:
                        requests.append(decode_request(one))
                    except (msgspec.DecodeError, msgspec.ValidationError, RequestError) as error:
                        self._reject_undecodable(one, error)
                put(lambda requests=requests: self._add(requests))
            elif kind == RequestType.ABORT.value:
                ids = decode_ids(payload)
                self._late_aborts.append(ids)  # for the step that is running …
                # … and for an ADD that still waits in the queue
                put(lambda ids=ids: core.abort_requests(ids))
            elif kind == RequestType.UTILITY.value:
                request = decode_utility(payload)
                put(lambda request=request: self._call_utility(request))
            elif kind == RequestType.SHUTDOWN.value:
                seconds = decode_seconds(payload)
                put(lambda seconds=seconds: self._begin_drain(seconds))
            else:
                logger.error("a message of unknown type %r is dropped", kind)

    def _reject_undecodable(self, payload: bytes, error: Exception) -> None:
        """Answer a request that is not one, if at least its id can be read."""
        try:
            fields = msgspec.msgpack.decode(payload)
            request_id = fields[0]
        except (msgspec.DecodeError, LookupError, TypeError):
            request_id = None
        if not isinstance(request_id, str):
            logger.error("an undecodable request is dropped: %s", error)
            return
        client_index = fields[7] if len(fields) > 7 and isinstance(fields[7], int) else 0
        self._inputs.put(
            lambda: self._core.reject(request_id, client_index, f"the request cannot be decoded: {error}")
        )

    # -- main thread

    def _busy_loop(self) -> None:
        core = self._core
        while True:
            self._drain_inputs()
            if self._drain_deadline is not None and self._is_drained():
                self._abort_the_rest()
                return
            if not core.has_requests():
                continue
            for client_index, outputs in core.step(self._apply_late_aborts).items():
                self._send(client_index, outputs)

    def _send(self, client_index: int, outputs: EngineCoreOutputs) -> None:
        """Never blocks: the socket's queue has no limit.

        (A thread of its own would wait for Python's lock, and we for it.)
        """
        data = encode(outputs)
        self._output_sockets[client_index].send(data, copy=len(data) < _COPIED_BYTES)

    def _drain_inputs(self) -> None:
        """Handle all that has arrived; without anything else to do, sleep until something arrives."""
        if not self._core.has_requests() and self._drain_deadline is None:
            self._next_input()()
        while not self._inputs.empty():  # nobody else takes from it
            self._inputs.get_nowait()()

    def _next_input(self) -> Callable[[], None]:
        """Sleep until something arrives."""
        if not self._has_idled:
            with contextlib.suppress(queue.Empty):
                return self._inputs.get(timeout=_IDLE_S)
            self._has_idled = True
            self._core.on_idle()
        return self._inputs.get()

    def _apply_late_aborts(self) -> None:
        while self._late_aborts:
            self._core.abort_requests(self._late_aborts.popleft())

    def _add(self, requests: list[EngineCoreRequest]) -> None:
        for request in requests:
            if self._drain_deadline is None:
                self._core.add_request(request)
            else:
                self._core.reject(request.request_id, request.client_index, "shutting down", FinishReason.ABORT)

    def _call_utility(self, request: UtilityRequest) -> None:
        answer = self._core.call_utility(request)
        outputs = EngineCoreOutputs(timestamp=time.monotonic(), utility_output=answer)
        self._send(request.client_index, outputs)

    def _begin_drain(self, seconds: float) -> None:
        self._drain_deadline = time.monotonic() + seconds

    def _is_drained(self) -> bool:
        return not self._core.has_requests() or time.monotonic() >= self._drain_deadline

    def _abort_the_rest(self) -> None:
        """Answer what is still open when the time to finish is over."""
        for client_index, outputs in self._core.abort_all().items():
            self._send(client_index, outputs)

    def _fail(self, cause: str) -> None:
        """From any thread: make the busy loop raise."""

        def fail() -> None:
            raise EngineError(cause)

        self._inputs.put(fail)


class _StartFailed(Exception):
    def __init__(self, exit_code: int) -> None:
        self.exit_code = exit_code


def _one_line(error: BaseException) -> str:
    """An error for the last line a user sees: our own speak for themselves, others need their type."""
    text = " ".join(str(error).split())
    if isinstance(error, MinivllmError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
