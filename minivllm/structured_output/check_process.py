"""The process in which constraints are first compiled: one that may be killed, by a limit, by a crash or by us.

What it let pass, the engine core compiles in the same way. Owns nothing but its end of the pipe.
"""

from __future__ import annotations

import os
import resource
import signal
import threading
from multiprocessing.connection import Connection

import llguidance
import msgspec

from minivllm.sampling_params import StructuredOutputsParams
from minivllm.structured_output import limits
from minivllm.structured_output.grammar import GrammarError, to_grammar
from minivllm.structured_output.vocabulary import Vocabulary
from minivllm.utils.process import unblock_interrupts

_MAX_LINE, _MAX_LINES = 160, 12  # of an error's text


class CheckRequest(msgspec.Struct):
    """One of the two: what a request asks for, or the grammar that was made of it before."""

    params: StructuredOutputsParams | None = None
    grammar: str | None = None


class CheckReply(msgspec.Struct):
    """The grammar, which compiles, or why there is none."""

    grammar: str = ""
    error: str | None = None


def run_checks(pipe: Connection) -> None:
    """The process's entry point. The first message is a Vocabulary, each that follows a CheckRequest to be answered."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; our parent decides
    unblock_interrupts()
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, wherever it is
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a crash would print what users wrote
    threading.stack_size(limits.STACK_BYTES)
    thread = threading.Thread(target=_answer, args=(pipe,))
    thread.start()
    thread.join()


def _answer(pipe: Connection) -> None:
    vocabulary = msgspec.msgpack.decode(pipe.recv_bytes(), type=Vocabulary)
    tokenizer = vocabulary.for_llguidance()
    _limit_memory()
    decode = msgspec.msgpack.Decoder(CheckRequest).decode
    while True:
        try:
            request = decode(pipe.recv_bytes())
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, limits.COMPILE_CPU_S)
        reply = _check(request, tokenizer, vocabulary)
        signal.setitimer(signal.ITIMER_PROF, 0)
        pipe.send_bytes(msgspec.msgpack.encode(reply))


def _check(request: CheckRequest, tokenizer: llguidance.LLTokenizer, vocabulary: Vocabulary) -> CheckReply:
    try:
        grammar = request.grammar
        if request.params is not None:
            grammar = to_grammar(request.params, vocabulary.special_ids)
        matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits.parser_limits())
        if not matcher.is_error():
            matcher.compute_bitmask()  # some things are found out here only
    except GrammarError as error:
        return CheckReply(error=str(error))
    except (ValueError, RecursionError) as error:  # what is no JSON to Rust: 1e400, …
        return CheckReply(error=f"cannot be read: {error}")
    except MemoryError:
        os.abort()  # as llguidance does when it gets none: the checker knows it by the signal
    if matcher.is_error():
        return CheckReply(error=_readable(matcher.get_error()))
    return CheckReply(grammar)


def _readable(error: str) -> str:
    """What it quotes of the grammar, which may be all of it, cut short."""
    if error.startswith("NoExtensionBias"):  # llguidance's word for: no first token
        return "no text fits it; see whether it refers to nothing but itself, or excludes every character"
    lines = [line if len(line) <= _MAX_LINE else line[:_MAX_LINE] + "…" for line in error.rstrip().split("\n")]
    return "\n".join(lines[:_MAX_LINES])


def _limit_memory() -> None:
    with open("/proc/self/statm") as statm:
        in_use = int(statm.read().split()[0]) * resource.getpagesize()
    limit = in_use + limits.COMPILE_MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
