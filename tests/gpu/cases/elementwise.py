"""Norms, rotations, activations, gathers and cache writes: what moves through memory once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from minivllm.ops import activation, embedding, kv_write, rms_norm, rotary, rotary_kv_write, scaling
from minivllm.ops.kv_layout import RowLayout
from minivllm.ops.rotary import HeadNorms
from minivllm.ops.triton import activation as triton_activation
from minivllm.ops.triton import embedding as triton_embedding
from minivllm.ops.triton import kv_write as triton_kv_write
from minivllm.ops.triton import rms_norm as triton_rms_norm
from minivllm.ops.triton import rotary as triton_rotary
from minivllm.ops.triton import scaling as triton_scaling
from tests.gpu.case import DTYPES, TOLERANCE, Case, Check, randn

EPS = 1e-6


def norm(device: str, large: bool, *, dtype: str, hidden: int, wide: bool = False) -> Check:
    rows = 4096 if large else 5
    x = randn(device, rows, hidden + 7, dtype=DTYPES[dtype])[:, :hidden]
    weight = randn(device, hidden).add(1).to(torch.float32 if wide else DTYPES[dtype])
    return Check(
        lambda: triton_rms_norm.rms_norm(x, weight, EPS),
        lambda: norm_in_double(x, weight),
        TOLERANCE[DTYPES[dtype]],
    )


def norm_in_double(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.double()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * weight.double()


def add_norm(device: str, large: bool, *, dtype: str, hidden: int) -> Check:
    rows = 4096 if large else 5
    x, residual = (randn(device, rows, hidden, dtype=DTYPES[dtype], seed=seed) for seed in (0, 1))
    weight = randn(device, hidden).add(1).to(DTYPES[dtype])

    def run() -> tuple[torch.Tensor, ...]:
        changed = residual.clone()
        return triton_rms_norm.add_rms_norm(x, changed, weight, EPS), changed

    def expected() -> tuple[torch.Tensor, ...]:
        total = (x.double() + residual.double()).to(x.dtype)
        return norm_in_double(total, weight), total

    return Check(run, expected, TOLERANCE[DTYPES[dtype]])


def head_norm(device: str, large: bool) -> Check:
    """Heads inside a wider matrix: three dimensions, two row strides."""
    heads = randn(device, 64 if large else 3, 9 * 128)[:, 128:].unflatten(1, (8, 128))
    weight = randn(device, 128)
    return Check(
        lambda: triton_rms_norm.rms_norm(heads, weight, EPS),
        lambda: rms_norm.reference(heads, weight, EPS),
        1e-5,
    )


def turning(
    device: str,
    large: bool,
    *,
    dtype: str,
    head_dim: int,
    rot_dim: int,
    group: int,
    norms: bool,
    kv: str | None,
) -> Check:
    """rotary, or with `kv` (a cache type) rotary_kv_write."""
    num_tokens, kv_heads, max_position, torch_dtype = 2048 if large else 6, 2, 300, DTYPES[dtype]
    heads = (group + 2) * kv_heads
    qkv = randn(device, num_tokens, heads, head_dim, dtype=torch_dtype)
    positions = torch.arange(num_tokens, device=device) * 37 % max_position
    cos_sin = randn(device, max_position, rot_dim)
    weights = (
        HeadNorms(*(randn(device, head_dim, seed=i).to(torch_dtype) for i in (1, 2)), EPS) if norms else None
    )
    layout = RowLayout(kv or "float32", kv_heads, head_dim, 16)
    slots = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(0)).to(device)
    slots[1] = -1
    cache = torch.zeros(layout.shape(num_tokens // 16 + 1), dtype=torch.uint8, device=device)

    def turned(plain: Callable, fused: Callable) -> tuple[torch.Tensor, ...]:
        q, k, v = qkv.clone().split([group * kv_heads, kv_heads, kv_heads], dim=1)
        if kv is None:
            plain(positions, q, k, cos_sin, weights)
            return q, k
        written = cache.clone()
        fused(positions, q, k, v, cos_sin, weights, written, slots, layout=layout, k_scale=0.5, v_scale=2.0)
        return q, k, layout.read(written, 0, 0.5), layout.read(written, 1, 2.0)

    # A cached number may fall to the other side of a step of its type; int8 counts in 127ths of its row's largest.
    step = 0.07 if kv == "fp8_e4m3" else 0.0
    if kv == "int8":
        step = turned(rotary.reference, rotary_kv_write.reference)[2].abs().max().item() / 127
    return Check(
        lambda: turned(triton_rotary.rotary, triton_rotary.rotary_kv_write),
        lambda: turned(rotary.reference, rotary_kv_write.reference),
        TOLERANCE[torch_dtype] + step,
    )


def writing(device: str, large: bool, *, dtype: str, kv: str, head_dim: int) -> Check:
    """The same numbers as the reference's, to the bit."""
    num_tokens, kv_heads = 4096 if large else 6, 3
    layout = RowLayout(kv, kv_heads, head_dim, 16)
    k, v = (
        randn(device, num_tokens, 2 * kv_heads, head_dim, dtype=DTYPES[dtype]).mul(9).split(kv_heads, dim=1)
    )
    k[0, 0, 0], k[2, 1, 3], v[3] = 5000.0, float("nan"), 0.0
    slots = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(0)).to(device)
    slots[1] = -1
    cache = torch.full(layout.shape(num_tokens // 16 + 1), 7, dtype=torch.uint8, device=device)

    def written(write: Callable, where: str) -> tuple[torch.Tensor, ...]:
        changed = cache.to(where, copy=True)
        write(k.to(where), v.to(where), changed, slots.to(where), layout=layout, k_scale=0.3, v_scale=1.7)
        changed = changed.to(device)
        return layout.read(changed, 0, 1.0), layout.read(changed, 1, 1.0)

    # The reference on a CPU: on a card torch divides by a number by multiplying with its rounded reciprocal.
    return Check(
        lambda: written(triton_kv_write.kv_write, device), lambda: written(kv_write.reference, "cpu"), 0.0
    )


def gated(device: str, large: bool, *, dtype: str, kind: str, width: int) -> Check:
    gate_up = randn(device, 4096 if large else 3, 2 * width, dtype=DTYPES[dtype]).mul(3)
    kernel, reference = {
        "silu": (triton_activation.silu_mul, activation.reference),
        "gelu": (triton_activation.gelu_tanh_mul, activation.gelu_tanh_reference),
    }[kind]
    return Check(lambda: kernel(gate_up), lambda: reference(gate_up.double()), TOLERANCE[DTYPES[dtype]])


def gather(device: str, large: bool) -> Check:
    table = randn(device, 50000 if large else 50, 1111, dtype=torch.bfloat16)
    ids = torch.tensor([0, 49, 7, 7], device=device)
    return Check(lambda: triton_embedding.embedding(ids, table), lambda: embedding.reference(ids, table), 0.0)


def scaled(device: str, large: bool, *, dtype: str, kind: str) -> Check:
    x = randn(device, *((4096, 4096) if large else (3, 371)), dtype=DTYPES[dtype])
    kernel, reference = {
        "scale": (triton_scaling.scale, scaling.scale_reference),
        "soft_cap": (triton_scaling.soft_cap, scaling.soft_cap_reference),
    }[kind]

    def changed(change: Callable) -> torch.Tensor:
        copy = x.clone()
        change(copy, 3.5)
        return copy

    return Check(lambda: changed(kernel), lambda: changed(reference), TOLERANCE[DTYPES[dtype]])


def _cases() -> dict[str, Case]:
    found: dict[str, Case] = {"embedding": gather, "rms_norm_heads": head_norm}
    for dtype in DTYPES:
        for hidden in (7, 1024, 2880):
            found[f"rms_norm_{dtype}_{hidden}"] = partial(norm, dtype=dtype, hidden=hidden)
            found[f"add_rms_norm_{dtype}_{hidden}"] = partial(add_norm, dtype=dtype, hidden=hidden)
        found[f"rms_norm_{dtype}_float32_weight"] = partial(norm, dtype=dtype, hidden=100, wide=True)
        for kind in ("silu", "gelu"):
            found[f"{kind}_mul_{dtype}"] = partial(gated, dtype=dtype, kind=kind, width=1333)
        for kind in ("scale", "soft_cap"):
            found[f"{kind}_{dtype}"] = partial(scaled, dtype=dtype, kind=kind)
        for kv in ("float32", "bfloat16", "fp8_e4m3", "int8"):
            found[f"kv_write_{dtype}_{kv}"] = partial(writing, dtype=dtype, kv=kv, head_dim=80)
        found[f"rotary_{dtype}"] = partial(
            turning, dtype=dtype, head_dim=64, rot_dim=64, group=3, norms=False, kv=None
        )
        found[f"rotary_{dtype}_norm_part"] = partial(
            turning, dtype=dtype, head_dim=80, rot_dim=48, group=4, norms=True, kv=None
        )
    for kv in ("bfloat16", "fp8_e4m3", "int8"):
        found[f"rotary_kv_write_{kv}"] = partial(
            turning, dtype="bf16", head_dim=128, rot_dim=128, group=4, norms=True, kv=kv
        )
    found["rotary_kv_write_part"] = partial(
        turning, dtype="f16", head_dim=80, rot_dim=48, group=3, norms=False, kv="float16"
    )
    return found


CASES = _cases()
