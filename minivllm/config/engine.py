"""The whole of what an engine is asked to be. Only EngineCore, Executor and Worker hold it; others get slices."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from minivllm.config.cache import CacheConfig
from minivllm.config.compilation import CompilationConfig
from minivllm.config.cpu import CpuConfig
from minivllm.config.device import DeviceConfig
from minivllm.config.hf_config import HFConfig
from minivllm.config.load import LoadConfig
from minivllm.config.model import ModelConfig
from minivllm.config.observability import ObservabilityConfig
from minivllm.config.parallel import ParallelConfig
from minivllm.config.reasoning import ReasoningConfig
from minivllm.config.scheduler import SchedulerConfig, Usage
from minivllm.config.structured_outputs import StructuredOutputsConfig


@dataclass(frozen=True)
class EngineConfig:
    """Frozen and encodable by msgspec: it crosses to the core process in the handshake.

    `model.model` is a local directory by now. What is still `auto` or None is resolved by the worker
    and comes back in `messages.engine.EngineCoreReady`.
    """

    model: ModelConfig
    hf_config: HFConfig
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    load: LoadConfig = LoadConfig()
    parallel: ParallelConfig = ParallelConfig()
    observability: ObservabilityConfig = ObservabilityConfig()
    reasoning: ReasoningConfig = ReasoningConfig()
    structured_outputs: StructuredOutputsConfig = StructuredOutputsConfig()
    cpu: CpuConfig = CpuConfig()
    device: DeviceConfig = DeviceConfig()
    compilation: CompilationConfig = CompilationConfig()
    model_class: str = ""  # "module:Class" of the registry; it travels, so that a registered model reaches the core
    generation_config: dict[str, Any] = field(default_factory=dict)  # after overrides; with "vllm", only the end tokens
    usage: Usage = "serve"  # what the defaults of a step's limits depend on
