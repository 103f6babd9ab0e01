"""The pre-norm decoder that Llama gave its shape; a model file says only how it differs.

Owns the order of the layers; knows nothing of requests, of the cache's layout or of checkpoint files.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from minivllm.attention.backend import AttentionBackend, ForwardContext
from minivllm.config.hf_config import HFConfig
from minivllm.layers.attention import Attention
from minivllm.layers.embedding import Embedding, GivenEmbeddings, LMHead, TiedEmbedding
from minivllm.layers.linear import GatedLinear, QKVLinear, RowLinear
from minivllm.layers.norm import RMSNorm
from minivllm.layers.rotary import RotaryEmbedding
from minivllm.layers.weight import Weight, under
from minivllm.ops.embedding import embedding
from minivllm.ops.op import OpSpec
from minivllm.ops.rotary import HeadNorms


@dataclass(frozen=True)
class Variant:
    """How one architecture differs from another."""

    sliding_windows: list[int | None]  # one a layer
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    scale: float | None = None  # of the scores; None: 1 / sqrt(head_dim)
    softcap: float = 0.0  # of the scores; 0: none


class SelfAttention:
    """Grouped-query attention with rotary positions."""

    norm_class = RMSNorm

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
        packed = {**where, "quantization": quantization}
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.qkv_proj = QKVLinear(
            config.hidden_size, heads, kv_heads, head_dim, bias=variant.qkv_bias, **packed
        )
        self.o_proj = RowLinear(heads * head_dim, config.hidden_size, "o_proj", bias=variant.o_bias, **packed)
        self.q_norm = self.norm_class(head_dim, config.rms_norm_eps, **where) if variant.qk_norm else None
        self.k_norm = self.norm_class(head_dim, config.rms_norm_eps, **where) if variant.qk_norm else None
        self.rotary = rotary
        self.take_rows: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
        if index == config.num_hidden_layers - 1:  # nobody attends to what comes behind this attention
            self.take_rows = embedding.select(OpSpec(backend.spec.device, backend.spec.dtype))
        self.attention = Attention(
            index,
            backend,
            sliding_window=variant.sliding_windows[index],
            scale=variant.scale,
            softcap=variant.softcap,
        )

    def add_to(
        self, residual: torch.Tensor, norm: RMSNorm, positions: torch.Tensor, ctx: ForwardContext
    ) -> torch.Tensor:
        """`residual` with the attention of norm(residual) added to it in place; in the last layer, the wanted rows of
        that."""
        norms = None
        if self.q_norm is not None:
            norms = HeadNorms(self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)
        out = self.attention.of_projection(self.qkv_proj, residual, norm, ctx, self.rotary.turn(positions, norms))
        residual, out = self.wanted(residual, ctx), self.wanted(out, ctx)
        self.o_proj.add_to(residual, out)
        return residual

    def wanted(self, rows: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """Of a row for each token in the last layer those that somebody reads."""
        if self.take_rows is None or ctx.wanted is None:
            return rows
        return self.take_rows(ctx.wanted, rows)

    def weights(self) -> Iterator[Weight]:
        yield from self.qkv_proj.weights()
        yield from self.o_proj.weights()
        if self.q_norm is not None:
            yield from under("q_norm", self.q_norm.weights())
            yield from under("k_norm", self.k_norm.weights())


class MLP:
    """The gated feed-forward part."""

    def __init__(
        self, config: HFConfig, variant: Variant, *, dtype: torch.dtype, device: str, quantization: str | None
    ) -> None:
        where = {"bias": variant.mlp_bias, "dtype": dtype, "device": device, "quantization": quantization}
        inner = config.intermediate_size
        self.gate_up_proj = GatedLinear(config.hidden_size, inner, config.hidden_act, **where)
        self.down_proj = RowLinear(inner, config.hidden_size, "down_proj", **where)

    def add_to(self, residual: torch.Tensor, norm: RMSNorm) -> None:
        """Add the MLP of norm(residual) to `residual` in place."""
        self.gate_up_proj.add_to(residual, residual, norm, self.down_proj)

    def weights(self) -> Iterator[Weight]:
        yield from self.gate_up_proj.weights()
        yield from self.down_proj.weights()


class DecoderLayer:
    """x + attention(norm(x)), then x + mlp(norm(x)); a norm is part of the projection behind it, where that can be, and
    each addition of the one before it."""

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
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, **where)
        self.self_attn = SelfAttention(config, variant, index, backend, rotary, quantization)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, **where)
        self.mlp = MLP(config, variant, **where, quantization=quantization)

    def __call__(self, residual: torch.Tensor, positions: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """residual: [T, hidden_size], changed in place and returned; in the last layer its wanted rows."""
        residual = self.self_attn.add_to(residual, self.input_layernorm, positions, ctx)
        self.mlp.add_to(residual, self.post_attention_layernorm)
        return residual

    def weights(self) -> Iterator[Weight]:
        yield from under("input_layernorm", self.input_layernorm.weights())
        yield from under("self_attn", self.self_attn.weights())
        yield from under("post_attention_layernorm", self.post_attention_layernorm.weights())
        yield from under("mlp", self.mlp.weights())


class DecoderForCausalLM(ABC):
    """A decoder and its LM head. Memory is reserved here; the loader fills it."""

    layer_class: type = DecoderLayer
    norm_class = RMSNorm

    def __init__(
        self, config: HFConfig, backend: AttentionBackend, max_positions: int, quantization: str | None = None
    ) -> None:
        """max_positions: tokens the rotary table covers; quantization: what linear weights become, None: `dtype`.

        Raises:
            ModelFilesError: config.json asks for something that is not served.
        """
        variant = self.variant(config)
        where = {"dtype": backend.spec.dtype, "device": backend.spec.device}
        sizes = (config.vocab_size, config.hidden_size)
        self.sliding_windows = variant.sliding_windows
        self.tied = config.tie_word_embeddings
        self.lm_head = LMHead(*sizes, **where, quantization=quantization)
        self.embed_tokens = TiedEmbedding(self.lm_head) if self.tied else Embedding(*sizes, **where)
        full, windowed = self.rotaries(config, max_positions, backend.spec.device)
        self.layers = [
            self.layer_class(
                config, variant, index, backend, full if window is None else windowed, quantization
            )
            for index, window in enumerate(self.sliding_windows)
        ]
        self.norm = self.norm_class(config.hidden_size, config.rms_norm_eps, **where)

    @staticmethod
    @abstractmethod
    def variant(config: HFConfig) -> Variant:
        """What sets this architecture apart."""

    @staticmethod
    def rotaries(config: HFConfig, max_positions: int, device: str) -> tuple[RotaryEmbedding, RotaryEmbedding]:
        """What turns the layers without a window, and those with one."""
        rotary = RotaryEmbedding(config, max_positions, device=device)
        return rotary, rotary

    def embed(self, input_ids: torch.Tensor, given: GivenEmbeddings | None) -> torch.Tensor:
        """What the first layer reads, [T, hidden_size]. given: what stands in place of the embeddings of some rows."""
        embeddings = self.embed_tokens(input_ids)
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
        """input_ids, positions: [T] int64, the step's tokens of all requests. Returns [T, hidden_size], or the wanted
        rows of that."""
        residual = self.embed(input_ids, given)
        for layer in self.layers:
            residual = layer(residual, positions, ctx)
        return self.norm(residual)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [M, hidden_size] -> [M, vocab_size] float32."""
        return self.lm_head(hidden)

    @property
    def can_choose(self) -> bool:
        """Whether there is `likeliest`: logits are what the head gives, as they are."""
        return type(self).compute_logits is DecoderForCausalLM.compute_logits

    def likeliest(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens that temperature 0 chooses from `compute_logits(hidden)`, which are not kept: [M] int64, and [M]
        uint8, 1 for a row that has none."""
        return self.lm_head.likeliest(hidden)

    def weights(self) -> Iterator[Weight]:
        """Every tensor the checkpoint must hold, under its name there."""
        yield from under("model.embed_tokens", self.embed_tokens.weights())
        for index, layer in enumerate(self.layers):
            yield from under(f"model.layers.{index}", layer.weights())
        yield from under("model.norm", self.norm.weights())
        if not self.tied:
            yield from under("lm_head", self.lm_head.weights())

    def scales(self) -> Iterator[Weight]:
        """Single numbers that the checkpoint may hold."""
        for index, layer in enumerate(self.layers):
            yield from under(f"model.layers.{index}.self_attn", layer.self_attn.attention.scales())

    def is_redundant(self, name: str) -> bool:
        """Whether a tensor some checkpoints carry holds nothing that is not known without it."""
        return name.endswith("rotary_emb.inv_freq") or (self.tied and name == "lm_head.weight")
