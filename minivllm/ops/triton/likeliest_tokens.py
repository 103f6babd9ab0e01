"""The tokens of the largest logits by selection: each chunk's largest, then the largest of those.

Keys are the reference's, no two of them equal, so both find the same tokens in the same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minivllm.ops.checks import require
from minivllm.ops.likeliest_tokens import reference

_CHUNK = 4096  # of the vocabulary; a program's
_MOST = 64  # tokens; of more a sort is no slower
_NOTHING = tl.constexpr(-(2**63) + 1)  # below every key


@triton.jit
def _take_largest(places, keys, num_tokens):
    """Store the largest keys, descending."""
    for i in range(num_tokens):
        most = tl.max(keys, 0)
        tl.store(places + i, most)
        keys = tl.where(keys == most, _NOTHING, keys)


@triton.jit(do_not_specialize=["vocab_size", "num_chunks", "num_tokens"])
def _chunk_kernel(largest, logits, row_stride, vocab_size, num_chunks, num_tokens, CHUNK: tl.constexpr):
    """largest: [num_rows, num_chunks, num_tokens]. Grid: (num_rows, num_chunks)."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row * row_stride + index, mask=index < vocab_size, other=0.0)
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # -0.0 is 0.0's equal
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    keys = (ordered << 32) | (vocab_size - 1 - index).to(tl.int64)
    keys = tl.where(index < vocab_size, keys, _NOTHING)
    _take_largest(largest + (row * num_chunks + chunk) * num_tokens, keys, num_tokens)


@triton.jit(do_not_specialize=["vocab_size", "num_keys", "num_tokens"])
def _merge_kernel(tokens, largest, vocab_size, num_keys, num_tokens, BLOCK: tl.constexpr):
    """Grid: (num_rows,)."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    keys = tl.load(largest + row * num_keys + at, mask=at < num_keys, other=_NOTHING)
    for i in range(num_tokens):
        most = tl.max(keys, 0)
        tl.store(tokens + row * num_tokens + i, vocab_size - 1 - (most & 0xFFFFFFFF))
        keys = tl.where(keys == most, _NOTHING, keys)


def likeliest_tokens(logits: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """`reference` of `ops/likeliest_tokens.py`. Any row stride; more than 64 tokens are its own work."""
    num_rows, vocab_size = logits.shape
    if num_tokens > _MOST:
        return reference(logits, num_tokens)
    require("logits", logits, torch.float32, logits.shape, dense=1)
    tokens = torch.empty(num_rows, num_tokens, dtype=torch.int64, device=logits.device)
    if not num_rows or not num_tokens:
        return tokens
    num_chunks = triton.cdiv(vocab_size, _CHUNK)
    largest = torch.empty(num_rows, num_chunks, num_tokens, dtype=torch.int64, device=logits.device)
    _chunk_kernel[(num_rows, num_chunks)](
        largest, logits, logits.stride(0), vocab_size, num_chunks, num_tokens, CHUNK=_CHUNK, num_warps=8
    )
    num_keys = num_chunks * num_tokens
    _merge_kernel[(num_rows,)](
        tokens, largest, vocab_size, num_keys, num_tokens, BLOCK=triton.next_power_of_2(num_keys), num_warps=4
    )
    return tokens
