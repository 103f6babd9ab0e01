"""vLLM's metric names at /metrics, and the ten-second line."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from minivllm.config.observability import ObservabilityConfig
from minivllm.messages.stats import FinishedRequestStats, IterationStats, PrefixCacheStats, SchedulerStats
from minivllm.metrics.logging import LoggingStatLogger
from minivllm.metrics.prometheus import (
    INTER_TOKEN_LATENCY_BUCKETS,
    BulkHistogram,
    request_tokens_buckets,
)
from tests.entrypoints.openai.conftest import Api
from tests.entrypoints.openai.fakes import FakeEngine

ROOT = Path(__file__).resolve().parents[3]
FINISHED = FinishedRequestStats("stop", 10, 5, 4, 16, 1, 2.0, 0.25, 0.5, 1.0)
ITERATION = IterationStats(10, 4, 7, [0.3], [0.02, 0.03], [FINISHED])
SCHEDULER = SchedulerStats(3, 2, 0.5, PrefixCacheStats(10, 4), 1, 100)


def samples(api: Api) -> dict[str, float]:
    """Every sample by name, with the labels that are not the model's."""
    found = {}
    for family in text_string_to_metric_families(api.get("/metrics").text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            found[sample.name + ("".join(f"{{{v}}}" for v in labels.values()))] = sample.value
    return found


def test_what_the_engine_counts_is_exposed_under_vllms_names(api: Api):
    api.stats.record(SCHEDULER, ITERATION)
    api.stats.record(None, IterationStats(num_generation_tokens=1, rejected_by=["max_num_queued_reqs"]))
    found = samples(api)
    expected = {
        "vllm:num_requests_running": 3,
        "vllm:num_requests_waiting": 2,
        "vllm:kv_cache_usage_perc": 0.5,
        "vllm:prefix_cache_queries_total": 10,
        "vllm:prefix_cache_hits_total": 4,
        "vllm:num_preemptions_total": 1,
        "vllm:prompt_tokens_total": 10,
        "vllm:prompt_tokens_cached_total": 4,
        "vllm:prompt_tokens_by_source_total{local_compute}": 6,
        "vllm:prompt_tokens_by_source_total{local_cache_hit}": 4,
        "vllm:generation_tokens_total": 8,
        "vllm:request_success_total{stop}": 1,
        "vllm:request_success_total{abort}": 0,
        "vllm:admission_rejections_total{max_num_queued_reqs}": 1,
        "vllm:admission_rejections_total{max_num_queued_tokens}": 0,
        "vllm:iteration_tokens_total_sum": 100,
        "vllm:time_to_first_token_seconds_sum": 0.3,
        "vllm:time_to_first_token_seconds_bucket{0.25}": 0,
        "vllm:time_to_first_token_seconds_bucket{0.5}": 1,
        "vllm:inter_token_latency_seconds_count": 2,
        "vllm:request_time_per_output_token_seconds_sum": 0.25,
        "vllm:e2e_request_latency_seconds_sum": 2.0,
        "vllm:request_queue_time_seconds_sum": 0.25,
        "vllm:request_inference_time_seconds_sum": 1.5,
        "vllm:request_prefill_time_seconds_sum": 0.5,
        "vllm:request_decode_time_seconds_sum": 1.0,
        "vllm:request_prompt_tokens_sum": 10,
        "vllm:request_generation_tokens_sum": 5,
        "vllm:request_max_num_generation_tokens_sum": 5,
        "vllm:request_params_max_tokens_sum": 16,
        "vllm:request_params_n_sum": 1,
        "vllm:request_prefill_kv_computed_tokens_sum": 6,
    }
    assert {name: found.get(name) for name in expected} == expected
    assert found["process_resident_memory_bytes"] > 0


def test_gauges_follow_the_scheduler_up_and_down(api: Api):
    gauges = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    for values in [(3, 2, 0.5), (3, 2, 0.5), (3, 0, 0.25), (0, 0, 0.0)]:
        api.stats.record(SchedulerStats(*values), IterationStats())
        found = samples(api)
        assert tuple(found[f"vllm:{name}"] for name in gauges) == values


def test_every_metric_names_its_model(api: Api):
    lines = [
        line for line in api.get("/metrics").text.splitlines() if line.startswith("vllm:num_requests_running")
    ]
    assert lines == ['vllm:num_requests_running{engine="0",model_name="fake"} 0.0']


def test_the_sizes_of_the_cache_are_labels(api: Api):
    (line,) = [
        line for line in api.get("/metrics").text.splitlines() if line.startswith("vllm:cache_config_info{")
    ]
    assert 'block_size="32"' in line and 'num_gpu_blocks="10"' in line


def test_bulk_counting_gives_what_prometheus_clients_own_histogram_gives():
    values, buckets = [0.0, 0.01, 0.0100001, 0.3, 80, 81, 1e9], INTER_TOKEN_LATENCY_BUCKETS
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    bulk = BulkHistogram("a:b_seconds", "Text.", buckets, {"model_name": "m", "engine": "0"})
    ours.register(bulk)
    one_by_one = Histogram("a:b_seconds", "Text.", ["model_name", "engine"], buckets=buckets, registry=theirs)
    child = one_by_one.labels(model_name="m", engine="0")
    assert bodies(ours) == bodies(theirs)  # nothing seen yet
    for value in values:
        child.observe(value)
    bulk.observe_all(values[:3])
    bulk.observe_all(values[3:])
    assert bodies(ours) == bodies(theirs)


def bodies(registry: CollectorRegistry) -> list[str]:
    """The lines of a scrape, without the times at which metrics were made."""
    lines = generate_latest(registry).decode().splitlines()
    return [line for line in lines if "_created" not in line]


def test_token_buckets_are_a_1_2_5_series_up_to_the_context():
    assert request_tokens_buckets(1000) == [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
    assert request_tokens_buckets(999)[-1] == 500


def test_the_line_tells_rates_and_is_silent_when_idle(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    # An earlier test may have configured our logger: the lines are to be heard once, at the root.
    monkeypatch.setattr(logging.getLogger("minivllm"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("minivllm"), "handlers", [])
    caplog.set_level(logging.INFO, logger="minivllm")
    line = LoggingStatLogger(now=0.0)
    line.log(10.0)
    assert caplog.messages == []
    line.record(SCHEDULER, ITERATION)
    line.record(SchedulerStats(), IterationStats())
    line.log(20.0)
    line.log(30.0)
    line.log(40.0)
    busy, at_rest = caplog.messages
    assert "Avg prompt throughput: 1.0 tokens/s" in busy
    assert "Avg generation throughput: 0.7 tokens/s" in busy
    assert "Prefix cache hit rate: 40.0%" in busy
    assert "Avg generation throughput: 0.0 tokens/s, Running: 0 reqs" in at_rest


def test_every_metric_of_the_dashboard_is_exposed(api: Api):
    dashboard = json.loads((ROOT / "examples" / "grafana" / "minivllm.json").read_text())
    exprs = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    names = {name for expr in exprs for name in re.findall(r"(?:vllm:|http_)\w+", expr)}
    assert len(names) > 10
    api.complete()
    text = api.get("/metrics").text
    assert [name for name in names if f"\n{name}{{" not in text] == []


def test_http_requests_are_counted_by_route_and_never_by_what_clients_write(api: Api):
    api.complete()
    api.post("/v1/completions", {"prompt": ""})
    for path in ("/v1/models/secret", "/secret", "/health"):
        api.get(path)
    text = api.get("/metrics").text
    assert 'http_requests_total{handler="/v1/completions",method="POST",status="2xx"} 1.0' in text
    assert 'http_requests_total{handler="/v1/completions",method="POST",status="4xx"} 1.0' in text
    assert 'http_requests_total{handler="/v1/models/{model_id:path}",method="GET",status="4xx"} 1.0' in text
    assert 'http_requests_total{handler="none",method="GET",status="4xx"} 1.0' in text
    assert 'http_request_duration_seconds_count{handler="/v1/completions",method="POST"} 2.0' in text
    assert "secret" not in text and 'handler="/health"' not in text


# Every metric of vLLM 0.32, and why it is not here, if it is not. A family of several stands for all of its names.
NO = {
    "kv connector": "no KV comes from elsewhere",
    "lora": "no adapters are served",
    "media": "no multimodal model is served",
    "speculation": "nothing is speculated",
    "other models": "no diffusion models, no watermarks",
    "finite": "a request whose logits are not finite ends with an error, and is counted as such",
    "not measured": "asked for by an option that is refused by name",
    "no such route": "there are no WebSockets and no weight updates",
}
VLLMS: dict[str, str | None] = {
    "vllm:num_requests_running": None,
    "vllm:num_requests_waiting": None,
    "vllm:num_requests_waiting_by_reason": None,
    "vllm:num_requests_kv_fetch_by_stage": "kv connector",
    "vllm:engine_sleep_state": None,
    "vllm:kv_cache_usage_perc": None,
    "vllm:cache_config_info": None,
    "vllm:lora_requests_info": "lora",
    "vllm:prefix_cache_queries": None,
    "vllm:prefix_cache_hits": None,
    "vllm:external_prefix_cache_queries": "kv connector",
    "vllm:external_prefix_cache_hits": "kv connector",
    "vllm:mm_cache_queries": "media",
    "vllm:mm_cache_hits": "media",
    "vllm:num_preemptions": None,
    "vllm:prompt_tokens": None,
    "vllm:generation_tokens": None,
    "vllm:prompt_tokens_by_source": None,
    "vllm:prompt_tokens_cached": None,
    "vllm:prompt_tokens_cached_by_source": None,
    "vllm:request_success": None,
    "vllm:admission_rejections": None,
    "vllm:corrupted_requests": "finite",
    "vllm:watermark_requests": "other models",
    "vllm:request_prompt_tokens": None,
    "vllm:request_generation_tokens": None,
    "vllm:request_max_num_generation_tokens": None,
    "vllm:request_params_max_tokens": None,
    "vllm:request_prefill_kv_computed_tokens": None,
    "vllm:iteration_tokens_total": None,
    "vllm:request_params_n": None,
    "vllm:request_num_preemptions": None,
    "vllm:time_to_first_token_seconds": None,
    "vllm:inter_token_latency_seconds": None,
    "vllm:request_time_per_output_token_seconds": None,
    "vllm:e2e_request_latency_seconds": None,
    "vllm:request_queue_time_seconds": None,
    "vllm:request_inference_time_seconds": None,
    "vllm:request_prefill_time_seconds": None,
    "vllm:request_decode_time_seconds": None,
    "vllm:kv_block_lifetime_seconds": "not measured",
    "vllm:kv_block_idle_before_evict_seconds": "not measured",
    "vllm:kv_block_reuse_gap_seconds": "not measured",
    "vllm:spec_decode_num_drafts": "speculation",
    "vllm:spec_decode_num_draft_tokens": "speculation",
    "vllm:spec_decode_num_accepted_tokens": "speculation",
    "vllm:spec_decode_num_accepted_tokens_per_pos": "speculation",
    "vllm:diffusion_num_denoising_steps": "other models",
    "vllm:diffusion_num_canvas_positions": "other models",
    "vllm:diffusion_num_committed_tokens": "other models",
    "vllm:estimated_flops_per_gpu": "not measured",
    "vllm:estimated_read_bytes_per_gpu": "not measured",
    "vllm:estimated_write_bytes_per_gpu": "not measured",
    "vllm:tool_call_parser_invocations": None,
    "vllm:sleep_mode_operation_duration_seconds": None,
    "vllm:sleep_mode_operations_in_flight": None,
    "vllm:rl_weight_update_operation_duration_seconds": "no such route",
    "vllm:rl_weight_update_operations_in_flight": "no such route",
    "vllm:websocket_connections_active": "no such route",
    "vllm:websocket_connections": "no such route",
    "vllm:websocket_connection_duration_seconds": "no such route",
    "http_requests": None,
    "http_request_duration_seconds": None,
    "http_request_duration_highr_seconds": None,
    "http_request_size_bytes": None,
    "http_response_size_bytes": None,
    "process_resident_memory_bytes": None,
    "python_gc_objects_collected": None,
}


def test_every_metric_of_vllm_is_exposed_or_not_for_a_reason(engine: FakeEngine):
    api = Api(engine, enable_auto_tool_choice=True, tool_call_parser="hermes")
    api.chat()
    found = {family.name for family in text_string_to_metric_families(api.get("/metrics").text)}
    assert {name for name, reason in VLLMS.items() if reason is None} <= found
    assert {name for name, reason in VLLMS.items() if reason is not None} & found == set()
    assert {reason for reason in VLLMS.values() if reason is not None} == NO.keys()
    ours = {name.removesuffix("_created") for name in found if name.startswith("vllm:")}
    assert ours <= VLLMS.keys()


def test_preemptions_of_a_request_and_the_source_of_cached_tokens_are_counted(api: Api):
    preempted = FinishedRequestStats("stop", 10, 5, 4, 16, 1, 2.0, 0.25, 0.5, 1.0, num_preemptions=3)
    api.stats.record(SCHEDULER, IterationStats(10, 4, 7, [], [], [preempted]))
    found = samples(api)
    assert found["vllm:request_num_preemptions_bucket{2.0}"] == 0
    assert found["vllm:request_num_preemptions_bucket{3.0}"] == 1
    assert found["vllm:prompt_tokens_cached_by_source_total{device}"] == 4
    assert found["vllm:prompt_tokens_cached_by_source_total{disk}"] == 0


def test_answers_read_for_calls_are_counted_by_what_was_in_them(engine: FakeEngine):
    api = Api(engine, enable_auto_tool_choice=True, tool_call_parser="hermes")
    tools = [{"type": "function", "function": {"name": "f"}}]
    call = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    for answer in (call, "no call", call[:-20]):
        engine.answer = answer
        api.chat(tools=tools)
        api.stream("/v1/chat/completions", tools=tools)
    engine.answer = call
    named = [{"type": "function", "name": "f"}]
    api.post("/v1/responses", {"input": "x", "tools": named})
    messages = [{"role": "user", "content": "x"}]
    api.post("/v1/messages", {"messages": messages, "max_tokens": 99, "tools": [{"name": "f"}]})
    api.chat(tools=tools, tool_choice="none")  # nobody looks
    found = {name: value for name, value in samples(api).items() if "invocations_total" in name}
    head = "vllm:tool_call_parser_invocations_total"
    expected = {
        f"{head}{{{mode}}}{{{outcome}}}{{chat}}": 1
        for mode in ("streaming", "non_streaming") for outcome in ("tool_calls", "no_tool_calls", "incomplete")
    }  # fmt: skip
    expected |= {f"{head}{{non_streaming}}{{tool_calls}}{{{api}}}": 1 for api in ("responses", "messages")}
    assert found == expected


def test_without_statistics_the_engine_has_no_metrics(engine: FakeEngine):
    engine.config = replace(engine.config, observability=ObservabilityConfig(disable_log_stats=True))
    api = Api(engine, disable_log_stats=True)
    api.post("/v1/completions", {"prompt": "x", "max_tokens": 1})
    assert api.stats.loggers == []
    text = api.get("/metrics").text
    assert "vllm:num_requests_running" not in text and "http_requests_total" not in text
