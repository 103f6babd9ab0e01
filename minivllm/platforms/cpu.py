"""The CPU: memory as the control groups limit it, and the instruction family of the native kernels."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import torch

from minivllm.config.cache import KV_TILE
from minivllm.config.cpu import CpuConfig, read_cpu_bind
from minivllm.logger import init_logger
from minivllm.platforms.platform import Platform
from minivllm.utils import native

logger = init_logger(__name__)

_libc = ctypes.CDLL(None, use_errno=True)
_CGROUP_ROOT = Path("/sys/fs/cgroup")


class CpuPlatform(Platform):
    name = "cpu"
    device = "cpu"
    default_block_size = 128
    block_size_multiple = KV_TILE
    supported_dtypes = (torch.bfloat16, torch.float16, torch.float32)
    graphs = None

    def __init__(self, *, cgroup_root: Path = _CGROUP_ROOT, membership: str | None = None) -> None:
        self._cgroups = list(
            _memory_cgroups(cgroup_root, _own_membership() if membership is None else membership)
        )

    @property
    def numerics_id(self) -> str:
        return f"cpu-{native.lib.isa()}" if native.unavailable is None else "cpu-torch"

    def memory_limit_bytes(self) -> int:
        limits = [_read_limit(group) for group in self._cgroups]
        return min([psutil.virtual_memory().total, *(limit for limit in limits if limit is not None)])

    def memory_available_bytes(self) -> int:
        room = [psutil.virtual_memory().available]
        for group in self._cgroups:
            limit = _read_limit(group)
            if limit is not None:
                room.append(max(0, limit - _read_used(group)))
        return min(room)

    def process_memory_bytes(self) -> int:
        return psutil.Process().memory_info().rss

    def give_back(self, tensors: Sequence[torch.Tensor]) -> Callable[[], None]:
        for tensor in tensors:
            _give_pages_back(tensor)
        return lambda: None

    def prepare(self, cpu: CpuConfig) -> None:
        processors = read_cpu_bind(cpu.cpu_bind)
        if processors is not None:
            # Threads that are started from here on are confined too; the kernels' get one processor each.
            os.sched_setaffinity(0, processors)
        if native.unavailable is not None:
            logger.warning("%s; PyTorch serves in its place, many times slower", native.unavailable)
            torch.set_num_threads(cpu.cpu_threads or torch.get_num_threads())
            return
        # The kernels have a thread pool of their own; a second one would fight it for the cores.
        torch.set_num_threads(1)
        if cpu.cpu_threads is not None or processors is not None:
            num_threads = cpu.cpu_threads or min(len(processors), native.lib.num_threads())
            native.lib.set_num_threads(num_threads, processors or [])


def _give_pages_back(tensor: torch.Tensor) -> None:
    # Whole pages of ours alone; the next touch of one finds it zeroed. Addresses stay, and so recorded steps.
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if begin < end and _libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED):
        number = ctypes.get_errno()
        raise OSError(number, f"madvise: {os.strerror(number)}")


# Control groups --------------------------------------------------------------


def _own_membership() -> str:
    try:
        return Path("/proc/self/cgroup").read_text()
    except OSError:
        return ""


def _memory_cgroups(root: Path, membership: str) -> Iterator[Path]:
    """The directories whose memory limits bind this process: its own group's and every ancestor's.

    membership: the text of /proc/self/cgroup, lines "id:controllers:path"; version 2 has no controllers.
    """
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / controllers  # version 1 mounts each controller in a directory of its own
        group = top / path.lstrip("/")
        while True:
            if group.is_dir():
                yield group
            if group == top or top not in group.parents:
                break
            group = group.parent


def _read_limit(group: Path) -> int | None:
    """The group's limit in bytes; None where there is none."""
    for name in ("memory.max", "memory.limit_in_bytes"):
        text = _read(group / name)
        if text is not None:
            return int(text) if text.isdigit() else None
    return None


def _read_used(group: Path) -> int:
    """Bytes in use that cannot be reclaimed: without the page cache's inactive part."""
    for name, inactive in (
        ("memory.current", "inactive_file"),
        ("memory.usage_in_bytes", "total_inactive_file"),
    ):
        text = _read(group / name)
        if text is not None:
            stat = dict(line.split() for line in (_read(group / "memory.stat") or "").splitlines())
            return int(text) - int(stat.get(inactive, 0))
    return 0


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
