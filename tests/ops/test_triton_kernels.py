"""The Triton kernels through the interpreter, each against its reference: the table that `tests/gpu` runs on a card."""

from __future__ import annotations

import pytest
import torch

import tests.gpu.interpreter  # noqa: F401  before the kernels
from minivllm.ops import (
    activation,
    bitmask,
    embedding,
    kv_write,
    linear,
    linear_int8,
    log_softmax,
    moe,
    paged_attention,
    penalties,
    rms_norm,
    rotary,
    rotary_kv_write,
    sampling,
    scaling,
    token_logprobs,
)
from minivllm.ops.op import OpSpec
from tests.gpu.case import max_diff
from tests.gpu.cases import ALL_CASES


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("name", ALL_CASES)
def test_a_kernel_agrees_with_its_reference(name):
    check = ALL_CASES[name]("cpu", False)
    difference = max_diff(check.run(), check.expected())
    assert difference <= check.tolerance, f"max_diff {difference:.3g} > {check.tolerance:.3g}"


OPS = {
    activation.silu_mul: "triton.activation", activation.gelu_tanh_mul: "triton.activation",
    embedding.embedding: "triton.embedding", kv_write.kv_write: "triton.kv_write", moe.moe: "triton.moe",
    paged_attention.paged_attention: "triton.paged_attention", rms_norm.rms_norm: "triton.rms_norm",
    rms_norm.add_rms_norm: "triton.rms_norm", rotary.rotary: "triton.rotary",
    rotary_kv_write.rotary_kv_write: "triton.rotary", scaling.scale: "triton.scaling",
    scaling.soft_cap: "triton.scaling", linear.linear: "linear_cuda",
    linear.invariant_linear: "triton.linear", linear_int8.int8_linear: "triton.linear",
    bitmask.apply_bitmask: "triton.bitmask", log_softmax.log_softmax: "triton.log_softmax",
    penalties.apply_penalties: "triton.penalties", penalties.count_tokens: "triton.penalties",
    sampling.gumbel_argmax: "triton.sampling", sampling.top_k_top_p_min_p: "triton.sampling",
    token_logprobs.token_logprobs: "triton.log_softmax",
}  # fmt: skip
ON_LOGITS = {bitmask, log_softmax, penalties, sampling, token_logprobs}


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_a_gpu_gets_the_kernel_made_for_it(op):
    is_on_logits = any(op in vars(module).values() for module in ON_LOGITS)
    chosen = op.select(OpSpec("cuda", torch.float32 if is_on_logits else torch.bfloat16))
    assert chosen.__module__ == f"minivllm.ops.{OPS[op]}"


def test_a_cpu_gets_none_of_them():
    for op in OPS:
        assert "triton" not in op.select(OpSpec("cpu", torch.float32)).__module__
