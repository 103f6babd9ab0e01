"""The Triton kernels through the interpreter, each against its reference: the table that `tests/gpu` runs on a card."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

import tests.gpu.interpreter  # noqa: F401  before the kernels
from minivllm.ops import (
    activation,
    bitmask,
    cuda,
    embedding,
    kv_write,
    likeliest_tokens,
    linear,
    linear_int8,
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


@pytest.mark.parametrize(("num_parts", "option"), [(2, "plain"), (1, "window_1100")])
def test_few_programs_that_share_a_decodes_segments_give_the_bits_of_one_each(num_parts, option, monkeypatch):
    from minivllm.ops.triton import paged_attention as kernel
    from tests.gpu.cases.attention import attention

    kinds = {"batch": "segments", "head_dim": 16, "group": 2, "option": option}
    case = attention("cpu", False, **kinds)
    one_each = case.run()
    assert max_diff(one_each, case.expected()) <= case.tolerance
    monkeypatch.setattr(kernel, "choose_num_parts", lambda *sizes: num_parts)
    assert torch.equal(attention("cpu", False, **kinds).run(), one_each)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_prefill_is_right_where_the_copy_engine_fetches_nothing(head_dim, monkeypatch):
    """As on cards below compute capability 9.0, and with a Triton that has no tensor descriptors."""
    from minivllm.ops.triton import paged_attention as kernel
    from tests.gpu.cases.attention import attention

    spec = importlib.util.spec_from_file_location("of_an_older_triton", kernel.__file__)
    older = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "triton.tools.tensor_descriptor", None)
        context.setitem(sys.modules, spec.name, older)
        spec.loader.exec_module(older)
    assert older.TensorDescriptor is None
    monkeypatch.setattr(kernel, "TensorDescriptor", None)
    case = attention("cpu", False, batch="mixed", head_dim=head_dim, block_size=64)
    assert max_diff(case.run(), case.expected()) <= case.tolerance


def test_a_batch_that_fills_a_card_launches_few_programs_that_may_find_nothing_to_do():
    from minivllm.ops.triton.paged_attention import choose_num_parts

    assert choose_num_parts(8, 128) == 128  # one request: all of its segments at once
    assert choose_num_parts(64 * 8, 128) == 32
    assert choose_num_parts(1024 * 8, 128) == 8
    assert choose_num_parts(1024 * 8, 1) == 1


OPS = {
    activation.silu_mul: "triton.activation", activation.gelu_tanh_mul: "triton.activation",
    embedding.embedding: "triton.embedding", kv_write.kv_write: "triton.kv_write", moe.moe: "triton.moe",
    paged_attention.paged_attention: "triton.paged_attention", rms_norm.rms_norm: "triton.rms_norm",
    rms_norm.add_rms_norm: "triton.rms_norm", rotary.rotary: "triton.rotary",
    rotary_kv_write.rotary_kv_write: "triton.rotary", scaling.scale: "triton.scaling",
    scaling.soft_cap: "triton.scaling", linear.linear: "linear_cuda",
    linear.invariant_linear: "triton.linear", linear_int8.int8_linear: "triton.linear",
    bitmask.apply_bitmask: "triton.bitmask",
    penalties.apply_penalties: "triton.penalties", penalties.count_tokens: "triton.penalties",
    sampling.gumbel_argmax: "triton.sampling", sampling.top_k_top_p_min_p: "triton.sampling",
    token_logprobs.token_logprobs: "triton.token_logprobs",
    likeliest_tokens.likeliest_tokens: "triton.likeliest_tokens",
}  # fmt: skip
ON_LOGITS = {bitmask, likeliest_tokens, penalties, sampling, token_logprobs}


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_a_gpu_gets_the_kernel_made_for_it(op, monkeypatch):
    monkeypatch.setattr(cuda, "extension", lambda: (None, "built without CUDA kernels"))
    is_on_logits = any(op in vars(module).values() for module in ON_LOGITS)
    chosen = op.select(OpSpec("cuda", torch.float32 if is_on_logits else torch.bfloat16))
    assert chosen.__module__ == f"minivllm.ops.{OPS[op]}"


def test_a_cpu_gets_none_of_them():
    for op in OPS:
        assert "triton" not in op.select(OpSpec("cpu", torch.float32)).__module__
