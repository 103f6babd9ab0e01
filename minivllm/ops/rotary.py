"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), halves paired as in GPT-NeoX, Llama and Qwen.

Owns the rotation, not the table: frequencies and their scaling belong to `layers/rotary.py`. Computed in
float32 and rounded once. Qwen3's norm of each head comes before it and may be part of it. Hugging Face rounds
cosines, sines and each product to the dtype instead: in float32 the two agree to the bit, in bfloat16 ours is
the nearer to exact.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from minivllm.ops import gpu, native
from minivllm.ops.checks import require
from minivllm.ops.op import Impl, Op
from minivllm.ops.rms_norm import reference as rms_norm


class HeadNorms(NamedTuple):
    """Norms of the heads, as in `ops/rms_norm.py`: weights [D] in the dtype of q and k."""

    q_weight: torch.Tensor
    k_weight: torch.Tensor
    eps: float


class Turn(NamedTuple):
    """What is still to be done to queries and keys before attention."""

    positions: torch.Tensor  # [T] int64
    cos_sin: torch.Tensor
    norms: HeadNorms | None


def reference(
    positions: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    cos_sin: torch.Tensor,
    norms: HeadNorms | None = None,
) -> None:
    """Norm each head of q and k, with `norms`, and rotate its first rot_dim dimensions, in place.

    positions: [T] int64; q: [T, Hq, D]; k: [T, Hk, D]; cos_sin: [max_position, rot_dim] float32, cosines in
    the first half of the columns, sines in the second. A position outside the table raises IndexError.
    """
    if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < cos_sin.shape[0]:
        raise IndexError(f"positions {positions.tolist()} are outside the rotary table of {cos_sin.shape[0]}")
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    half = cos_sin.shape[1] // 2
    if norms is not None:
        q[:] = rms_norm(q, norms.q_weight, norms.eps)
        k[:] = rms_norm(k, norms.k_weight, norms.eps)
    for x in (q, k):
        first, second = x[..., :half].float(), x[..., half : 2 * half].float()
        rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        x[..., : 2 * half] = rotated  # after both: in float32, first and second are views of x


def cpu(
    positions: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    cos_sin: torch.Tensor,
    norms: HeadNorms | None = None,
) -> None:
    """`reference` in C++. q and k may be views whose last dimension is contiguous."""
    q_norm, k_norm, eps = native_arguments(positions, q, k, cos_sin, norms)
    if len(q):
        native.lib.rotary(
            native.dtype_code(q),
            q.data_ptr(), q.shape[1], q.stride(0), q.stride(1), q_norm,
            k.data_ptr(), k.shape[1], k.stride(0), k.stride(1), k_norm, q.shape[2], eps,
            positions.data_ptr(), len(q), cos_sin.data_ptr(), *cos_sin.shape,
        )  # fmt: skip


def native_arguments(
    positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor, cos_sin: torch.Tensor, norms: HeadNorms | None
) -> tuple[int, int, float]:
    """The two norms' addresses, 0 for none, and their epsilon; ValueError where a tensor is laid out otherwise."""
    num_tokens, rot_dim = positions.shape[0], cos_sin.shape[1]
    for name, x in (("q", q), ("k", k)):
        fits = x.dim() == 3 and x.shape[0] == num_tokens and x.shape[2] >= rot_dim
        if not fits or x.stride(2) != 1 or x.dtype != q.dtype:
            raise ValueError(
                f"{name} is {tuple(x.shape)} {x.dtype} of strides {x.stride()}; it must be "
                f"[{num_tokens}, heads, at least {rot_dim}] {q.dtype} with the last dimension contiguous"
            )
    return native_turn(Turn(positions, cos_sin, norms), q.dtype, q.shape[2])


def native_turn(turn: Turn, dtype: torch.dtype, head_dim: int) -> tuple[int, int, float]:
    """The same, where queries and keys are not there yet: of a turn of heads of this type and size."""
    positions, cos_sin, norms = turn
    if positions.dtype != torch.int64 or not positions.is_contiguous():
        raise ValueError(f"positions are {positions.dtype}; they must be contiguous int64")
    if cos_sin.dtype != torch.float32 or not cos_sin.is_contiguous():
        raise ValueError(f"cos_sin is {cos_sin.dtype}; it must be contiguous float32")
    if norms is None:
        return 0, 0, 0.0
    require("q_weight", norms.q_weight, dtype, (head_dim,))
    require("k_weight", norms.k_weight, dtype, (head_dim,))
    return norms.q_weight.data_ptr(), norms.k_weight.data_ptr(), norms.eps


IMPLEMENTATIONS = [
    Impl(cpu, why_not=native.why_not),
    Impl("triton.rotary:rotary", why_not=gpu.why_not),
    Impl(reference),
]
rotary = Op("rotary", IMPLEMENTATIONS)
