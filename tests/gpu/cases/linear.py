"""Matrix multiplications: dense, int8, float8 and grouped by expert, with every epilogue."""

from __future__ import annotations

from functools import partial

import torch

from minivllm.ops import moe
from minivllm.ops.linear import DenseLinear
from minivllm.ops.linear_fp8 import DenseFp8Linear
from minivllm.ops.linear_int8 import DenseInt8Linear
from minivllm.ops.triton import moe as triton_moe
from minivllm.ops.triton.linear import TritonFp8Linear, TritonInt8Linear, TritonLinear
from tests.gpu.case import DTYPES, Case, Check, randn

PAIRS = {
    "gemm": (TritonLinear, DenseLinear),
    "int8": (TritonInt8Linear, DenseInt8Linear),
    "fp8": (TritonFp8Linear, DenseFp8Linear),
}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}
_FP8_ON_A_CARD = 4e-3  # Hopper's tensor cores keep about 14 bits of a tile's sum


def multiplying(
    device: str, large: bool, *, kind: str, dtype: str, rows: int, shape: tuple[int, int], epilogue: str,
    pairs: dict[str, tuple[type, type]] = PAIRS,
) -> Check:  # fmt: skip
    kernel_class, reference_class = pairs[kind]
    torch_dtype, (out_features, in_features) = DTYPES[dtype], (4096, 4096) if large else shape
    rows = 8 * rows if large else rows
    gated = epilogue == "silu"
    kernel = kernel_class(out_features, in_features, torch_dtype, gated=gated, device=device)
    reference = reference_class(out_features, in_features, torch_dtype, gated=gated)
    weight = randn("cpu", out_features, in_features, seed=5) * in_features**-0.5
    for linear in (kernel, reference):
        linear.load_rows(0, weight)
    x = randn(device, rows, in_features + 16, dtype=torch_dtype)[:, :in_features]
    bias = randn(device, out_features, dtype=torch_dtype) if epilogue in ("bias", "silu") else None
    addend = randn(device, rows, out_features, seed=9) if epilogue in ("addend", "silu") else None
    residual = randn(device, rows, out_features, dtype=torch_dtype, seed=3)

    def multiply(linear: DenseLinear, where: str) -> torch.Tensor:
        inputs = [None if each is None else each.to(where) for each in (x, bias)]
        extra = {"addend": None if addend is None else addend.to(where)}
        if epilogue == "residual":
            changed = residual.to(where, copy=True)
            linear.add_to(changed, *inputs, **extra)
            return changed
        if epilogue == "silu":
            return linear.silu_mul(*inputs, **extra)
        return linear(*inputs, torch.float32 if epilogue == "wide" else None, **extra)

    tolerance = TOLERANCE[torch_dtype]
    if kind == "fp8" and device == "cuda":
        tolerance = max(tolerance, _FP8_ON_A_CARD)
        if epilogue in ("residual", "silu"):  # which round on the way: what falls to the other side there adds up
            tolerance *= 2
    return Check(lambda: multiply(kernel, device), lambda: multiply(reference, "cpu").to(device), tolerance)


def invariant(device: str, large: bool, *, kind: str) -> Check:
    """A row alone has the bits it has among others."""
    kernel = PAIRS[kind][0](200, 150, torch.bfloat16, device=device)
    kernel.load_rows(0, randn("cpu", 200, 150))
    x = randn(device, 70, 150, dtype=torch.bfloat16)
    return Check(
        lambda: torch.cat([kernel(x[i : i + 1]) for i in (0, 1, 63, 69)]),
        lambda: kernel(x)[[0, 1, 63, 69]],
        0.0,
    )


def mixture(device: str, large: bool, *, dtype: str) -> Check:
    tokens, experts, per_token, hidden, inner = (512, 64, 8, 2048, 768) if large else (7, 5, 2, 72, 40)
    torch_dtype = DTYPES[dtype]
    x = randn(device, tokens, hidden, dtype=torch_dtype)
    gate_up = randn(device, experts, 2 * inner, hidden).mul(hidden**-0.5).to(torch_dtype)
    down = randn(device, experts, hidden, inner).mul(inner**-0.5).to(torch_dtype)
    scores = randn(device, tokens, experts)
    scores[:, 3] = -9  # an expert that nobody asks
    weights, expert_ids = scores.softmax(-1).topk(per_token)
    arguments = (x, gate_up, down, expert_ids, weights)
    return Check(
        lambda: triton_moe.moe(*arguments), lambda: moe.reference(*arguments), TOLERANCE[torch_dtype]
    )


def _cases() -> dict[str, Case]:
    found: dict[str, Case] = {f"moe_{dtype}": partial(mixture, dtype=dtype) for dtype in DTYPES}
    for kind in PAIRS:
        for epilogue in ("plain", "bias", "wide", "addend", "residual", "silu"):
            found[f"linear_{kind}_{epilogue}"] = partial(
                multiplying, kind=kind, dtype="bf16", rows=5, shape=(100, 150), epilogue=epilogue
            )
        for dtype in ("f32", "f16"):
            found[f"linear_{kind}_{dtype}"] = partial(
                multiplying, kind=kind, dtype=dtype, rows=70, shape=(96, 208), epilogue="plain"
            )
        found[f"linear_{kind}_silu_aligned"] = partial(
            multiplying, kind=kind, dtype="bf16", rows=20, shape=(192, 256), epilogue="silu"
        )
        found[f"linear_{kind}_invariant"] = partial(invariant, kind=kind)
    return found


CASES = _cases()
