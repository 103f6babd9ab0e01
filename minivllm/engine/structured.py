"""Where an engine's configuration meets structured output: one vocabulary, on the client's side and on the core's.

llguidance, and on the core's side the tokenizer, are loaded when the first structured request comes, or at the start if
the operator says `preload`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from minivllm.config.engine import EngineConfig
from minivllm.engine.end_tokens import end_tokens

if TYPE_CHECKING:
    import llguidance

    from minivllm.core.grammar import GrammarState
    from minivllm.messages.engine import EngineCoreRequest
    from minivllm.structured_output.checker import GrammarChecker
    from minivllm.structured_output.manager import GrammarManager
    from minivllm.structured_output.vocabulary import Vocabulary
    from minivllm.tokenizer.tokenizer import Tokenizer


def make_checker(config: EngineConfig, tokenizer: Tokenizer) -> GrammarChecker:
    """For the client's side."""
    from minivllm.structured_output.checker import GrammarChecker

    return GrammarChecker(lambda: _vocabulary(config, tokenizer))


class LazyGrammars:
    """The core's grammars (see core/grammar.py), made when the first request has one."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._manager: GrammarManager | None = None

    def preload(self) -> None:
        """Have all of it now."""
        self._made().preload()

    def start(self, request: EngineCoreRequest) -> GrammarState:
        return self._made().start(request)

    def bitmask(self, states: list) -> bytes:
        return self._manager.bitmask(states)

    def _made(self) -> GrammarManager:
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
