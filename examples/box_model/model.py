"""The Qwen3 architecture in plain PyTorch, for training; its state dict has Hugging Face's names.

Owns the network and nothing of data, optimizers or files. Sequences are packed: tokens attend within their own
document only, and positions start at 0 in each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Sizes:
    """What config.json calls by the same names."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        q_size = sizes.num_attention_heads * sizes.head_dim
        kv_size = sizes.num_key_value_heads * sizes.head_dim
        self.q_proj = nn.Linear(sizes.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(sizes.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(sizes.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, sizes.hidden_size, bias=False)
        self.q_norm = RMSNorm(sizes.head_dim, sizes.rms_norm_eps)
        self.k_norm = RMSNorm(sizes.head_dim, sizes.rms_norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """x: [rows, length, hidden]; mask: [rows, 1, length, length], additive; None is plainly causal."""
        rows, length, _ = x.shape
        split = (rows, length, -1, self.sizes.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).view(split)), *rope).transpose(1, 2)
        k = rotate(self.k_norm(self.k_proj(x).view(split)), *rope).transpose(1, 2)
        v = self.v_proj(x).view(split).transpose(1, 2)
        repeats = self.sizes.num_attention_heads // self.sizes.num_key_value_heads
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.o_proj(out.transpose(1, 2).reshape(rows, length, -1))


class MLP(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(sizes.hidden_size, sizes.intermediate_size, bias=False)
        self.up_proj = nn.Linear(sizes.hidden_size, sizes.intermediate_size, bias=False)
        self.down_proj = nn.Linear(sizes.intermediate_size, sizes.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(sizes.hidden_size, sizes.rms_norm_eps)
        self.self_attn = Attention(sizes)
        self.post_attention_layernorm = RMSNorm(sizes.hidden_size, sizes.rms_norm_eps)
        self.mlp = MLP(sizes)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(sizes.vocab_size, sizes.hidden_size)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.num_hidden_layers))
        self.norm = RMSNorm(sizes.hidden_size, sizes.rms_norm_eps)


class Qwen3(nn.Module):
    """Token ids in, logits out; embeddings are tied."""

    def __init__(self, sizes: Sizes, seed: int = 0) -> None:
        super().__init__()
        self.sizes = sizes
        self.model = Decoder(sizes)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                is_last = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / math.sqrt(2 * sizes.num_hidden_layers) if is_last else 0.02
                nn.init.normal_(parameter, std=std, generator=generator)

    def hidden(self, ids: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        """ids and positions: [rows, length]. Returns the last hidden states [rows, length, hidden]."""
        rope = rope_tables(positions, self.sizes)
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x, rope, mask)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] to [..., vocabulary]."""
        return F.linear(hidden, self.model.embed_tokens.weight)


def rope_tables(positions: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Cosines and sines [rows, length, 1, head_dim / 2]."""
    exponents = torch.arange(0, sizes.head_dim, 2, device=positions.device) / sizes.head_dim
    angles = positions[..., None, None].float() * sizes.rope_theta**-exponents
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [rows, length, heads, head_dim], first half against second half."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def document_mask(documents: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask [rows, 1, length, length] from document numbers [rows, length]: causal, within one document."""
    length = documents.shape[1]
    same = documents[:, None, :, None] == documents[:, None, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
    return torch.zeros((), dtype=dtype, device=documents.device).where(same & causal, float("-inf"))
