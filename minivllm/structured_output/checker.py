"""Whether constraints compile, found out in a process of their own before the engine sees a request.

Owns that process, started when the first constraint comes and again after it died of one; and what was found out, so
that the same schema is compiled here once. A bad constraint costs its own sender the wait, and nobody else.
"""

from __future__ import annotations

import copy
import signal
import threading
from collections import OrderedDict
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING

import msgspec

from minivllm.exceptions import EngineGenerateError
from minivllm.logger import init_logger
from minivllm.sampling_params import StructuredOutputsParams
from minivllm.structured_output.check_process import CheckReply, CheckRequest, run_checks
from minivllm.structured_output.limits import COMPILE_CPU_S, COMPILE_MEMORY_BYTES, COMPILE_WAIT_S
from minivllm.utils.process import describe_exit, spawn

if TYPE_CHECKING:
    from minivllm.structured_output.vocabulary import Vocabulary

logger = init_logger(__name__)

_KEPT_BYTES = 32 << 20  # of constraints and grammars remembered
_STOP_S = 1.0

_KILLED_BY = {
    signal.SIGPROF: f"takes more than {COMPILE_CPU_S} s to compile; make it smaller or simpler",
    signal.SIGSEGV: "is nested too deeply to compile; make it flatter",
    signal.SIGABRT: f"needs more than {COMPILE_MEMORY_BYTES >> 20} MiB to compile; make it smaller or simpler",
}


class GrammarChecker:
    """May be called from any thread; calls that are not answered from memory wait for each other."""

    def __init__(self, vocabulary: Callable[[], Vocabulary]) -> None:
        """vocabulary: called once, when it is first needed."""
        self._make_vocabulary = vocabulary
        self._encoded_vocabulary: bytes | None = None
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None
        self._lock = threading.Lock()  # of the process
        self._known: OrderedDict[bytes, CheckReply] = OrderedDict()  # oldest use first
        self._known_bytes = 0
        self._known_lock = threading.Lock()

    def grammar_of(self, params: StructuredOutputsParams) -> str:
        """The grammar for the engine core.

        Raises:
            RequestError: it cannot be compiled; the message says what about it, `param` where it came from.
        """
        reply = self._check(CheckRequest(params=_without_source(params)))
        if reply.error is not None:
            raise params.error(reply.error)
        return reply.grammar

    def why_not(self, grammar: str) -> str | None:
        """Why a grammar that somebody else made cannot be compiled, or None."""
        return self._check(CheckRequest(grammar=grammar)).error

    def knows(self, params: StructuredOutputsParams) -> bool:
        """Whether `grammar_of` answers at once."""
        key = msgspec.msgpack.encode(CheckRequest(params=_without_source(params)))
        with self._known_lock:
            return key in self._known

    def start(self) -> None:
        """Have the process, which the first call would otherwise start."""
        with self._lock:
            if self._process is None:
                self._start()

    def close(self) -> None:
        """End the process; another call starts it again."""
        with self._lock:
            self._stop()

    # What is known

    def _check(self, request: CheckRequest) -> CheckReply:
        key = msgspec.msgpack.encode(request)
        reply = self._recall(key)
        if reply is None:
            with self._lock:
                reply = self._recall(key) or self._ask(key)
            self._remember(key, reply)
        return reply

    def _recall(self, key: bytes) -> CheckReply | None:
        with self._known_lock:
            reply = self._known.get(key)
            if reply is not None:
                self._known.move_to_end(key)
            return reply

    def _remember(self, key: bytes, reply: CheckReply) -> None:
        with self._known_lock:
            if key in self._known:
                return
            self._known[key] = reply
            self._known_bytes += _size(key, reply)
            while self._known_bytes > _KEPT_BYTES:
                self._known_bytes -= _size(*self._known.popitem(last=False))

    # The process

    def _ask(self, message: bytes) -> CheckReply:
        """Have it compiled. A process that does not answer has met something it could not stand."""
        try:
            if self._process is None:
                self._start()
            self._pipe.send_bytes(message)
            if self._pipe.poll(COMPILE_WAIT_S):
                return msgspec.msgpack.decode(self._pipe.recv_bytes(), type=CheckReply)
            how = f"did not answer within {COMPILE_WAIT_S:.0f} s"  # of the clock: the machine's fault, not a grammar's
        except (EOFError, OSError):
            self._process.join(_STOP_S)
            why = _KILLED_BY.get(-(self._process.exitcode or 0))
            how = describe_exit(self._process.exitcode)
            if why is not None:
                self._stop()
                return CheckReply(error=why)
        self._stop()
        logger.error("the process that checks constraints %s", how)
        raise EngineGenerateError("the structured output could not be checked; send the request again")

    def _start(self) -> None:
        if self._encoded_vocabulary is None:
            self._encoded_vocabulary = msgspec.msgpack.encode(self._make_vocabulary())
        ours, theirs = Pipe()
        with theirs:
            self._process = spawn(run_checks, (theirs,), name="check-grammars", daemon=True)
        self._pipe = ours
        self._pipe.send_bytes(self._encoded_vocabulary)

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        self._pipe.close()  # it ends when it next reads
        process.kill()
        process.join(_STOP_S)
        process.close()


def _without_source(params: StructuredOutputsParams) -> StructuredOutputsParams:
    """The same wherever it came from."""
    params = copy.copy(params)
    params.param = "structured_outputs"
    return params


def _size(key: bytes, reply: CheckReply) -> int:
    return len(key) + len(reply.grammar) + len(reply.error or "")
