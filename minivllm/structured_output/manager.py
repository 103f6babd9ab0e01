"""The engine core's grammars: compiled on threads, followed token by token, asked for the next tokens' masks.

Owns the vocabulary as llguidance sees it, compiled grammars (kept for the next request that asks for the same) and
where each request stands in its own, which follows from its output tokens alone. What comes here has been compiled
before, in a process that could be killed (see checker.py); what fails here all the same ends its own request.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import llguidance
import numpy as np

from minivllm.logger import init_logger
from minivllm.messages.engine import EngineCoreRequest
from minivllm.sampling_params import ThinkingTokens
from minivllm.structured_output.limits import parser_limits
from minivllm.utils.thinking import ThinkingTracker, thinking_before_form

logger = init_logger(__name__)

_NUM_COMPILERS = 2  # threads; llguidance compiles without Python's lock
_MAX_CACHED = 256  # compiled grammars; one that is compiled several times counts as often, for each has a lexer
_MAX_CACHED_CHARS = 8 << 20  # of their texts
_MAX_USES = 256  # of one compiled grammar: copies share a lexer, whose states are limited and never forgotten
_LEXER_IS_FULL = "too many states"  # as llguidance says it
_DOES_NOT_FIT = "doesn't satisfy the grammar"  # likewise; all else is a limit of what a grammar may take
_ALL_ALLOWED = np.uint32(0xFFFFFFFF)
_QUICK_S = 0.05  # what compiles faster may be compiled again between two steps
_MAX_THREADS = 8  # that make masks
_SLOW_S = 0.002  # what masks of a step take one after another that several threads are worth it
_FEW_USES = 8  # of every lexer of a grammar, until there is one more


class GrammarError(ValueError):
    """llguidance does not take a grammar."""


class _Compiled(NamedTuple):
    """A matcher at its grammar's beginning, and how to make one that shares nothing, if that is quick."""

    matcher: llguidance.LLMatcher
    rebuild: Callable[[], llguidance.LLMatcher] | None
    lexer: int  # which one; copies share it and its lock

    def copy(self) -> _Compiled:
        return self._replace(matcher=self.matcher.deep_copy())


class MatcherState:
    """Where one request stands in its grammar. To be used from one thread, once `is_ready`.

    A model that thinks does so freely, but for ending the answer there: the grammar begins behind the first thinking,
    or at once if the answer does not begin with it. Until it has begun, a token that opens thinking is allowed beside
    the grammar's first ones.
    """

    def __init__(
        self,
        compiled: Future[_Compiled],
        prior_output_token_ids: list[int],
        thinking: ThinkingTokens | None = None,
        param: str = "structured_outputs",
    ) -> None:
        """param: the request's field that the grammar came from."""
        self._future = compiled
        self._param = param
        self._matcher: llguidance.LLMatcher | None = None
        self._rebuild: Callable[[], llguidance.LLMatcher] | None = None
        self.lexer = 0  # once there is a matcher: states of one wait for each other on several threads
        self._unfollowed = list(prior_output_token_ids)
        self._followed: list[int] = []  # by the matcher
        self._thinking: ThinkingTracker | None = None  # None once the grammar has begun
        if thinking is not None:
            self._thinking = thinking_before_form(thinking.start, thinking.end, thinking.is_open)
        self._marks = thinking
        self._error: str | None = None
        self._error_param: str | None = None

    @property
    def is_ready(self) -> bool:
        """It is compiled, or never will be. Only then may the rest be asked."""
        return self._future.done()

    @property
    def error(self) -> str | None:
        """Why the request cannot go on."""
        self._compiled()
        return self._error

    @property
    def error_param(self) -> str | None:
        """The request's field whose fault the error is; None if it is ours."""
        self._compiled()
        return self._error_param

    @property
    def is_constraining(self) -> bool:
        """The next token must be one of its mask."""
        if self._compiled() is None:
            return False
        return not self._is_thinking or bool(self._marks.withheld)

    @property
    def _is_thinking(self) -> bool:
        return self._thinking is not None and self._thinking.is_open

    @property
    def is_complete(self) -> bool:
        """Nothing may follow."""
        matcher = self._compiled()
        return matcher is not None and self._thinking is None and matcher.is_stopped()

    def accept(self, token_id: int) -> None:
        """Go on by one output token. If it does not fit, which a mask prevents, there is an `error`."""
        if self._compiled() is not None:
            self._follow(token_id)

    def matcher_for_mask(self) -> llguidance.LLMatcher | None:
        """The one to fill a row with, before `finish_mask`; None if there is nothing to fill."""
        matcher = self._compiled()
        return None if self._is_thinking else matcher

    def finish_mask(self, row: np.ndarray) -> None:
        """row: contiguous uint32, bit t % 32 of word t // 32 says whether token t may come next. The matcher has filled it."""
        if self._is_thinking:
            row[:] = _ALL_ALLOWED
            for token_id in self._marks.withheld:
                row[token_id // 32] &= ~_bit(token_id)
            return
        matcher = self._matcher
        if matcher.is_error() and self._renew():
            matcher = self._matcher
            matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        if matcher.is_error():
            self._fail_at_a_limit(matcher)
            row[:] = _ALL_ALLOWED  # the token that is chosen brings the error along
        if self._thinking is not None and self._marks.start:
            opening = self._marks.start[0]
            row[opening // 32] |= _bit(opening)

    def _compiled(self) -> llguidance.LLMatcher | None:
        """The matcher, which has followed all there is; None when that went wrong."""
        if self._matcher is None and self._error is None:
            try:
                self._matcher, self._rebuild, self.lexer = self._future.result(timeout=0)
            except Exception as error:
                fault = self._param if isinstance(error, GrammarError) else None
                self._fail(f"the grammar could not be compiled: {error}", fault)
                return None
            for token_id in self._unfollowed:
                self._follow(token_id, is_prior=True)
                if self._error is not None:
                    break
        return self._matcher

    def _follow(self, token_id: int, *, is_prior: bool = False) -> None:
        thinking = self._thinking
        if thinking is not None:
            was_open = thinking.is_open
            thinking.follow(token_id)
            if not thinking.is_open:
                self._thinking = None  # what follows is the grammar's; so is this token, if nothing was open
            if was_open or thinking.is_open:
                return
        self._followed.append(token_id)
        if self._matcher.consume_token(token_id):
            return
        if self._renew():
            return
        if _DOES_NOT_FIT in self._matcher.get_error():
            fault = "prior_output_token_ids" if is_prior else None
            self._fail(f"token {token_id} does not fit the grammar: {self._matcher.get_error()}", fault)
        else:
            self._fail_at_a_limit(self._matcher)

    def _renew(self) -> bool:
        """If the lexer that it shares with others is full, go on with one of its own; whether that was so."""
        if self._rebuild is None or _LEXER_IS_FULL not in self._matcher.get_error():
            return False
        matcher, self._rebuild = self._rebuild(), None
        self._matcher = matcher
        return matcher.consume_tokens(self._followed)

    def _fail_at_a_limit(self, matcher: llguidance.LLMatcher) -> None:
        """Following it takes more than a grammar may, which only running it shows."""
        why = matcher.get_error().splitlines()[0].removeprefix("Parser Error: ")
        num_tokens = len(self._followed)
        self._fail(f"{self._param}: the grammar cannot go on after {num_tokens} tokens: {why}", self._param)

    def _fail(self, error: str, param: str | None) -> None:
        self._error, self._error_param = error, param
        self._matcher = None


def _fill(rows: list[tuple[llguidance.LLMatcher, np.ndarray]]) -> None:
    """One after another, since they share a lexer and its lock. llguidance lets go of Python's meanwhile."""
    for matcher, row in rows:
        matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)


def _bit(token_id: int) -> np.uint32:
    """A token's place in its word of a mask."""
    return np.uint32(1 << token_id % 32)


class GrammarManager:
    """Compiled grammars of one engine core."""

    def __init__(self, load_tokenizer: Callable[[], llguidance.LLTokenizer]) -> None:
        """load_tokenizer: called once, on a thread, when the first grammar comes."""
        self._load_tokenizer = load_tokenizer
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._tokenizer_lock = threading.Lock()
        self._num_threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)))
        self._makers: ThreadPoolExecutor | None = None
        self._is_slow = False  # the masks of the last step were worth several threads
        self._lexers = itertools.count()
        self._cache = _CompiledCache(self._num_threads)
        self._pool: ThreadPoolExecutor | None = None

    def preload(self) -> None:
        """Read the vocabulary now. Later it would hold Python's lock, and so every stream, for half a second."""
        with self._tokenizer_lock:
            if self._tokenizer is None:
                self._tokenizer = self._load_tokenizer()

    def start(self, request: EngineCoreRequest) -> MatcherState:
        """Begin to compile a request's grammar, or take it from the cache."""
        assert request.grammar is not None
        params = request.sampling_params
        param = params.structured_outputs.param if params.structured_outputs is not None else "structured_outputs"
        return MatcherState(self._matcher(request.grammar), request.prior_output_token_ids, params.thinking, param)

    def bitmask(self, states: list[MatcherState]) -> bytes:
        """A row of 32-bit words for each; that of a state which fails allows everything."""
        masks = np.empty((len(states), -(-self._tokenizer.vocab_size // 32)), np.uint32)
        by_lexer: defaultdict[int, list[tuple[llguidance.LLMatcher, np.ndarray]]] = defaultdict(list)
        for row, state in zip(masks, states):
            matcher = state.matcher_for_mask()
            if matcher is not None:
                by_lexer[state.lexer].append((matcher, row))
        began = time.perf_counter()
        if self._is_slow:
            list(self._mask_makers().map(_fill, by_lexer.values()))
        else:
            for rows in by_lexer.values():
                _fill(rows)
        took = time.perf_counter() - began
        # That several threads took, one would have taken longer.
        self._is_slow = len(by_lexer) > 1 and took > (_SLOW_S / 2 if self._is_slow else _SLOW_S)
        for row, state in zip(masks, states):
            state.finish_mask(row)
        return masks.tobytes()

    def _mask_makers(self) -> ThreadPoolExecutor:
        if self._makers is None:
            self._makers = ThreadPoolExecutor(self._num_threads, thread_name_prefix="make-masks")
        return self._makers

    def shutdown(self) -> None:
        for pool in (self._pool, self._makers):
            if pool is not None:
                pool.shutdown(wait=False, cancel_futures=True)

    def _matcher(self, grammar: str) -> Future[_Compiled]:
        """A matcher at the beginning of its grammar, for one request alone."""
        compiled = self._cache.take(grammar)
        if compiled is not None:
            done: Future[_Compiled] = Future()
            done.set_result(compiled.copy())
            return done
        return self._compilers().submit(self._compile, grammar)

    def _compilers(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_NUM_COMPILERS, thread_name_prefix="compile-grammar")
        return self._pool

    def _compile(self, grammar: str) -> _Compiled:
        compiled = self._cache.take(grammar)  # n answers to one prompt arrive together
        if compiled is None:
            self.preload()
            began = time.perf_counter()
            matcher = self._build(grammar)
            is_quick = time.perf_counter() - began < _QUICK_S
            rebuild = (lambda: self._build_apart(grammar)) if is_quick else None
            compiled = _Compiled(matcher, rebuild, next(self._lexers))
            self._cache.put(grammar, compiled)
        return compiled.copy()

    def _build_apart(self, grammar: str) -> llguidance.LLMatcher:
        """For one request, since the lexer of the others is full. Nobody else shall begin with that."""
        self._cache.drop(grammar)
        return self._build(grammar)

    def _build(self, grammar: str) -> llguidance.LLMatcher:
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=parser_limits())
        if not matcher.is_error():
            matcher.compute_bitmask()  # the first is the slowest; every copy has it done
        if matcher.is_error():
            raise GrammarError(matcher.get_error())
        return matcher


@dataclass
class _Lexer:
    """A grammar compiled once: what copies of it share."""

    compiled: _Compiled
    num_uses: int = 1


class _CompiledCache:
    """Compiled grammars by their text, the least recently used dropped first. Any thread may use it."""

    def __init__(self, most_lexers: int) -> None:
        """most_lexers: how often one grammar is compiled, so that as many threads may make masks of it at a time."""
        self._most_lexers = most_lexers
        self._entries: OrderedDict[str, list[_Lexer]] = OrderedDict()
        self._num_chars = 0
        self._lock = threading.Lock()

    def take(self, grammar: str) -> _Compiled | None:
        """One to be copied, never changed. None if it should be compiled (once more)."""
        with self._lock:
            lexers = self._entries.get(grammar)
            if lexers is None:
                return None
            self._entries.move_to_end(grammar)
            lexer = min(lexers, key=lambda lexer: lexer.num_uses)
            may_be_more = len(lexers) < self._most_lexers and lexer.compiled.rebuild is not None
            if may_be_more and lexer.num_uses >= _FEW_USES and self._num_lexers() < _MAX_CACHED:
                return None
            lexer.num_uses += 1
            if lexer.num_uses == _MAX_USES:
                lexers.remove(lexer)
                if not lexers:
                    self._drop(grammar)
            return lexer.compiled

    def put(self, grammar: str, compiled: _Compiled) -> None:
        with self._lock:
            if grammar not in self._entries:
                self._entries[grammar] = []
                self._num_chars += len(grammar)
            if len(self._entries[grammar]) < self._most_lexers:
                self._entries[grammar].append(_Lexer(compiled))
            while self._num_lexers() > _MAX_CACHED or self._num_chars > _MAX_CACHED_CHARS:
                self._drop(next(iter(self._entries)))

    def drop(self, grammar: str) -> None:
        with self._lock:
            if grammar in self._entries:
                self._drop(grammar)

    def _num_lexers(self) -> int:
        return sum(map(len, self._entries.values()))

    def _drop(self, grammar: str) -> None:
        del self._entries[grammar]
        self._num_chars -= len(grammar)
