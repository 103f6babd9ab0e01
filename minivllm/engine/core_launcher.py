"""The client's hold on an engine core process: its start, its handshake, its death, its end.

Owns the child process, the run directory, the two sockets' addresses and the thread that waits for the
child. Knows nothing of requests.
"""

from __future__ import annotations

import atexit
import multiprocessing.connection
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import zmq

from minivllm.config.engine import EngineConfig
from minivllm.engine.core_process import client_address, run_engine_core
from minivllm.exceptions import EngineStartError
from minivllm.logger import init_logger
from minivllm.messages.codec import Decoder, encode
from minivllm.messages.engine import (
    ENGINE_CORE_DEAD,
    CoreToClient,
    EngineCoreReady,
    RequestType,
    StartFailed,
    StartProgress,
)
from minivllm.utils.process import describe_exit, kill_session, spawn
from minivllm.utils.sockets import RunDirectory, sweep

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

logger = init_logger(__name__)

_LAST_WORDS_S = 0.2  # for the core's own account of its death to arrive before ours is given
_STOP_S = 3.0  # for the core to end by itself after its last request, before SIGTERM …
_TERMINATE_S = 1.0  # … and after SIGTERM, before SIGKILL
_POLL_MS = 100


_cores: set[CoreProcess] = set()  # of this program, until they are shut down


def stop_all() -> None:
    """Stop every core of this program, also those that are still starting. From any thread.

    For a signal that comes while another thread builds an engine, and nobody holds it yet: `wait_ready` then raises
    in that thread, which cleans up.
    """
    for core in list(_cores):
        core.stop()


class CoreProcess:
    """One engine core in a child process.

    `on_death(cause)` is called once, from a thread, when the core ends without having been asked to;
    after that, ENGINE_CORE_DEAD and the cause also stand in the output socket, as if the core had said so.
    """

    def __init__(self, config: EngineConfig, *, on_death: Callable[[str], None], num_clients: int = 1) -> None:
        """num_clients: API servers that will talk to the core, this process among them (see CoreConnection)."""
        self._on_death = on_death
        self._began = time.monotonic()
        self._stopping = threading.Event()
        self._watcher: threading.Thread | None = None
        self._started = threading.Event()  # or failed to: set once `_process` will not change any more
        self._ended = threading.Event()  # set by the only thread that reaps the child …
        self._left_nothing = threading.Event()  # … once what the child had started is gone too
        self._stop_lock = threading.Lock()
        self._send_lock = threading.Lock()
        self._closed = False
        self._process: BaseProcess | None = None
        self._core_identity = b""
        self._is_ready = False  # until then the core reads no messages
        self._gave_up = False  # it has said that it cannot start, and ends
        self.context = zmq.Context()
        self._num_clients = num_clients
        self._run_directory = RunDirectory()
        atexit.register(self.shutdown)
        _cores.add(self)
        try:
            self.input_socket = self._bind(zmq.ROUTER, "in")
            self.output_socket = self._bind(zmq.PULL, "out")
            self.output_socket.bind(_last_words_address(self))
            self._start(config.observability.log_level, encode(config))
        except BaseException:
            self.shutdown()
            raise

    def _bind(self, kind: int, name: str) -> zmq.Socket:
        socket = self.context.socket(kind)
        socket.set_hwm(0)
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(self._run_directory.address(name))
        return socket

    def _start(self, log_level: str, config: bytes) -> None:
        """Start the child from the thread that will wait for it.

        Linux kills a child when the *thread* that started it ends (prctl(2), PR_SET_PDEATHSIG); this thread
        lives as long as the child, whichever thread builds the engine.
        """
        failure: list[BaseException] = []

        def start_and_watch() -> None:
            try:
                arguments = (*self.addresses, log_level, config, self._num_clients)
                self._process = spawn(run_engine_core, arguments, name="EngineCore")
            except BaseException as error:
                failure.append(error)
            finally:
                self._started.set()
            if self._process is not None:
                self._watch()

        self._watcher = threading.Thread(target=start_and_watch, name="watch-core", daemon=True)
        self._watcher.start()
        self._started.wait()
        if failure:
            raise failure[0]

    @property
    def addresses(self) -> tuple[str, str]:
        """Of inputs and outputs: what a CoreConnection needs."""
        return self._run_directory.address("in"), self._run_directory.address("out")

    # -- handshake

    def wait_ready(self) -> EngineCoreReady:
        """Wait until the core serves, however long the model takes to load.

        Raises:
            EngineStartError: the core could not start, or died while it tried; it is cleaned up.
        """
        try:
            return self._handshake()
        except BaseException:
            self.shutdown()
            raise

    def _handshake(self) -> EngineCoreReady:
        decode = Decoder(CoreToClient)
        phase = "starting Python"
        while True:
            message = decode(self._next_start_message(phase))
            if isinstance(message, StartProgress):
                phase = message.phase
                logger.debug("engine core: %s (%.1f s)", phase, time.monotonic() - self._began)
            elif isinstance(message, StartFailed):
                self._gave_up = True
                raise EngineStartError(message.message, message.exit_code)
            else:
                self._is_ready = True
                logger.info("engine core ready after %.1f s", time.monotonic() - self._began)
                return message

    def _next_start_message(self, phase: str) -> bytes:
        """The next message of the handshake. Polls, so that Ctrl-C works and a dead child is noticed."""
        while True:
            ended = self._ended.is_set()  # looked at before the socket, whose last message may explain it
            if self.input_socket.poll(0 if ended else _POLL_MS):
                self._core_identity, payload = self.input_socket.recv_multipart()
                return payload
            if self._stopping.is_set():
                raise EngineStartError("the engine was shut down while it started")
            if not self._core_identity and not self._run_directory.path.is_dir():
                raise EngineStartError(
                    f"the socket directory {self._run_directory.path} was removed before the engine core connected; "
                    "start again, with MINIVLLM_RUN_DIR where nobody cleans up"
                )
            if ended:
                how = describe_exit(self._process.exitcode)
                raise EngineStartError(
                    f"the engine core {how} during its start, while {phase}; see the log above"
                )

    # -- life

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    @property
    def exitcode(self) -> int | None:
        return self._process.exitcode if self._process is not None else None

    def send(self, kind: RequestType, *payloads: bytes) -> None:
        """Send to the core, from any thread. Never blocks: the socket has no high-water mark."""
        with self._send_lock:
            if not self._closed:
                self.input_socket.send_multipart([self._core_identity, kind.value, *payloads], copy=False)

    def _watch(self) -> None:
        """Wait for the child to end, say how it did unless that was wanted, and end what it left running."""
        process = self._process
        multiprocessing.connection.wait([process.sentinel])
        while process.exitcode is None:  # another thread's start of a process may be reaping it just now
            time.sleep(0.001)
        self._ended.set()
        try:
            self._report_death(process)
            kill_session(process.pid)
        finally:
            self._left_nothing.set()

    def _report_death(self, process: BaseProcess) -> None:
        if process.exitcode >= 0:
            self._stopping.wait(_LAST_WORDS_S)
        if self._stopping.is_set():
            return
        cause = f"the engine core (pid {process.pid}) {describe_exit(process.exitcode)}"
        self._on_death(cause)
        self._put_last_words(cause)

    def _put_last_words(self, cause: str) -> None:
        """Write the death notice into every client's output socket, so that whoever waits there wakes up."""
        others = (client_address(self.addresses[1], i) for i in range(1, self._num_clients))
        try:
            for address in (_last_words_address(self), *others):
                socket = self.context.socket(zmq.PUSH)
                socket.connect(address)
                socket.send_multipart([ENGINE_CORE_DEAD, cause.encode()])
                socket.close(linger=1000)
        except zmq.ZMQError:  # the client is closing at this very moment
            logger.debug("no one is left to hear: %s", cause)

    # -- end

    def stop(self, timeout_s: float = 0.0) -> None:
        """End the core: ask (its requests get `timeout_s` seconds to finish), then SIGTERM, then SIGKILL.

        The sockets stay, and with them what the core said last. Idempotent; from any thread.
        """
        with self._stop_lock:
            self._stopping.set()
            self._stop_process(timeout_s)

    def shutdown(self, timeout_s: float = 0.0) -> None:
        """`stop`, then let go of the sockets and remove their directory.

        Idempotent, and safe at interpreter exit. To be called on the thread that reads the output socket.
        """
        self.stop(timeout_s)
        with self._send_lock:
            if self._closed:
                return
            self._closed = True
        atexit.unregister(self.shutdown)
        _cores.discard(self)
        self._run_directory.remove()
        sweep()  # a core that was killed leaves its own
        self.context.destroy(linger=0)

    def _stop_process(self, timeout_s: float) -> None:
        if self._watcher is None or not (self._watcher.is_alive() or self._started.is_set()):
            return
        self._started.wait()  # an interrupt may come while the child is being started
        process = self._process
        if process is None:
            return
        if self._is_ready and not self._ended.is_set():
            self.send(RequestType.SHUTDOWN, encode(float(timeout_s)))
            self._ended.wait(timeout_s + _STOP_S)
        elif self._gave_up:
            self._ended.wait(_STOP_S)
        if not self._ended.is_set():
            process.terminate()
            self._ended.wait(_TERMINATE_S)
        if not self._ended.is_set():
            logger.warning("the engine core (pid %d) does not end by itself; killing it", process.pid)
            process.kill()
        self._left_nothing.wait(_STOP_S + _TERMINATE_S)


class CoreConnection:
    """A further client's hold on a core that another process has started: two sockets, and nothing to end.

    client_index: from 1; the core was told how many there are. addresses: those of the CoreProcess.
    """

    pid: int | None = None

    def __init__(self, client_index: int, addresses: tuple[str, str]) -> None:
        self._core_identity = b""
        self._send_lock = threading.Lock()
        self.context = zmq.Context()
        self._input_socket = self._bind(zmq.ROUTER, client_address(addresses[0], client_index))
        self.output_socket = self._bind(zmq.PULL, client_address(addresses[1], client_index))

    def _bind(self, kind: int, address: str) -> zmq.Socket:
        socket = self.context.socket(kind)
        socket.set_hwm(0)
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(address)
        return socket

    def wait_ready(self) -> EngineCoreReady:
        """Wait for the core's word. Whoever started us ends us if it never comes."""
        self._core_identity, payload = self._input_socket.recv_multipart()
        return Decoder(CoreToClient)(payload)

    def send(self, kind: RequestType, *payloads: bytes) -> None:
        """Send to the core, from any thread. Never blocks: the socket has no high-water mark."""
        with self._send_lock:
            if not self._input_socket.closed:
                self._input_socket.send_multipart([self._core_identity, kind.value, *payloads], copy=False)

    def stop(self, timeout_s: float = 0.0) -> None:
        """The core is not ours to end."""

    def shutdown(self, timeout_s: float = 0.0) -> None:
        """Let go of the sockets. On the thread that reads the output socket."""
        with self._send_lock:
            self.context.destroy(linger=0)


def _last_words_address(core: CoreProcess) -> str:
    return f"inproc://last-words-{id(core)}"
