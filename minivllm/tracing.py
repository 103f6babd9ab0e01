"""A span for each request, sent to an OpenTelemetry collector: --otlp-traces-endpoint.

Names of spans and attributes are vLLM's. A caller's trace goes on where its `traceparent` says. OpenTelemetry is
imported only here, and only when it is asked for.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import AsyncGenerator, Mapping
from typing import TYPE_CHECKING, Any

from minivllm.exceptions import ConfigError

if TYPE_CHECKING:
    from minivllm.outputs import RequestOutput

SPAN = "llm_request"
HEADERS = ("traceparent", "tracestate")
PROTOCOL_VARIABLE = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"  # OpenTelemetry's; grpc when not set, as in vLLM
_EXPORTERS = {
    "grpc": "opentelemetry.exporter.otlp.proto.grpc.trace_exporter",
    "http/protobuf": "opentelemetry.exporter.otlp.proto.http.trace_exporter",
}
# Attribute -> field of the sampling parameters.
_PARAMS = {
    "gen_ai.request.max_tokens": "max_tokens",
    "gen_ai.request.temperature": "temperature",
    "gen_ai.request.top_p": "top_p",
    "gen_ai.request.n": "n",
}


def check_tracing(endpoint: str | None) -> None:
    """Raises:
    ConfigError: traces are asked for and cannot be sent; the message says what to install.
    """
    if endpoint is None:
        return
    protocol = os.environ.get(PROTOCOL_VARIABLE, "grpc")
    if protocol not in _EXPORTERS:
        raise ConfigError(f"{PROTOCOL_VARIABLE}={protocol} must be one of {', '.join(_EXPORTERS)}")
    for module in ("opentelemetry.sdk", _EXPORTERS[protocol]):
        try:
            found = importlib.util.find_spec(module)
        except ImportError:
            found = None
        if found is None:
            raise ConfigError(
                f'--otlp-traces-endpoint needs the Python module {module}: pip install "minivllm[otel]"'
            )


class RequestTracer:
    """exporter: where spans go; None: the collector at `endpoint`, in batches, off the event loop."""

    def __init__(self, endpoint: str, model_name: str, *, exporter: Any = None) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._model_name = model_name
        self._propagator = TraceContextTextMapPropagator()
        self._provider = TracerProvider(resource=Resource.create({"service.name": "minivllm"}))
        if exporter is None:
            module = importlib.import_module(_EXPORTERS[os.environ.get(PROTOCOL_VARIABLE, "grpc")])
            processor: Any = BatchSpanProcessor(module.OTLPSpanExporter(endpoint=endpoint))
        else:
            processor = SimpleSpanProcessor(exporter)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("minivllm.llm_engine")

    async def watched(
        self, request_id: str, params: Any, headers: Mapping[str, str], outputs: AsyncGenerator[RequestOutput, None]
    ) -> AsyncGenerator[RequestOutput, None]:
        """The same outputs; their span ends with them, however that comes."""
        from opentelemetry.trace import SpanKind

        context = self._propagator.extract(dict(headers))
        span = self._tracer.start_span(SPAN, context=context, kind=SpanKind.SERVER, start_time=time.time_ns())
        span.set_attribute("gen_ai.request.id", request_id)
        span.set_attribute("gen_ai.response.model", self._model_name)
        for name, field in _PARAMS.items():
            if (value := getattr(params, field, None)) is not None:
                span.set_attribute(name, value)
        num_tokens: dict[int, int] = {}
        last = None
        try:
            async for output in outputs:
                last = output
                for answer in output.outputs:
                    num_tokens[answer.index] = num_tokens.get(answer.index, 0) + len(answer.token_ids)
                yield output
        except Exception as error:
            span.record_exception(error)
            raise
        finally:
            if last is not None:
                span.set_attributes(_of_output(last, num_tokens))
            span.end(time.time_ns())
            await outputs.aclose()

    def shutdown(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def _of_output(output: RequestOutput, num_tokens: dict[int, int]) -> dict[str, Any]:
    """Token counts, and times in seconds, of a request's last output."""
    attributes: dict[str, Any] = {
        "gen_ai.usage.prompt_tokens": output.num_prompt_tokens,
        "gen_ai.usage.completion_tokens": sum(num_tokens.values()),
        "gen_ai.usage.num_sequences": len(num_tokens),
    }
    if (metrics := output.metrics) is not None:
        times = {"time_to_first_token": metrics.first_token_time, "e2e": metrics.finished_time}
        for name, at in times.items():
            if at is not None:
                attributes[f"gen_ai.latency.{name}"] = at - metrics.arrival_time
    return attributes
