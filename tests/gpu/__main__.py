"""Every kernel on this machine's GPU, against its reference, as one table.

    python -m tests.gpu [--only attention gumbel] [--small] [--seconds 450] [--list] [--json results.json]

Run from a checkout; needs torch with CUDA, triton, numpy, msgspec and tqdm; neither pytest nor the extension.
Without a GPU, or where no name begins so, it says so and exits with 2: nothing was checked. One case of each kind comes
first, then the engine's checks, then all other cases; what would begin after --seconds is not run, which is no success.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

SKIPPED = 2  # the exit code
OUT_OF_TIME = "not run: out of time"
_GRACE_S = 60  # what a check may last beyond --seconds before it is taken to hang


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


class Task(NamedTuple):
    """A row of the table to come."""

    name: str
    size: str
    run: Callable[[], Row]


def all_tasks(only: tuple[str, ...], is_small: bool, checks: Iterable[str]) -> list[Task]:
    """In the order of what is worth knowing: one case of each kind, the engine's checks, the other cases.

    A case's kind is said by its first two words. only: beginnings of names.
    """
    cases = [name for name in all_cases() if name.startswith(only)]
    firsts = list({"_".join(name.split("_")[:2]): name for name in reversed(cases)}.values())[::-1]

    def of_case(name: str, is_large: bool) -> Task:
        return Task(name, "large" if is_large else "small", partial(check, name, is_large))

    first = [of_case(name, not is_small) for name in firsts]
    engine = [Task(name, "", partial(check_engine, name)) for name in checks if name.startswith(only)]
    sizes = (False,) if is_small else (False, True)
    rest = [of_case(name, is_large) for name in cases for is_large in sizes]
    known = {(task.name, task.size) for task in first}
    return first + engine + [task for task in rest if (task.name, task.size) not in known]


def run_all(tasks: list[Task], deadline: float, clock: Callable[[], float] = time.monotonic) -> list[Row]:
    """Run and show them, as long as the clock is before the deadline."""
    rows: list[Row] = []
    for task in tasks:
        is_late = clock() >= deadline
        rows.append(Row(task.name, float("inf"), 0.0, 0.0, OUT_OF_TIME) if is_late else task.run())
        show(rows[-1], task.size)
    return rows


def failed(name: str, error: Exception) -> Row:
    traceback.print_exception(error)
    said = f"{type(error).__name__}: {error}".splitlines()[0]  # some errors say nothing
    return Row(name, float("inf"), 0.0, 0.0, said[:120])


def all_cases() -> dict:
    """Of the Triton kernels, and of the CUDA C++ ones where they are built."""
    from tests.gpu.cases import ALL_CASES, cuda

    return ALL_CASES if cuda.why_not() else {**ALL_CASES, **cuda.CASES}


def all_checks() -> list[str]:
    """Of the whole engine; what is about the CUDA C++ kernels where they are built."""
    from tests.gpu.cases import cuda
    from tests.gpu.engine import CHECKS

    return [name for name in CHECKS if not (name.startswith("engine_cuda") and cuda.why_not())]


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
    parser.add_argument("--seconds", type=float, default=450, help="begin no check later than so")
    parser.add_argument("--list", action="store_true", help="only say what would be checked, in which order")
    parser.add_argument("--json", help="write the rows there, too")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    if reason := why_skipped():
        print(f"\n*** GPU TESTS SKIPPED, NOTHING WAS CHECKED: {reason} ***\n", file=sys.stderr)
        if args.list:
            list_tasks(args)
        else:
            print("python -m tests.gpu --list says what a GPU would be asked to do", file=sys.stderr)
        return SKIPPED
    os.environ["TRITON_INTERPRET"] = "0"
    if args.list:
        list_tasks(args)
        return SKIPPED
    import torch
    import triton

    from tests.gpu.cases import cuda

    if reason := cuda.why_not():
        print(f"*** THE CUDA C++ KERNELS ARE NOT CHECKED: {reason} ***")
    card = torch.cuda.get_device_name()
    print(f"{card}, torch {torch.__version__}, triton {triton.__version__}, {time.strftime('%Y-%m-%d')}")
    tasks = all_tasks(tuple(args.only), args.small, all_checks())
    if not tasks:
        print(f"*** NOTHING WAS CHECKED: no name begins with {' or '.join(args.only)} ***", file=sys.stderr)
        return SKIPPED
    if torch.cuda.get_device_capability() < (8, 9):
        print(f"*** FLOAT8 IS NOT CHECKED: {card} has no conversions of it ***")
        tasks = [task for task in tasks if "fp8" not in task.name]
    faulthandler.dump_traceback_later(args.seconds + _GRACE_S, exit=True)  # what hangs in a driver hears no signal
    print(f"{'case':<64} {'size':<5} {'max diff':>9} {'allowed':>8} {'ms':>8}")
    rows = run_all(tasks, deadline)
    late = [row.name for row in rows if row.error == OUT_OF_TIME]
    bad = [row.name for row in rows if not row.is_good and row.error != OUT_OF_TIME]
    print(
        f"{len(rows) - len(bad) - len(late)} of {len(rows)} good on {card}"
        + (f"; wrong: {', '.join(bad)}" if bad else "")
        + (f"; {len(late)} NOT RUN, for {args.seconds:.0f} seconds were over" if late else "")
    )
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"card": card, "rows": [row._asdict() for row in rows]}, file, indent=1)
    return bool(bad or late)


def list_tasks(args: argparse.Namespace) -> None:
    for task in all_tasks(tuple(args.only), args.small, all_checks()):
        print(f"{task.name:<64} {task.size}")


def show(row: Row, size: str) -> None:
    if row.error == OUT_OF_TIME:
        print(f"{row.name:<64} {size:<5} {OUT_OF_TIME}")
        return
    said = "ok" if row.is_good else f"WRONG {row.error}"
    numbers = f"{row.difference:9.2g} {row.tolerance:8.2g} {row.milliseconds:8.3f}"
    print(f"{row.name:<64} {size:<5} {numbers} {said}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
