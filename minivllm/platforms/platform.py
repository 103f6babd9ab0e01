"""What the rest of the engine may ask of the device it runs on. Owns the contract and the choice of a platform.

Nobody else asks for a device by name: a capability that is missing is None, or a method that says no.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch

from minivllm.config.cpu import CpuConfig
from minivllm.config.device import DeviceConfig
from minivllm.exceptions import ConfigError, EngineError
from minivllm.logger import init_logger

logger = init_logger(__name__)

T = TypeVar("T")


class Event(Protocol):
    """A place in the device's queue of work."""

    def query(self) -> bool:
        """Whether the device has come so far."""

    def synchronize(self) -> None:
        """Wait until it has."""


class Graphs(ABC):
    """Captures what a step gives the device to do, so that it can be given again at once."""

    @abstractmethod
    def capture(self, step: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """(replay, results): every replay does the step's work anew and leaves what it gives in `results`.

        `step` runs at least once meanwhile. It reads and writes memory that stays where it is; what it allocates
        itself is shared with the other captures, so results last until the next replay of any.
        """

    @abstractmethod
    def forget(self) -> None:
        """No capture is replayed any more: give back what they took."""


class Platform(ABC):
    """A device, its memory and what it can do."""

    name: str
    device: str  # as torch spells it
    is_host: bool = True  # the device's memory is the host's: inputs are made where they are read
    default_block_size: int  # tokens in a KV block
    block_size_multiple: int  # the kernels' KV tile
    supported_dtypes: tuple[torch.dtype, ...]
    has_fp8: bool = False  # whether it multiplies 8-bit floats
    graphs: Graphs | None = None  # None where there is no such thing
    # Of the memory limit, for weights, activations and KV cache, where no flag says another; None: as CacheConfig says.
    default_memory_utilization: float | None = None

    @property
    @abstractmethod
    def numerics_id(self) -> str:
        """Device and instruction family in use: equal ids give equal bits."""

    @abstractmethod
    def memory_limit_bytes(self) -> int:
        """The most memory this process may ever use."""

    @abstractmethod
    def memory_available_bytes(self) -> int:
        """What could be allocated now without reaching the limit."""

    @abstractmethod
    def process_memory_bytes(self) -> int:
        """What this process holds now."""

    @abstractmethod
    def give_back(self, tensors: Sequence[torch.Tensor]) -> Callable[[], None]:
        """Let the system have the memory under these tensors; what they hold is lost. What is returned has it again.

        On a host their places stay, and it does nothing: memory comes as it is written. On a device they may lie
        elsewhere then. It raises EngineError if others have taken too much, and may be called again.
        """

    @abstractmethod
    def prepare(self, cpu: CpuConfig) -> None:
        """Set up the process once, before anything is computed.

        Raises:
            ConfigError: this machine has not the processors that are asked for.
        """

    def check_block_size(self, block_size: int) -> None:
        """Refuse a KV block that no kernel takes.

        Raises:
            ConfigError: it is not a positive multiple of the kernels' tile.
        """
        step = self.block_size_multiple
        if block_size <= 0 or block_size % step:
            raise ConfigError(
                f"--block-size {block_size} is not a multiple of {step}: attention reads the cache in tiles of "
                f"{step} tokens, which must not cross blocks; try {self.default_block_size}"
            )


class DevicePlatform(Platform):
    """A device with memory and a pace of its own."""

    is_host = False

    @abstractmethod
    def new_pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Zeroed host memory that the device copies from and to while the host goes on."""

    @abstractmethod
    def record_event(self) -> Event:
        """The end of all work given to the device so far."""

    @abstractmethod
    def release_unused(self) -> None:
        """Let others have what this process holds on the device without using it."""

    def give_back(self, tensors: Sequence[torch.Tensor]) -> Callable[[], None]:
        """Empties their storages. Whoever holds a tensor, or a view of one, keeps it."""
        storages = {storage.data_ptr(): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
        sizes = [(storage, storage.nbytes()) for storage in storages.values()]
        for storage, _ in sizes:
            storage.resize_(0)
        self.release_unused()

        def take_back() -> None:
            try:
                for storage, num_bytes in sizes:
                    storage.resize_(num_bytes)
            except torch.OutOfMemoryError as error:
                raise EngineError(
                    f"{self.name} has not the memory any more that was given back "
                    f"({sum(num_bytes for _, num_bytes in sizes) / 2**30:.2f} GiB); end what uses it and wake up again"
                ) from error

        return take_back

    @abstractmethod
    def peak_bytes_of(self, step: Callable[[], object]) -> int:
        """The most memory that `step` held on the device at once, beyond what was held before."""

    @abstractmethod
    def kept_bytes_of(self, work: Callable[[], object]) -> int:
        """How much less memory the device has free once `work` is done."""


_AUTO = DeviceConfig()


def detect(config: DeviceConfig = _AUTO) -> Platform:
    """The platform to run on: as asked, or a GPU where one can be used, else the CPU.

    Raises:
        ConfigError: a GPU is asked for and cannot be used; the message says why.
    """
    from minivllm.platforms.cpu import CpuPlatform

    if config.device == "cpu":
        return CpuPlatform()
    why_not = cuda_why_not()
    if why_not is None:
        from minivllm.platforms.cuda import CudaPlatform

        return CudaPlatform(batch_invariant=config.batch_invariant)
    if config.device == "cuda":
        raise ConfigError(f"--device cuda: {why_not}; leave it out, or pass --device cpu, to run on the CPU")
    logger.debug("running on the CPU: %s", why_not)
    return CpuPlatform()


LEAST_CAPABILITY = (8, 0)  # Ampere: bfloat16 in the tensor cores


def cuda_why_not() -> str | None:
    """Why no GPU can be used. A torch without CUDA is asked nothing more, and Triton is not imported."""
    import importlib.util

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no usable NVIDIA GPU and driver"
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        return (
            f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}; "
            f"{LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} is the least"
        )
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; get it with: pip install triton"
    return None
