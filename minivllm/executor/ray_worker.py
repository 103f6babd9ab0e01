"""The actor's side of the Ray executor: a `Worker` behind bytes that we encoded.

Ray pickles this class by name and the constructor's two arguments (bytes and a string), at start-up and never
after. Every reply is an encoded `Reply`; what the worker raises travels in it, not as a pickled exception.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from typing import Any

import msgspec

from minivllm import logger as logging
from minivllm.config.engine import EngineConfig
from minivllm.exceptions import ConfigError
from minivllm.messages.codec import Decoder, encode
from minivllm.messages.worker import GrammarOutput, SchedulerOutput

logger = logging.init_logger(__name__)


class Reply(msgspec.Struct, array_like=True):
    """A method's encoded result, or why there is none; exit_code is set when that is a ConfigError."""

    result: bytes = b""
    failure: str | None = None
    exit_code: int | None = None


class RayWorker:
    """What runs in the actor. Calls come one at a time, in order, on one thread; `watch` alone has its own."""

    def __init__(self, config: bytes, worker_class: str) -> None:
        self._config: EngineConfig = Decoder(EngineConfig)(config)
        self._worker_class = worker_class
        self._decode_plan = Decoder(SchedulerOutput)
        self._decode_grammar = Decoder(GrammarOutput | None)
        self._failed_forward: Exception | None = None
        logging.configure("RayWorker", self._config.observability.log_level)

    def watch(self) -> None:
        """Never return: the caller learns of this process's end when the call fails."""
        threading.Event().wait()

    def initialize(self) -> bytes:
        """Load the model. Gives an encoded WorkerReady."""
        return _reply(self._initialize)

    def _initialize(self) -> Any:
        module, _, name = self._worker_class.partition(":")
        self._worker = getattr(importlib.import_module(module), name)(self._config)
        return self._worker.initialize(lambda phase: logger.debug("%s", phase))

    def execute_model(self, plan: bytes) -> None:
        """Run the forward pass; what it raises is told by the `sample_tokens` that follows."""
        try:
            self._worker.execute_model(self._decode_plan(plan))
        except Exception as error:
            self._failed_forward = error

    def sample_tokens(self, grammar: bytes) -> bytes:
        """grammar: an encoded GrammarOutput or None. Gives an encoded ModelRunnerOutput."""
        return _reply(self._sample_tokens, grammar)

    def _sample_tokens(self, grammar: bytes) -> Any:
        failed, self._failed_forward = self._failed_forward, None
        if failed is not None:
            raise failed
        return self._worker.sample_tokens(self._decode_grammar(grammar))

    def call(self, method: str, args: bytes) -> bytes:
        """Call any method of the worker; args and result are encoded plain values."""
        return _reply(lambda: getattr(self._worker, method)(*Decoder(list)(args)))


def _reply(call: Callable[..., Any], *args: Any) -> bytes:
    try:
        return encode(Reply(encode(call(*args))))
    except ConfigError as error:
        return encode(Reply(failure=str(error), exit_code=error.exit_code))
    except Exception as error:
        logger.exception("the worker failed")
        return encode(Reply(failure=f"{type(error).__name__}: {' '.join(str(error).split())}"))
