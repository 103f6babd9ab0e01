"""What is counted and logged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class ObservabilityConfig:
    disable_log_stats: bool = False
    """No periodic statistics line and no engine metrics."""
    kv_events_config: dict[str, Any] | None = None
    """Tell subscribers which prefixes the KV cache holds: a JSON object with enable_kv_cache_events, publisher (zmq
    or null), endpoint (default tcp://127.0.0.1:5557), replay_endpoint, topic, buffer_steps, hwm, max_queue_size."""
    profiler_config: dict[str, Any] | None = None
    """Let POST /start_profile record what the engine does: a JSON object with torch_profiler_dir (where files go),
    torch_profiler_with_stack, torch_profiler_record_shapes, torch_profiler_with_memory, torch_profiler_with_flops,
    torch_profiler_use_gzip, ignore_frontend, delay_iterations, max_iterations."""
    otlp_traces_endpoint: str | None = None
    """Of the OpenAI server: send a trace of every request to this OpenTelemetry collector. The variable
    OTEL_EXPORTER_OTLP_TRACES_PROTOCOL says how: grpc (default) or http/protobuf."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "INFO"
    """Least severity of minivllm's own log lines."""
