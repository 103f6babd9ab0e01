"""Where an engine's configuration meets structured output: one vocabulary, on the client's side and on the core's.

llguidance, and on the core's side the tokenizer, are loaded when the core first has nothing to do for a while, or when
the first structured request comes; the operator may choose with `preload`.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from minivllm.config.engine import EngineConfig
from minivllm.engine.end_tokens import end_tokens
from minivllm.logger import init_logger

if TYPE_CHECKING:
    import llguidance

    from minivllm.core.grammar import GrammarState
    from minivllm.messages.engine import EngineCoreRequest
    from minivllm.structured_output.checker import GrammarChecker
    from minivllm.structured_output.manager import GrammarManager
    from minivllm.structured_output.vocabulary import Vocabulary
    from minivllm.tokenizer.tokenizer import Tokenizer

logger = init_logger(__name__)


def make_checker(config: EngineConfig, tokenizer: Tokenizer) -> GrammarChecker:
    """For the client's side."""
    from minivllm.structured_output.checker import GrammarChecker

    return GrammarChecker(lambda: _vocabulary(config, tokenizer))


class LazyGrammars:
    """The core's grammars (see core/grammar.py), made when the first request has one."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._manager: GrammarManager | None = None
        self._making = threading.Lock()

    def preload(self) -> None:
        """Have all of it now."""
        self._made().preload()

    def preload_meanwhile(self) -> None:
        """Have it soon. Takes seconds of a thread that holds Python's lock for up to a third of one at a time."""
        threading.Thread(target=self._preload_or_not, name="read-vocabulary", daemon=True).start()

    def _preload_or_not(self) -> None:
        try:
            self.preload()
        except Exception as error:  # the first request that needs it will say so to whoever sent it
            logger.warning("the vocabulary could not be read for structured outputs: %s", error)

    def start(self, request: EngineCoreRequest) -> GrammarState:
        return self._made().start(request)

    def bitmask(self, states: list) -> bytes:
        return self._manager.bitmask(states)

    def _made(self) -> GrammarManager:
        with self._making:
            if self._manager is None:
                from minivllm.structured_output.manager import GrammarManager

                self._manager = GrammarManager(lambda: _load(self._config))
            return self._manager

    def shutdown(self) -> None:
        if self._manager is not None:
            self._manager.shutdown()


def _load(config: EngineConfig) -> llguidance.LLTokenizer:
    from minivllm.engine.front import load_tokenizer

    tokenizer = load_tokenizer(config)
    return _vocabulary(config, tokenizer).for_llguidance(tokenizer)


def _vocabulary(config: EngineConfig, tokenizer: Tokenizer) -> Vocabulary:
    from minivllm.structured_output.vocabulary import Vocabulary

    eos, others = end_tokens(config, tokenizer)
    return Vocabulary.of(tokenizer, config.hf_config.vocab_size, eos + others)
