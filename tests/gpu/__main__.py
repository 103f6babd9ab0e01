"""Every kernel on this machine's GPU, against its reference, as one table.

    python -m tests.gpu [--only attention gumbel] [--small] [--json results.json]

Run from a checkout; needs torch with CUDA, triton, numpy, msgspec and tqdm; neither pytest nor the extension.
Without a GPU, or where no name begins so, it says so and exits with 2: nothing was checked.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from typing import NamedTuple

SKIPPED = 2  # the exit code


class Row(NamedTuple):
    name: str
    difference: float
    tolerance: float
    milliseconds: float  # of one run after the first, launches and allocations included
    error: str = ""

    @property
    def is_good(self) -> bool:
        return not self.error and self.difference <= self.tolerance


def check(name: str, large: bool) -> Row:
    import torch

    from tests.gpu.case import max_diff

    try:
        case = all_cases()[name]("cuda", large)
        difference = max_diff(case.run(), case.expected())
        torch.cuda.synchronize()
        start = time.perf_counter()
        case.run()
        torch.cuda.synchronize()
        return Row(name, difference, case.tolerance, 1000 * (time.perf_counter() - start))
    except Exception as error:
        return failed(name, error)
    finally:
        torch.cuda.empty_cache()


def check_engine(name: str) -> Row:
    """A check of the whole engine, on tiny models."""
    from tests.gpu.engine import CHECKS, Device

    start = time.perf_counter()
    try:
        finding = CHECKS[name](Device())
        return Row(name, finding.difference, finding.tolerance, 1000 * (time.perf_counter() - start))
    except Exception as error:
        return failed(name, error)


def failed(name: str, error: Exception) -> Row:
    traceback.print_exception(error)
    said = f"{type(error).__name__}: {error}".splitlines()[0]  # some errors say nothing
    return Row(name, float("inf"), 0.0, 0.0, said[:120])


def all_cases() -> dict:
    """Of the Triton kernels, and of the CUDA C++ ones where they are built."""
    from tests.gpu.cases import ALL_CASES, cuda

    return ALL_CASES if cuda.why_not() else {**ALL_CASES, **cuda.CASES}


def why_skipped() -> str | None:
    try:
        import torch
    except ImportError as error:
        return str(error)
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"{error}: pip install triton"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[""], help="beginnings of names")
    parser.add_argument("--small", action="store_true", help="only the sizes that the interpreter runs")
    parser.add_argument("--json", help="write the rows there, too")
    args = parser.parse_args()
    if reason := why_skipped():
        print(f"\n*** GPU TESTS SKIPPED, NOTHING WAS CHECKED: {reason} ***\n", file=sys.stderr)
        return SKIPPED
    os.environ["TRITON_INTERPRET"] = "0"
    import torch
    import triton

    from tests.gpu.cases import cuda
    from tests.gpu.engine import CHECKS

    if reason := cuda.why_not():
        print(f"*** THE CUDA C++ KERNELS ARE NOT CHECKED: {reason} ***")
    card = torch.cuda.get_device_name()
    print(f"{card}, torch {torch.__version__}, triton {triton.__version__}, {time.strftime('%Y-%m-%d')}")
    cases, checks = ([name for name in names if name.startswith(tuple(args.only))] for names in (all_cases(), CHECKS))
    if not cases and not checks:
        print(f"*** NOTHING WAS CHECKED: no name begins with {' or '.join(args.only)} ***", file=sys.stderr)
        return SKIPPED
    if torch.cuda.get_device_capability() < (8, 9):
        print(f"*** FLOAT8 IS NOT CHECKED: {card} has no conversions of it ***")
        cases = [name for name in cases if "fp8" not in name]
    rows: list[Row] = []
    print(f"{'case':<64} {'size':<5} {'max diff':>9} {'allowed':>8} {'ms':>8}")
    for name in cases:
        for large in (False,) if args.small else (False, True):
            rows.append(check(name, large))
            show(rows[-1], "large" if large else "small")
    for name in checks:
        rows.append(check_engine(name))
        show(rows[-1], "")
    bad = [row.name for row in rows if not row.is_good]
    print(
        f"{len(rows) - len(bad)} of {len(rows)} good on {card}"
        + (f"; wrong: {', '.join(bad)}" if bad else "")
    )
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"card": card, "rows": [row._asdict() for row in rows]}, file, indent=1)
    return bool(bad)


def show(row: Row, size: str) -> None:
    said = "ok" if row.is_good else f"WRONG {row.error}"
    numbers = f"{row.difference:9.2g} {row.tolerance:8.2g} {row.milliseconds:8.3f}"
    print(f"{row.name:<64} {size:<5} {numbers} {said}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
