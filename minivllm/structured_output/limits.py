"""What compiling and following a grammar may take: the same wherever it is done."""

from __future__ import annotations

import llguidance

COMPILE_CPU_S = 5  # of processor time, in the process that checks
COMPILE_WAIT_S = 60.0  # of the clock: a machine so busy has other troubles
COMPILE_MEMORY_BYTES = 1 << 30  # beyond what the process had
STACK_BYTES = 1 << 20  # of the thread that checks; those of the engine core have at least twice that


def parser_limits() -> llguidance.LLParserLimits:
    """llguidance's own limits of a grammar and of each mask. A state of the lexer takes some 2 kB."""
    return llguidance.LLParserLimits(max_lexer_states=32_000, verbose_errors=False)
