"""Gemma 2 (Gemma Team 2024, arXiv:2408.00118).

Beside Llama: every other layer has a window; a norm after attention and MLP as well as before; GELU in the gate; soft
caps on scores and logits; embeddings scaled by the root of their size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from minivllm.attention.backend import AttentionBackend, ForwardContext
from minivllm.config.hf_config import HFConfig
from minivllm.exceptions import ModelFilesError
from minivllm.layers.embedding import GivenEmbeddings
from minivllm.layers.norm import GemmaRMSNorm
from minivllm.layers.rotary import RotaryEmbedding
from minivllm.layers.weight import Weight, under
from minivllm.models.decoder import MLP, DecoderForCausalLM, SelfAttention, Variant
from minivllm.models.qwen2 import sliding_windows
from minivllm.ops.op import OpSpec
from minivllm.ops.scaling import scale, soft_cap


class GemmaAttention(SelfAttention):
    """Its output is normed before it is added."""

    norm_class = GemmaRMSNorm

    def __call__(self, x: torch.Tensor, positions: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """Of the wanted rows alone in the last layer."""
        turn = self.rotary.turn(positions)
        if self.q_norm is None:
            out = self.attention.of_projection(self.qkv_proj, x, None, ctx, turn)
        else:
            q, k, v = self.qkv_proj(x)
            out = self.attention(self.q_norm(q), self.k_norm(k), v, ctx, turn)
        return self.o_proj(self.wanted(out, ctx))


class GemmaMLP(MLP):
    """Likewise."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.gate_up_proj(x))


class GemmaLayer:
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x))); additions fused with the norms that follow."""

    def __init__(
        self,
        config: HFConfig,
        variant: Variant,
        index: int,
        backend: AttentionBackend,
        rotary: RotaryEmbedding,
        quantization: str | None,
    ) -> None:
        where = {"dtype": backend.spec.dtype, "device": backend.spec.device}
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = GemmaRMSNorm(size, eps, **where)
        self.self_attn = GemmaAttention(config, variant, index, backend, rotary, quantization)
        self.post_attention_layernorm = GemmaRMSNorm(size, eps, **where)
        self.pre_feedforward_layernorm = GemmaRMSNorm(size, eps, **where)
        self.mlp = GemmaMLP(config, variant, **where, quantization=quantization)
        self.post_feedforward_layernorm = GemmaRMSNorm(size, eps, **where)

    def __call__(
        self, x: torch.Tensor | None, residual: torch.Tensor, positions: torch.Tensor, ctx: ForwardContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x: what is still to be added to the residual stream, None in the first layer; returns the next such, and the
        stream, which is changed in place; in the last layer the wanted rows of both.
        """
        x = self.input_layernorm(residual) if x is None else self.input_layernorm.add(x, residual)
        x = self.post_attention_layernorm(self.self_attn(x, positions, ctx))
        residual = self.self_attn.wanted(residual, ctx)
        x = self.pre_feedforward_layernorm.add(x, residual)
        return self.post_feedforward_layernorm(self.mlp(x)), residual

    def weights(self) -> Iterator[Weight]:
        yield from under("input_layernorm", self.input_layernorm.weights())
        yield from under("self_attn", self.self_attn.weights())
        yield from under("post_attention_layernorm", self.post_attention_layernorm.weights())
        yield from under("pre_feedforward_layernorm", self.pre_feedforward_layernorm.weights())
        yield from under("mlp", self.mlp.weights())
        yield from under("post_feedforward_layernorm", self.post_feedforward_layernorm.weights())


class Gemma2ForCausalLM(DecoderForCausalLM):
    layer_class = GemmaLayer
    norm_class = GemmaRMSNorm
    DEFAULT_PATTERN = 2  # of so many layers, the last sees everything
    QK_NORM = False

    def __init__(
        self, config: HFConfig, backend: AttentionBackend, max_positions: int, quantization: str | None = None
    ) -> None:
        super().__init__(config, backend, max_positions, quantization)
        device, dtype = backend.spec.device, backend.spec.dtype
        # As the checkpoint was trained: the factor is rounded before it multiplies.
        self._scale = scale.select(OpSpec(device, dtype))
        self.embed_scale = torch.tensor(config.hidden_size**0.5, dtype=dtype).item()
        self._soft_cap = soft_cap.select(OpSpec(device, torch.float32))
        self.logit_softcap = config.final_logit_softcapping

    @classmethod
    def variant(cls, config: HFConfig) -> Variant:
        if config.sliding_window is None:
            raise ModelFilesError(f"config.json of {config.architecture} names no sliding_window; add it")
        windows: list[int | None]
        if config.layer_types is not None:
            windows = sliding_windows(config)
        else:
            pattern = config.sliding_window_pattern or cls.DEFAULT_PATTERN
            is_last = [(index + 1) % pattern == 0 for index in range(config.num_hidden_layers)]
            windows = [None if last else config.sliding_window for last in is_last]
        bias = bool(config.attention_bias)
        return Variant(
            sliding_windows=windows,
            qkv_bias=bias,
            o_bias=bias,
            qk_norm=cls.QK_NORM,
            scale=(config.query_pre_attn_scalar or config.head_dim) ** -0.5,
            softcap=config.attn_logit_softcapping or 0.0,
        )

    def embed(self, input_ids: torch.Tensor, given: GivenEmbeddings | None) -> torch.Tensor:
        """Given ones are taken as they are: the scale belongs to the table, as transformers 5 has it."""
        embeddings = super().embed(input_ids, None)
        self._scale(embeddings, self.embed_scale)
        if given is not None:
            given.put_into(embeddings)
        return embeddings

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        ctx: ForwardContext,
        given: GivenEmbeddings | None = None,
    ) -> torch.Tensor:
        x, residual = None, self.embed(input_ids, given)
        for layer in self.layers:
            x, residual = layer(x, residual, positions, ctx)
        return self.norm.add(x, residual)

    @property
    def can_choose(self) -> bool:
        return self.logit_softcap is None  # different numbers may be one when they are capped: another would be first

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = super().compute_logits(hidden)
        if self.logit_softcap is not None:
            self._soft_cap(logits, self.logit_softcap)
        return logits
