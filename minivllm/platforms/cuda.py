"""An NVIDIA GPU: its memory, its queue of work, and CUDA graphs. One process uses one, the current device.

Written without a card at hand; what has been run on one is listed in docs/gpu.md.
"""

from __future__ import annotations

import gc
import importlib.metadata
from collections.abc import Callable
from typing import TypeVar

import torch

from minivllm.config.cpu import CpuConfig
from minivllm.platforms.platform import DevicePlatform, Graphs

T = TypeVar("T")


class CudaGraphs(Graphs):
    """torch's capture, all from one pool of memory: graphs never run at the same time."""

    def __init__(self) -> None:
        self._pool: object | None = None
        self._stream: torch.cuda.Stream | None = None  # one for all: cuBLAS makes a workspace for each

    def capture(self, step: Callable[[], T]) -> tuple[Callable[[], None], T]:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        # Once outside: kernels are compiled and libraries make their workspaces, which a capture may not.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            step()
        torch.cuda.current_stream().wait_stream(self._stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # thread_local: another thread may meanwhile wait for an event of the step before.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            results = step()
        return graph.replay, results

    def forget(self) -> None:
        self._pool = None  # whose memory the last graph gives back


class CudaPlatform(DevicePlatform):
    name = "cuda"
    device = "cuda"
    default_block_size = 64  # a tile of the Triton kernels lies in one block
    block_size_multiple = 16
    supported_dtypes = (torch.bfloat16, torch.float16, torch.float32)
    default_memory_utilization = 0.92  # vLLM's

    def __init__(self, *, batch_invariant: bool = False) -> None:
        self._batch_invariant = batch_invariant
        self.graphs = CudaGraphs()

    @property
    def has_fp8(self) -> bool:
        return torch.cuda.get_device_capability() >= (8, 9)

    @property
    def numerics_id(self) -> str:
        """cuBLAS and Triton choose other kernels on another card or in another version: then other bits."""
        major, minor = torch.cuda.get_device_capability()
        parts = [
            f"cuda-{torch.cuda.get_device_name().replace(' ', '_')}",
            f"sm{major}{minor}",
            f"torch{torch.__version__}",
            f"triton{importlib.metadata.version('triton')}",
        ]
        return "-".join([*parts, *(["invariant"] if self._batch_invariant else [])])

    def memory_limit_bytes(self) -> int:
        return torch.cuda.mem_get_info()[1]

    def memory_available_bytes(self) -> int:
        """Free on the card, and what this process has reserved and does not use."""
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + unused

    def process_memory_bytes(self) -> int:
        return torch.cuda.memory_allocated()

    def release_unused(self) -> None:
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()

    def prepare(self, cpu: CpuConfig) -> None:
        torch.set_num_threads(cpu.cpu_threads or 1)  # what is left for the host is small
        # float32 is float32: what a user wants less of, --dtype says.
        torch.backends.cuda.matmul.allow_tf32 = False
        # bfloat16 sums are not rounded on the way, so that they do not depend on how cuBLAS cuts K.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.cuda.init()

    def new_pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, pin_memory=True)

    def record_event(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record()
        return event

    def peak_bytes_of(self, step: Callable[[], object]) -> int:
        """Reserved memory counts: fragments that nobody can use are used up as well."""
        self.release_unused()
        before = torch.cuda.memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_reserved() - before
        torch.cuda.empty_cache()
        return max(0, peak)

    def kept_bytes_of(self, work: Callable[[], object]) -> int:
        """By what the driver has free: it holds what torch knows nothing of, such as a graph's own memory."""
        self.release_unused()
        before = torch.cuda.mem_get_info()[0]
        work()
        self.release_unused()
        return max(0, before - torch.cuda.mem_get_info()[0])
