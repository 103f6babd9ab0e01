"""Gemma 3, text only (Gemma Team 2025, arXiv:2503.19786).

Beside Llama: five layers with a window to one without, each kind with a rotary base of its own; queries and keys
normalised head by head; a norm after attention and MLP as well as before; GELU in the gate; embeddings scaled by the
root of their size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from minivllm.attention.backend import AttentionBackend, ForwardContext
from minivllm.config.hf_config import HFConfig
from minivllm.exceptions import ModelFilesError
from minivllm.layers.activation import gated_activation
from minivllm.layers.attention import Attention
from minivllm.layers.embedding import Embedding, LMHead, TiedEmbedding
from minivllm.layers.linear import MergedLinear, QKVLinear, RowLinear
from minivllm.layers.norm import GemmaRMSNorm
from minivllm.layers.rotary import RotaryEmbedding
from minivllm.layers.weight import Weight, under
from minivllm.models.decoder import DecoderForCausalLM, Variant
from minivllm.models.qwen2 import sliding_windows

DEFAULT_PATTERN = 6  # of so many layers, the last sees everything
DEFAULT_LOCAL_THETA = 10000.0


class Gemma3Attention:
    """Grouped-query attention; the layer's window decides which rotary table turns it."""

    def __init__(
        self, config: HFConfig, index: int, window: int | None, backend: AttentionBackend, rotary: RotaryEmbedding
    ) -> None:
        where = {"dtype": backend.spec.dtype, "device": backend.spec.device}
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        bias = bool(config.attention_bias)
        self.qkv_proj = QKVLinear(config.hidden_size, heads, kv_heads, head_dim, bias=bias, **where)
        self.o_proj = RowLinear(heads * head_dim, config.hidden_size, "o_proj", bias=bias, **where)
        self.q_norm = GemmaRMSNorm(head_dim, config.rms_norm_eps, **where)
        self.k_norm = GemmaRMSNorm(head_dim, config.rms_norm_eps, **where)
        self.rotary = rotary
        scale = (config.query_pre_attn_scalar or head_dim) ** -0.5
        self.attention = Attention(index, backend, sliding_window=window, scale=scale)

    def __call__(self, x: torch.Tensor, positions: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        q, k, v = self.qkv_proj(x)
        q, k = self.q_norm(q), self.k_norm(k)
        self.rotary(positions, q, k)
        return self.o_proj(self.attention(q, k, v, ctx))

    def weights(self) -> Iterator[Weight]:
        yield from self.qkv_proj.weights()
        yield from self.o_proj.weights()
        yield from under("q_norm", self.q_norm.weights())
        yield from under("k_norm", self.k_norm.weights())


class Gemma3MLP:
    """The gated feed-forward part."""

    def __init__(self, config: HFConfig, *, dtype: torch.dtype, device: str) -> None:
        where = {"dtype": dtype, "device": device}
        inner = config.intermediate_size
        self.gate_up_proj = MergedLinear(config.hidden_size, {"gate_proj": inner, "up_proj": inner}, **where)
        self.down_proj = RowLinear(inner, config.hidden_size, "down_proj", **where)
        self.activation = gated_activation(config.hidden_act, **where)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation(self.gate_up_proj(x)))

    def weights(self) -> Iterator[Weight]:
        yield from self.gate_up_proj.weights()
        yield from self.down_proj.weights()


class Gemma3Layer:
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x))); additions fused with the norms that follow."""

    def __init__(
        self,
        config: HFConfig,
        index: int,
        window: int | None,
        backend: AttentionBackend,
        rotary: RotaryEmbedding,
    ) -> None:
        where = {"dtype": backend.spec.dtype, "device": backend.spec.device}
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = GemmaRMSNorm(size, eps, **where)
        self.self_attn = Gemma3Attention(config, index, window, backend, rotary)
        self.post_attention_layernorm = GemmaRMSNorm(size, eps, **where)
        self.pre_feedforward_layernorm = GemmaRMSNorm(size, eps, **where)
        self.mlp = Gemma3MLP(config, **where)
        self.post_feedforward_layernorm = GemmaRMSNorm(size, eps, **where)

    def __call__(
        self, x: torch.Tensor | None, residual: torch.Tensor, positions: torch.Tensor, ctx: ForwardContext
    ) -> torch.Tensor:
        """x: what is still to be added to the residual stream, None in the first layer; returns the next such.

        `residual` is changed in place.
        """
        x = self.input_layernorm(residual) if x is None else self.input_layernorm.add(x, residual)
        x = self.post_attention_layernorm(self.self_attn(x, positions, ctx))
        x = self.pre_feedforward_layernorm.add(x, residual)
        return self.post_feedforward_layernorm(self.mlp(x))

    def weights(self) -> Iterator[Weight]:
        yield from under("input_layernorm", self.input_layernorm.weights())
        yield from under("self_attn", self.self_attn.weights())
        yield from under("post_attention_layernorm", self.post_attention_layernorm.weights())
        yield from under("pre_feedforward_layernorm", self.pre_feedforward_layernorm.weights())
        yield from under("mlp", self.mlp.weights())
        yield from under("post_feedforward_layernorm", self.post_feedforward_layernorm.weights())


class Gemma3ForCausalLM(DecoderForCausalLM):
    def __init__(self, config: HFConfig, backend: AttentionBackend, max_positions: int) -> None:
        where = {"dtype": backend.spec.dtype, "device": backend.spec.device}
        sizes = (config.vocab_size, config.hidden_size)
        self.sliding_windows = self.variant(config).sliding_windows
        self.tied = config.tie_word_embeddings
        self.lm_head = LMHead(*sizes, **where)
        self.embed_tokens = TiedEmbedding(self.lm_head) if self.tied else Embedding(*sizes, **where)
        # As the checkpoint was trained: the factor is rounded before it multiplies.
        self.embed_scale = torch.tensor(config.hidden_size**0.5, dtype=backend.spec.dtype).item()
        full = RotaryEmbedding(config, max_positions, **where)
        local_theta = config.local_rope_theta or DEFAULT_LOCAL_THETA
        local_config = replace(config, rope_theta=local_theta, rope_parameters={})
        local = RotaryEmbedding(local_config, max_positions, **where)
        self.layers = [
            Gemma3Layer(config, index, window, backend, full if window is None else local)
            for index, window in enumerate(self.sliding_windows)
        ]
        self.norm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps, **where)

    @staticmethod
    def variant(config: HFConfig) -> Variant:
        if config.sliding_window is None:
            raise ModelFilesError("config.json of a Gemma 3 model names no sliding_window; add it")
        if config.layer_types is not None:
            return Variant(sliding_windows=sliding_windows(config), qk_norm=True)
        pattern = config.sliding_window_pattern or DEFAULT_PATTERN
        windows = [config.sliding_window if (i + 1) % pattern else None for i in range(config.num_hidden_layers)]
        return Variant(sliding_windows=windows, qk_norm=True)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        x, residual = None, self.embed_tokens(input_ids).mul_(self.embed_scale)
        for layer in self.layers:
            x = layer(x, residual, positions, ctx)
        return self.norm.add(x, residual)
