"""Compile every kernel for a card that is not there: what the interpreter accepts, a compiler may refuse.

    python -m tests.gpu.compiler [--arch 90] [--only attention] [--resources]

Wrappers run on CPU tensors, with one change: what would launch a kernel compiles it, for the types and constants of
that call. Needs triton alone; results are not computed. --resources prints registers and spills, and takes as
long again.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10}  # bytes a block may have
_TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64", torch.int8: "i8",
    torch.uint8: "u8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.uint32: "u32",
    torch.float8_e4m3fn: "fp8e4nv", torch.bool: "i1",
}  # fmt: skip


class Compiled(NamedTuple):
    kernel: str
    arch: int
    seconds: float
    shared: int  # bytes
    registers: int
    spilled: int  # bytes


class Compiler:
    """Takes the place of launches; each distinct call of a kernel is compiled once."""

    def __init__(self, arch: int, *, is_verbose: bool = False) -> None:
        """is_verbose: ask for registers and spills, which takes as long again."""
        self.arch, self.is_verbose = arch, is_verbose
        self.compiled: dict[tuple, Compiled] = {}
        self._launch = JITFunction.run

    def __enter__(self) -> Compiler:
        compiler = self

        def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            compiler.compile(kernel, args, kwargs)

        JITFunction.run = run
        return self

    def __exit__(self, *error: Any) -> None:
        JITFunction.run = self._launch

    def compile(self, kernel: JITFunction, args: tuple, kwargs: dict[str, Any]) -> None:
        names = kernel.arg_names
        options = {key: value for key, value in kwargs.items() if key not in names}
        values = {**dict(zip(names, args)), **{key: value for key, value in kwargs.items() if key in names}}
        signature, constants, attributes = {}, {}, {}
        for i, name in enumerate(names):
            value, is_specialized = values.get(name, kernel.params[i].default), not kernel.params[i].do_not_specialize
            is_one = type(value) is int and value == 1 and is_specialized
            if kernel.params[i].is_constexpr or value is None or is_one:
                signature[name], constants[(i,)] = "constexpr", value
                continue
            signature[name] = _type_of(value)
            if isinstance(value, TensorDescriptor):
                continue
            is_aligned = value.data_ptr() % 16 == 0 if isinstance(value, torch.Tensor) else value % 16 == 0
            if is_aligned and type(value) is not float and is_specialized:
                attributes[(i,)] = [["tt.divisibility", 16]]
        said = [*signature.items(), *constants.items(), *attributes, *options.items()]
        key = (kernel.__name__, *sorted(map(str, said)))
        if key not in self.compiled:
            start = time.perf_counter()
            source = ASTSource(kernel, signature, constants, attributes)
            built = triton.compile(source, target=GPUTarget("cuda", self.arch, 32), options=options)
            registers, spilled = _resources(built.asm["ptx"], self.arch) if self.is_verbose else (0, 0)
            seconds = time.perf_counter() - start
            self.compiled[key] = Compiled(
                kernel.__name__, self.arch, seconds, built.metadata.shared, registers, spilled
            )


def _type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + _TYPES[value.dtype]
    if isinstance(value, TensorDescriptor):
        rows, columns = value.block_shape
        return f"tensordesc<{_TYPES[value.base.dtype]}[{rows}, {columns}]>"
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(1 << 31) <= value < 1 << 31 else "i64"


def _resources(ptx: str, arch: int) -> tuple[int, int]:
    """Registers a thread, and bytes spilled, as the assembler says; zeros where it says nothing."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        gpu = f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}"
        command = [get_ptxas(arch).path, "-v", gpu, file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True).stderr
    registers, spilled = (
        re.search(r"Used (\d+) registers", said),
        re.search(r"(\d+) bytes spill stores", said),
    )
    return int(registers[1]) if registers else 0, int(spilled[1]) if spilled else 0


def _is_wanted(name: str, only: list[str]) -> bool:
    """Whether a name begins with one of `only`, or with none of those that have a tilde before them."""
    wanted = [each for each in only if not each.startswith("~")]
    others = [each[1:] for each in only if each.startswith("~")]
    return (
        name.startswith(tuple(wanted)) or (bool(others) or not wanted) and not name.startswith(tuple(others))
    )


def compile_cases(
    arch: int, only: list[str], *, is_verbose: bool = False
) -> tuple[list[Compiled], list[str]]:
    """Every kernel that the cases that are wanted launch, and what was refused."""
    from minivllm.ops.triton import paged_attention
    from tests.gpu.cases import ALL_CASES

    refused, done = [], []
    can_fetch = paged_attention._can_fetch if arch >= 90 else lambda *asked: False  # a CPU's tensors do not say
    with (
        Compiler(arch, is_verbose=is_verbose) as compiler,
        mock.patch.object(paged_attention, "_can_fetch", can_fetch),
    ):
        for name, case in ALL_CASES.items():
            if not _is_wanted(name, only) or (arch < 89 and "fp8" in name):
                continue
            before = len(compiler.compiled)
            try:
                case("cpu", False).run()
            except Exception as error:
                refused.append(f"{name} for sm_{arch}: {type(error).__name__}: {error}")
            for each in list(compiler.compiled.values())[before:]:
                done.append(each)
                if each.shared > SHARED_LIMIT[arch]:
                    refused.append(
                        f"{name} for sm_{arch}: {each.kernel} wants {each.shared} bytes of shared memory"
                    )
    return done, refused


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", type=int, nargs="*", default=[80, 90])
    parser.add_argument(
        "--only", nargs="*", default=[], help="beginnings of names; ~x: all that do not begin with x"
    )
    parser.add_argument("--resources", action="store_true")
    args = parser.parse_args()
    status = 0
    for arch in args.arch:
        done, refused = compile_cases(arch, args.only, is_verbose=args.resources)
        print(f"{'kernel':<32} {'sm':>3} {'s':>6} {'shared':>7} {'registers':>9} {'spilled':>7}")
        for each in done:
            numbers = f"{each.seconds:6.1f} {each.shared:>7} {each.registers:>9} {each.spilled:>7}"
            print(f"{each.kernel:<32} {arch:>3} {numbers}")
        for reason in refused:
            print(reason, file=sys.stderr)
        status |= bool(refused)
    return status


if __name__ == "__main__":
    sys.exit(main())
