"""A layer's attention: what is its own reaches the kernel."""

from __future__ import annotations

import pytest
import torch

from minivllm.attention.backend import AttentionSpec, ForwardContext, StepInputs
from minivllm.attention.backends.cpu_native import CpuNativeBackend
from minivllm.layers.attention import Attention
from minivllm.ops.paged_attention import Options, reference

NUM_TOKENS, HEADS, KV_HEADS, HEAD_DIM = 40, 4, 2, 64


@pytest.fixture
def backend():
    return CpuNativeBackend(AttentionSpec(HEADS, KV_HEADS, HEAD_DIM, 32, torch.float32, "cpu"))


def attend(backend, layer):
    """What the layer makes of one prompt, and the same prompt for `reference`: (out, q, cache, step)."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(NUM_TOKENS, n, HEAD_DIM) for n in (HEADS, KV_HEADS, KV_HEADS))
    step = StepInputs(
        query_start_loc=torch.tensor([0, NUM_TOKENS], dtype=torch.int32),
        seq_lens=torch.tensor([NUM_TOKENS], dtype=torch.int32),
        block_table=torch.tensor([[2, 1]], dtype=torch.int32),
        slot_mapping=torch.tensor([*range(64, 96), *range(32, 40)]),
    )
    cache = backend.new_kv_cache(3)
    out = layer(q, k, v, ForwardContext([backend.build_metadata(step)], [cache]))
    return out.clone(), q, cache, step


def expected(backend, q, cache, step, **options):
    out = reference(
        q, cache, step.block_table, step.seq_lens, step.query_start_loc,
        layout=backend.layout, options=Options(HEAD_DIM**-0.5, **options),
    )  # fmt: skip
    return out.view(NUM_TOKENS, -1)


@pytest.mark.parametrize("name", ["sinks", "alibi_slopes"])
def test_a_layers_own_tensor_of_the_heads_changes_its_attention_as_the_reference_says(backend, name):
    per_head = torch.tensor([1.5, -1.0, 0.25, 3.0])
    out, *prompt = attend(backend, Attention(0, backend, **{name: per_head}))
    torch.testing.assert_close(out, expected(backend, *prompt, **{name: per_head}), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(out, attend(backend, Attention(0, backend))[0], atol=1e-2)


def test_sinks_may_be_filled_in_after_the_layer_is_built(backend):
    sinks = torch.zeros(HEADS)
    layer = Attention(0, backend, sinks=sinks)
    sinks.copy_(torch.tensor([2.0, 1.0, 0.0, -1.0]))
    out, *prompt = attend(backend, layer)
    torch.testing.assert_close(out, expected(backend, *prompt, sinks=sinks), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(HEADS, dtype=torch.bfloat16)])
def test_a_tensor_that_has_not_one_number_a_head_is_refused(backend, wrong):
    with pytest.raises(ValueError, match="sinks is"):
        Attention(0, backend, sinks=wrong)
