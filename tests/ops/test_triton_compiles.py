"""The Triton kernels through the compiler, for cards that are not here: what the interpreter accepts it may refuse."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What a bfloat16 model of head size 128 uses, by the beginnings of the cases' names; the rest by hand (docs/gpu.md).
CASES = """
    attention_mixed_h attention_decode_h attention_mixed_i attention_mixed_all rms_norm_bf16 add_rms_norm_bf16_1
    silu_mul_bf16 gelu_mul_bf16 embedding scale_bf16 soft_cap_bf16 kv_write_bf16 rotary_bf16 rotary_kv_write
    gumbel_argmax_130 truncation_130 token_logprobs_130 bitmask penalties moe_bf16
    linear_gemm_residual linear_gemm_silu_a linear_int8_silu_a linear_fp8_silu_a
""".split()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("arch", ["80", "90"])
def test_every_kernel_compiles_and_fits_the_card(arch):
    command = [sys.executable, "-m", "tests.gpu.compiler", "--arch", arch, "--only", *CASES]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "_attend_kernel" in done.stdout and "_peak_kernel" in done.stdout


BATCHES = """
import torch
from minivllm.ops.kv_layout import RowLayout
from minivllm.ops.paged_attention import Options
from minivllm.ops.triton.linear import TritonLinear
from minivllm.ops.triton.paged_attention import SEGMENT, BatchShape, paged_attention
from minivllm.ops.triton.penalties import count_tokens
from minivllm.ops.triton.token_logprobs import token_logprobs
from tests.gpu.compiler import Compiler

layout, linear = RowLayout("bfloat16", 2, 64, 64), TritonLinear(64, 64, torch.bfloat16, device="cpu")
cache, options = torch.zeros(layout.shape(1), dtype=torch.uint8), Options(0.125)
counts = torch.zeros(2, 64, dtype=torch.int32)
with Compiler(90) as compiler:
    for n in (1, 3, 16):
        q, ids = torch.zeros(n, 4, 64, dtype=torch.bfloat16), torch.zeros(n, 40, dtype=torch.int32)
        lens, starts = torch.zeros(n, dtype=torch.int32), torch.zeros(n + 1, dtype=torch.int32)
        shape = BatchShape(1, n * SEGMENT)
        paged_attention(q, cache, ids, lens, starts, layout=layout, options=options, shape=shape)
        linear(q[:, 0].contiguous())
        slots = torch.zeros(n, dtype=torch.int64)
        count_tokens(counts, slots, slots, slots.to(torch.uint8))
        token_logprobs(torch.zeros(2, 64), torch.zeros(2, n, dtype=torch.int64))
print(*sorted(each.kernel for each in compiler.compiled.values()))
"""


@pytest.mark.timeout(600)
def test_a_batch_of_another_size_or_a_few_more_logprobs_need_no_other_kernel():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", BATCHES], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    kernels = ["_attend_kernel", "_count_kernel", "_gemm_kernel", "_merge_kernel", "_token_logprobs_kernel"]
    assert done.stdout.split() == kernels, done.stderr[-3000:]


CODES = """
import torch
import triton
from minivllm.ops.triton.linear import quantise_rows
from tests.gpu.compiler import Compiler

built, compile = [], triton.compile
triton.compile = lambda *args, **options: built.append(compile(*args, **options)) or built[-1]
with Compiler(90):
    quantise_rows(torch.zeros(2, 64), torch.int8)
print(len(built), built[0].asm["ptx"].count("fma.rn"))
"""


def test_int8_codes_are_rounded_as_the_reference_says_with_no_multiplication_and_addition_in_one():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", CODES], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["1", "0"], done.stderr[-3000:]
