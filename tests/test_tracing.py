"""Traces: a span a request, under the caller's, with vLLM's names."""

from __future__ import annotations

import asyncio
import importlib.util

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from minivllm import tracing
from minivllm.exceptions import ConfigError, EngineGenerateError
from minivllm.outputs import CompletionOutput, RequestMetrics, RequestOutput
from minivllm.sampling_params import SamplingParams
from minivllm.tracing import RequestTracer, check_tracing

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
HEADERS = {"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01"}


def outputs(*, fail: bool = False):
    async def generate():
        for finished in (False, True):
            answer = CompletionOutput(0, "x", [7, 8], None, None, "stop" if finished else None, None)
            yield RequestOutput(
                "r", None, [1, 2, 3], [answer], finished, metrics=RequestMetrics(10.0, 10.5, 12.0 if finished else None)
            )
            if fail:
                raise EngineGenerateError("one step failed")

    return generate()


def spans(stream, headers: dict | None = None):
    exporter = InMemorySpanExporter()
    tracer = RequestTracer("", "the-model", exporter=exporter)
    params = SamplingParams(max_tokens=5, temperature=0.5)

    async def read() -> None:
        async for _ in tracer.watched("cmpl-1", params, headers or {}, stream):
            pass

    try:
        asyncio.run(read())
    except EngineGenerateError:
        pass
    tracer.shutdown()
    return exporter.get_finished_spans()


def test_a_request_is_a_span_with_what_it_asked_and_got():
    (span,) = spans(outputs())
    assert span.name == "llm_request" and span.parent is None
    assert dict(span.attributes) == {
        "gen_ai.request.id": "cmpl-1", "gen_ai.response.model": "the-model", "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5, "gen_ai.request.top_p": 1.0, "gen_ai.request.n": 1,
        "gen_ai.usage.prompt_tokens": 3, "gen_ai.usage.completion_tokens": 4, "gen_ai.usage.num_sequences": 1,
        "gen_ai.latency.time_to_first_token": 0.5, "gen_ai.latency.e2e": 2.0,
    }  # fmt: skip


def test_the_callers_trace_goes_on():
    (span,) = spans(outputs(), HEADERS)
    assert f"{span.context.trace_id:032x}" == TRACE_ID
    assert f"{span.parent.span_id:016x}" == "b7ad6b7169203331"


def test_a_request_that_fails_is_a_span_with_its_error():
    (span,) = spans(outputs(fail=True))
    assert [event.name for event in span.events] == ["exception"]
    assert span.attributes["gen_ai.usage.completion_tokens"] == 2


def test_what_is_missing_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch):
    check_tracing(None)
    monkeypatch.setenv(tracing.PROTOCOL_VARIABLE, "carrier pigeon")
    with pytest.raises(ConfigError, match="carrier pigeon"):
        check_tracing("http://x")
    monkeypatch.setenv(tracing.PROTOCOL_VARIABLE, "grpc")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"minivllm\[otel\]"):
        check_tracing("http://x")
