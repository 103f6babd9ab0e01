"""The benchmarks: the same seed asks for the same work, and the numbers are those of the times they came from."""

from __future__ import annotations

import asyncio
import json
import math
from argparse import ArgumentParser
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minivllm.entrypoints.cli.bench import datasets, latency, serve, throughput
from minivllm.entrypoints.cli.bench.arrivals import RampUp, gaps
from minivllm.entrypoints.cli.bench.report import percentile, save, summarize
from minivllm.entrypoints.cli.bench.serve import Load, measure, run_load
from minivllm.entrypoints.cli.bench.server import Server
from minivllm.entrypoints.cli.bench.stream_client import Answer, Endpoint, _read_answer, _Unchunker, ask
from minivllm.entrypoints.cli.bench.timeline import timeline
from minivllm.entrypoints.cli.main import main
from minivllm.exceptions import ConfigError, MinivllmError
from minivllm.outputs import CompletionOutput, RequestOutput
from tests.entrypoints.stub_server import stub_server

FAKE = ["--distributed-executor-backend", "tests.fakes:FakeExecutor", "--max-model-len", "128"]
FAKE += ["--disable-frontend-multiprocessing", "--log-level", "WARNING"]


# --- requests


def test_a_seed_decides_the_requests():
    ask_for = dict(input_len=20, output_len=10, vocab_size=50, range_ratio=0.5)
    assert datasets.random_requests(30, seed=1, **ask_for) == datasets.random_requests(30, seed=1, **ask_for)
    assert datasets.random_requests(30, seed=1, **ask_for) != datasets.random_requests(30, seed=2, **ask_for)


def test_lengths_and_tokens_stay_in_their_ranges():
    requests = datasets.random_requests(
        200, input_len=20, output_len=10, vocab_size=50, range_ratio=0.5, prefix_len=3
    )
    assert {len(request.prompt_token_ids) for request in requests} == set(range(13, 34))
    assert {request.output_len for request in requests} == set(range(5, 16))
    assert len({tuple(request.prompt_token_ids[:3]) for request in requests}) == 1
    assert all(0 <= token < 50 for request in requests for token in request.prompt_token_ids)


@pytest.mark.parametrize("args", [["--num-prompts", "0"], ["--input-len", "0"], ["--random-range-ratio", "1"]])
def test_requests_that_make_no_sense_are_refused(args: list[str]):
    parser = ArgumentParser()
    parser.set_defaults(seed=0)
    datasets.add_dataset_arguments(parser, input_len=8, output_len=8, num=8)
    with pytest.raises(ConfigError):
        datasets.from_args(parser.parse_args(args), vocab_size=10)


def test_arrivals_keep_the_rate_on_average_and_the_first_comes_at_once():
    assert gaps(5, math.inf, 1.0, seed=0) == [0.0] * 5
    for burstiness in (0.5, 1.0, 10.0):
        drawn = gaps(4001, 8.0, burstiness, seed=3)
        assert drawn[0] == 0.0
        assert sum(drawn) / 4000 == pytest.approx(1 / 8, rel=0.1)
        assert drawn == gaps(4001, 8.0, burstiness, seed=3)


# --- numbers


def test_prefixes_are_repeated_evenly():
    requests = datasets.prefix_repetition_requests(
        20, prefix_len=8, suffix_len=4, num_prefixes=5, output_len=3, vocab_size=100, seed=1
    )
    prefixes = Counter(tuple(request.prompt_token_ids[:8]) for request in requests)
    assert sorted(prefixes.values()) == [4] * 5
    assert {(len(request.prompt_token_ids), request.output_len) for request in requests} == {(12, 3)}
    assert len({tuple(request.prompt_token_ids) for request in requests}) == 20


def test_conversations_are_drawn_from_a_file(tmp_path: Path):
    path = tmp_path / "sharegpt.json"
    pairs = [("short", "x"), ("a question of words", "an answer of five words"), ("y" * 9, "z" * 5000), ("alone", None)]
    path.write_text(json.dumps([
        {"conversations": [{"from": w, "value": v} for w, v in zip(("human", "gpt"), pair) if v]} for pair in pairs
    ]))  # fmt: skip
    (request,) = datasets.sharegpt_requests(str(path), 1, output_len=None, count_tokens=len)
    assert (request.prompt, request.prompt_len, request.output_len) == (pairs[1][0], 19, 23)
    with pytest.raises(ConfigError, match="1 conversations that fit"):
        datasets.sharegpt_requests(str(path), 2, output_len=None, count_tokens=len)
    path.write_text("[1]")
    for wrong in (str(path), None, str(tmp_path / "nowhere")):
        with pytest.raises(ConfigError, match="--dataset-path"):
            datasets.sharegpt_requests(wrong, 1, output_len=5, count_tokens=len)


def test_goodput_counts_what_keeps_every_limit():
    answers = [
        Answer(5, first_token_s=ttft, latency_s=latency, num_output_tokens=11)
        for ttft, latency in ((0.1, 1.1), (0.3, 1.3), (0.1, 3.1))
    ]
    load = serve.Load(answers, 2.0, 0.1, 3)
    assert "request_goodput" not in serve.measure(load, [99])
    assert serve.measure(load, [99], {"ttft": 200})["request_goodput"] == 1.0
    assert serve.measure(load, [99], {"ttft": 200, "tpot": 150})["request_goodput"] == 0.5
    assert serve.measure(load, [99], {"e2el": 5000})["request_goodput"] == 1.5


def test_a_timeline_has_a_row_for_each_request():
    good = Answer(5, start=1.0, first_token_s=0.5, latency_s=1.0, num_output_tokens=3)
    answers = [good, Answer(5, start=2.0, error="<x>")]
    page = timeline(answers)
    assert page.count("<rect") == 3 and page.count("<g>") == 2
    assert "&lt;x&gt;" in page and "<x>" not in page
    assert 'x="500.0"' in page


def test_percentiles_interpolate():
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert percentile([1.0, 2.0], 99) == pytest.approx(1.99)
    assert math.isnan(percentile([], 50))


def test_a_summary_is_that_of_its_numbers():
    assert summarize([2.0, 4.0, 4.0, 6.0], (25, 99.9)) == pytest.approx(
        {"mean": 4.0, "median": 4.0, "std": math.sqrt(2), "p25": 3.5, "p99.9": 5.994}
    )


def test_the_result_of_a_run_is_in_closed_form():
    """Two requests of 3 and 2 tokens, first token after 100 and 200 ms, 20 ms between tokens; one that failed."""
    answers = [
        Answer(10, first_token_s=0.1, latency_s=0.14, inter_token_s=[0.02, 0.02], num_output_tokens=3),
        Answer(30, first_token_s=0.2, latency_s=0.22, inter_token_s=[0.02], num_output_tokens=2),
        Answer(50, error="refused"),
    ]
    result = measure(Load(answers, duration_s=2.0, client_cpu_s=0.5, peak_concurrency=2), [50])
    assert (result["completed"], result["failed"]) == (2, 1)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (40, 5)
    assert result["request_throughput"] == 1.0
    assert result["output_throughput"] == 2.5
    assert result["total_token_throughput"] == 22.5
    assert result["client_cpu_share"] == 0.25
    assert result["mean_ttft_ms"] == pytest.approx(150)
    assert result["mean_tpot_ms"] == pytest.approx(20)
    assert result["p50_itl_ms"] == pytest.approx(20)
    assert result["mean_e2el_ms"] == pytest.approx(180)


def test_a_run_of_failures_has_no_times_and_can_still_be_saved(tmp_path: Path):
    result = measure(Load([Answer(1, error="x")], 1.0, 0.0, 1), [99])
    assert math.isnan(result["mean_ttft_ms"])
    save(tmp_path / "new" / "result.json", result)
    assert json.loads((tmp_path / "new" / "result.json").read_text())["mean_ttft_ms"] is None


def test_offline_throughput_counts_every_answer():
    answers = [CompletionOutput(i, "", [1, 2, 3]) for i in range(2)]
    outputs = [RequestOutput(str(i), None, [1] * 10, answers, True) for i in range(4)]
    result = throughput.measure(outputs, elapsed_s=2.0)
    assert result["total_num_prompt_tokens"] == 40
    assert result["output_tokens_per_second"] == 12.0
    assert result["tokens_per_second"] == 32.0


# --- the client


def read(raw: bytes) -> Answer:
    async def feed() -> Answer:
        reader = asyncio.StreamReader()
        reader.feed_data(raw)
        reader.feed_eof()
        answer = Answer(1)
        await _read_answer(reader, answer)
        return answer

    return asyncio.run(feed())


OK = b"HTTP/1.1 200 OK\r\n\r\n"
TOKEN = b'data: {"choices": [{"text": "\\"choices\\":[]"}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"completion_tokens":7}}\n\n'
DONE = b"data: [DONE]\n\n"


def test_every_event_with_a_choice_is_a_token_and_usage_says_how_many():
    answer = read(OK + b": keep-alive\n\n" + TOKEN * 3 + USAGE + DONE)
    assert answer.error is None
    assert answer.num_output_tokens == 7
    assert answer.first_token_s > 0
    assert len(answer.inter_token_s) == 2


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"HTTP/1.1 503 Busy\r\n\r\n{}", "HTTP 503"),
        (OK + TOKEN, r"before \[DONE\]"),
        (OK + TOKEN + DONE, "usage"),
        (OK + TOKEN + b'data: {"error": {"message": "died"}}\n\n' + DONE, "died"),
    ],
)
def test_an_answer_that_did_not_end_well_is_an_error(raw: bytes, reason: str):
    with pytest.raises(MinivllmError, match=reason):
        raise MinivllmError(read(raw).error)


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=8), st.randoms(use_true_random=False))
def test_a_chunked_body_is_put_together_however_it_is_cut(parts: list[bytes], draw):
    raw = b"".join(b"%x;ext=1\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    unchunk, out, at = _Unchunker(), b"", 0
    while at < len(raw):
        step = draw.randint(1, 9)
        out += unchunk.feed(raw[at : at + step])
        at += step
    assert out == b"".join(parts)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://"])
def test_what_is_no_url_is_refused(url: str):
    with pytest.raises(ConfigError):
        Endpoint(url, {})


def test_a_header_cannot_smuggle_another():
    with pytest.raises(ConfigError):
        Endpoint("http://x", {"A": "b\r\nC: d"})


def test_a_server_that_is_not_there_is_an_answer_with_an_error():
    answer = asyncio.run(ask(Endpoint("http://127.0.0.1:1/v1/completions", {}), b"{}", 1))
    assert "ConnectionRefusedError" in answer.error


def test_no_more_requests_are_open_than_allowed():
    with stub_server() as server:
        endpoint = Endpoint(f"{server.url}/v1/completions", {})
        load = asyncio.run(run_load(endpoint, [(b"{}", 4)] * 12, gaps=[0.0] * 12, max_concurrency=3))
        assert [answer.error for answer in load.answers] == [None] * 12
        assert 1 <= load.peak_concurrency <= 3
        assert len(server.asked) == 12


# --- the commands


def test_bench_serve_prints_and_saves_its_result(tmp_path: Path, capsys):
    with stub_server() as server:
        main(
            ["bench", "serve", "--base-url", server.url, "--num-prompts", "5", "--input-len", "6", "--output-len", "3",
             "--ignore-eos", "--extra-body", '{"top_k": 3}', "--header", "X-A=b", "--disable-tqdm", "--save-detailed",
             "--result-dir", str(tmp_path), "--result-filename", "r.json", "--metadata", "note=here",
             "--percentile-metrics", "ttft,itl", "--metric-percentiles", "50,99.9", "--goodput", "ttft:60000",
             "--plot-timeline"]
        )  # fmt: skip
        asked, headers = server.asked, server.headers
    out = capsys.readouterr().out
    assert "Serving Benchmark Result" in out and "P99.9 TTFT (ms):" in out and "E2EL" not in out
    assert all(len(body["prompt"]) == 6 and body["max_tokens"] == 3 and body["ignore_eos"] for body in asked)
    assert all(body["top_k"] == 3 and max(body["prompt"]) < 256 for body in asked)
    assert headers[0]["x-a"] == "b"
    assert "Request goodput" in out and (tmp_path / "r.timeline.html").read_text().count("<g>") == 5
    saved = json.loads((tmp_path / "r.json").read_text())
    assert (saved["completed"], saved["note"], saved["request_rate"]) == (5, "here", "inf")
    assert saved["total_output_tokens"] == 15
    assert len(saved["requests"]) == 5


def bench_serve(*args: str) -> tuple[list[dict], list[dict], list[str]]:
    """Bodies, headers and paths of all that was asked."""
    with stub_server() as server:
        main(["bench", "serve", "--base-url", server.url, "--num-prompts", "3", "--disable-tqdm", *args])
        return server.asked, server.headers, server.paths


def test_the_chat_backend_sends_conversations_and_does_not_count_the_role_as_a_token(tmp_path: Path, capsys):
    result = ["--save-detailed", "--result-dir", str(tmp_path), "--result-filename", "r.json"]
    asked, _, paths = bench_serve("--backend", "openai-chat", "--logprobs", "2", "--top-p", "0.5", *result)
    chats = [body for body, path in zip(asked, paths) if path == "/v1/chat/completions"]
    assert len(chats) == 3
    assert chats[0]["messages"] == [{"role": "user", "content": "some words"}]
    assert (chats[0]["max_completion_tokens"], chats[0]["top_p"]) == (128, 0.5)
    assert (chats[0]["logprobs"], chats[0]["top_logprobs"]) == (True, 2) and "top_k" not in chats[0]
    saved = json.loads((tmp_path / "r.json").read_text())
    assert all(len(request["inter_token_s"]) == 2 for request in saved["requests"])  # of three words
    assert saved["total_input_tokens"] == 3 * 4  # as the server's usage says


def test_requests_have_ids_results_are_lines_and_the_server_is_profiled(tmp_path: Path, capsys):
    for _ in range(2):
        args = ["--append-result", "--result-dir", str(tmp_path), "--result-filename", "r.jsonl"]
        _, headers, paths = bench_serve("--request-id-prefix", "run-", "--profile", *args)
    assert paths[0] == "/start_profile" and paths[-1] == "/stop_profile"
    assert {each.get("x-request-id") for each in headers[1:-1]} == {"run-0", "run-1", "run-2"}
    assert [json.loads(line)["completed"] for line in (tmp_path / "r.jsonl").read_text().splitlines()] == [3, 3]
    assert "/there/trace.json" in capsys.readouterr().out


def test_a_ramp_goes_from_one_rate_to_the_other():
    for strategy, middle in (("linear", 10.5), ("exponential", 20**0.5)):
        ramp = RampUp(strategy, 1.0, 20.0)
        assert [ramp.rate(p) for p in (0, 0.5, 1)] == pytest.approx([1.0, middle, 20.0])
        drawn = gaps(4001, ramp, 1e6, seed=1)  # so even that each gap is the mean
        assert (drawn[1], drawn[-1]) == pytest.approx((1.0, 1 / 20), rel=0.01)


@pytest.mark.parametrize(
    "option",
    ["--tokenizer x", "--lora-modules a=b", "--probe-request-rate 1", "--hf-split train", "--random-mm-limit 1"],
)
def test_an_option_of_vllms_that_is_not_here_says_what_to_do(option: str, capsys):
    with pytest.raises(SystemExit):
        serve.make_parser().parse_args(option.split())
    line = capsys.readouterr().err.splitlines()[-1]
    assert option.split()[0] in line and "is an option of vLLM that minivllm does not have; " in line


def test_a_server_that_is_not_ready_is_waited_for_and_that_is_said(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("minivllm.entrypoints.cli.bench.server._LOOK_EVERY_S", 0.001)
    with stub_server() as server:
        server.statuses = [503, 502]
        assert Server(server.url, {}).model(None, patience_s=60)["id"] == "canned"
    assert capsys.readouterr().err == f"waiting up to 60 s for {server.url} to answer\n"


def test_a_server_that_refuses_us_is_not_waited_for():
    with stub_server() as server:
        server.statuses = [401]
        with pytest.raises(ConfigError, match="answers 401; a key is taken from MINIVLLM_API_KEY"):
            Server(server.url, {}).model(None, patience_s=60)


def test_the_load_comes_after_the_warm_up():
    asked, _, _ = bench_serve("--num-warmups", "2")
    assert len(asked) == 5 and all(body in asked[2:] for body in asked[:2])


def test_bench_serve_ends_with_an_error_when_requests_fail(capsys):
    with stub_server() as server, pytest.raises(SystemExit) as exit_:
        server.refusal = (400, "too long")
        main(["bench", "serve", "--base-url", server.url, "--num-prompts", "3", "--disable-tqdm"])
    assert exit_.value.code == 1
    assert "3 of 3 requests failed" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["--base-url", "http://127.0.0.1:1"], "no server answers"),
        (["--request-rate", "0"], "request_rate"),
        (["--percentile-metrics", "ttft,xyz"], "xyz"),
        (["--metric-percentiles", "99,x"], "--metric-percentiles"),
        (["--metadata", "x"], "--metadata"),
        (["--max-concurrency", "0"], "max_concurrency"),
        (["--goodput", "itl:5"], "--goodput"),
        (["--goodput", "ttft:soon"], "soon"),
        (["--ramp-up-start-rps", "1"], "need --ramp-up-strategy"),
        (["--ramp-up-strategy", "linear"], "needs --ramp-up-start-rps"),
        (["--ramp-up-strategy", "linear", "--ramp-up-start-rps", "5", "--ramp-up-end-rps", "1"], "at most"),
        (["--ramp-up-strategy", "linear", "--ramp-up-start-rps", "1", "--ramp-up-end-rps", "5", "--request-rate", "3"],
         "does not go together"),
    ],
)
def test_bench_serve_names_a_wrong_argument(args: list[str], reason: str):
    with pytest.raises(ConfigError, match=reason):
        serve.run(serve.make_parser().parse_args(args))


def test_bench_throughput_runs_the_engine(tiny_model: Path, tmp_path: Path, capsys):
    path = tmp_path / "result.json"
    args = ["--num-prompts", "4", "--input-len", "8", "--output-len", "6", "--num-warmups", "1"]
    main(["bench", "throughput", "--model", str(tiny_model), *args, *FAKE, "--output-json", str(path)])
    assert "Throughput: " in capsys.readouterr().out
    saved = json.loads(path.read_text())
    assert (saved["total_num_prompt_tokens"], saved["total_num_output_tokens"]) == (32, 24)


def test_bench_latency_runs_the_engine(tiny_model: Path, tmp_path: Path, capsys):
    path = tmp_path / "result.json"
    args = ["--batch-size", "2", "--input-len", "8", "--output-len", "6", "--num-iters-warmup", "1", "--num-iters", "3"]
    main(["bench", "latency", "--model", str(tiny_model), *args, *FAKE, "--output-json", str(path)])
    out = capsys.readouterr().out
    assert "Avg latency: " in out and "99% percentile latency: " in out
    assert len(json.loads(path.read_text())["latencies"]) == 3


def test_lengths_the_engine_would_cut_short_are_refused(tiny_model: Path):
    parser = throughput.make_parser()
    with pytest.raises(ConfigError, match="max_model_len=128"):
        throughput.run(parser.parse_args(["--model", str(tiny_model), "--num-prompts", "1", *FAKE]))


def test_bench_latency_measures_prefill_every_time():
    assert latency.make_parser().parse_args([]).enable_prefix_caching is False
