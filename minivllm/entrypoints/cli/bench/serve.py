"""`minivllm bench serve`: load on a running server, and what its clients felt.

Arrivals are open-loop: a request is sent when its time has come, whether or not others are done, unless
--max-concurrency holds it back.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from minivllm import envs
from minivllm.config.model_files import CONFIG
from minivllm.entrypoints.cli.bench import datasets
from minivllm.entrypoints.cli.bench.arrivals import STRATEGIES, RampUp, gaps, paced, ramp_up_of
from minivllm.entrypoints.cli.bench.bodies import ENDPOINTS, make_body
from minivllm.entrypoints.cli.bench.datasets import BenchRequest
from minivllm.entrypoints.cli.bench.not_here import refuse_option
from minivllm.entrypoints.cli.bench.report import WIDTH, machine, row, save, summarize, title
from minivllm.entrypoints.cli.bench.server import Server
from minivllm.entrypoints.cli.bench.stream_client import Answer, Endpoint, ask
from minivllm.entrypoints.cli.bench.timeline import write_timeline
from minivllm.exceptions import ConfigError, MinivllmError
from minivllm.utils.argparse_utils import FlexibleArgumentParser, json_object, number, size

METRICS = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}
BUSY_CLIENT = 0.7  # share of a processor above which the client may be what is measured


def make_parser() -> FlexibleArgumentParser:
    parser = FlexibleArgumentParser(prog="minivllm bench serve", description="Measure a running server under load.")
    parser.refuse = refuse_option
    server = parser.add_argument_group("server")
    server.add_argument(
        "--backend", choices=tuple(ENDPOINTS), default="openai",
        help="openai and vllm: /v1/completions; openai-chat: /v1/chat/completions.",
    )  # fmt: skip
    server.add_argument("--base-url", metavar="URL", help="Instead of --host and --port.")
    server.add_argument("--host", default="127.0.0.1", metavar="TEXT", help="Where the server is.")
    server.add_argument("--port", type=size, default=8000, metavar="N", help="Its port.")
    server.add_argument("--endpoint", metavar="PATH", help="The route; default: the backend's.")
    server.add_argument("--model", metavar="NAME", help="Name of the model; default: the first the server lists.")
    server.add_argument("--header", nargs="+", default=[], metavar="NAME=VALUE", help="Headers to send.")
    server.add_argument("--insecure", action="store_true", help="Take any certificate of an https server.")
    server.add_argument(
        "--ready-check-timeout-sec", type=size, default=0, metavar="S", help="Wait so long for the server to answer."
    )
    server.add_argument(
        "--request-id-prefix", default="", metavar="TEXT", help="Send X-Request-Id: this and the request's number."
    )
    server.add_argument(
        "--profile", action="store_true", help="Have the server record itself meanwhile (its --profiler-config)."
    )
    datasets.add_dataset_arguments(parser, input_len=1024, output_len=128, num=1000, texts=True)
    requests = parser.add_argument_group("load")
    requests.add_argument("--seed", type=size, default=0, metavar="N", help="Seed of prompts and arrivals.")
    requests.add_argument(
        "--vocab-size", type=size, metavar="N",
        help="Token ids are drawn below it; default: the model's, where its directory is at hand, else 256.",
    )  # fmt: skip
    requests.add_argument(
        "--request-rate", type=number, default=float("inf"), metavar="R",
        help="Requests per second; inf sends all at once.",
    )  # fmt: skip
    requests.add_argument(
        "--burstiness", type=number, default=1.0, metavar="B",
        help="Shape of the gamma-distributed gaps: 1 is a Poisson process, less is burstier.",
    )  # fmt: skip
    requests.add_argument(
        "--ramp-up-strategy", choices=STRATEGIES, help="Let the rate grow from the start's to the end's."
    )
    requests.add_argument("--ramp-up-start-rps", type=number, metavar="R", help="Requests per second at the start.")
    requests.add_argument("--ramp-up-end-rps", type=number, metavar="R", help="Requests per second at the end.")
    requests.add_argument("--max-concurrency", type=size, metavar="N", help="Requests open at once, at most.")
    requests.add_argument("--num-warmups", type=size, default=0, metavar="N", help="Requests before measuring.")
    requests.add_argument("--ignore-eos", action="store_true", help="Generate to the full length.")
    requests.add_argument("--temperature", type=number, default=0.0, metavar="T", help="Sampling temperature.")
    for name, kind in {"top-p": number, "top-k": size, "min-p": number}.items():
        requests.add_argument(f"--{name}", type=kind, metavar="N", help="Of sampling; default: the server's.")
    for name in ("frequency-penalty", "presence-penalty", "repetition-penalty"):
        requests.add_argument(f"--{name}", type=number, metavar="N", help="Default: the server's.")
    requests.add_argument("--logprobs", type=size, metavar="N", help="Likeliest tokens to ask for at each place.")
    requests.add_argument("--extra-body", type=json_object, default={}, metavar="JSON", help="More request fields.")
    results = parser.add_argument_group("results")
    results.add_argument(
        "--percentile-metrics", default="ttft,tpot,itl,e2el", metavar="NAMES", help="Which of ttft,tpot,itl,e2el."
    )
    results.add_argument("--metric-percentiles", default="99", metavar="P,P", help="Percentiles to report.")
    results.add_argument(
        "--goodput", nargs="+", default=[], metavar="METRIC:MS",
        help="Also count the requests within these limits, as in ttft:200 tpot:50 e2el:2000.",
    )  # fmt: skip
    results.add_argument("--plot-timeline", action="store_true", help="Draw each request over time, as an HTML page.")
    results.add_argument("--save-result", action="store_true", help="Write the result as JSON.")
    results.add_argument("--append-result", action="store_true", help="Add the result as a line of the file.")
    results.add_argument("--save-detailed", action="store_true", help="With it, every request's times.")
    results.add_argument("--result-dir", metavar="DIR", help="Where to; default: here.")
    results.add_argument("--result-filename", metavar="FILE", help="Its name; default: made from rate, model and time.")
    results.add_argument("--metadata", nargs="+", default=[], metavar="KEY=VALUE", help="Kept in the result.")
    results.add_argument("--disable-tqdm", action="store_true", help="No progress bar.")
    return parser


def run(args: Namespace) -> None:
    base_url = (args.base_url or f"http://{args.host}:{args.port}").rstrip("/")
    headers = {**_pairs("--header", args.header)}
    key = envs.get("MINIVLLM_API_KEY")
    if key:
        headers.setdefault("Authorization", f"Bearer {key}")
    percents = _percents(args.metric_percentiles)
    metrics = _metrics(args.percentile_metrics)
    limits = _limits(args.goodput)
    if not args.request_rate > 0 or not args.burstiness > 0:
        raise ConfigError("request_rate and burstiness must be above 0")
    if args.max_concurrency is not None and args.max_concurrency < 1:
        raise ConfigError(f"max_concurrency={args.max_concurrency} must be at least 1")
    rate = ramp_up_of(args) or args.request_rate
    metadata = _pairs("--metadata", args.metadata)
    server = Server(base_url, headers, verify=not args.insecure)
    card = server.model(args.model, patience_s=args.ready_check_timeout_sec)
    model = card["id"]
    requests, bodies = _prepare(server, card, args)
    endpoint = Endpoint(
        base_url + (args.endpoint or ENDPOINTS[args.backend]),
        headers,
        id_prefix=args.request_id_prefix,
        insecure=args.insecure,
    )
    _allow_many_connections()
    with server.profiled() if args.profile else contextlib.nullcontext():
        load = asyncio.run(_run_load(endpoint, requests, bodies, rate, args))
    result = measure(load, percents, limits)
    report(result, args.request_rate, args.max_concurrency, metrics)
    if args.save_result or args.save_detailed or args.append_result:
        path = _result_path(args, model)
        whole = {**_describe(args, model, metadata), **result, **(_details(load) if args.save_detailed else {})}
        save(path, whole, append=args.append_result)
        print(f"saved to {path}")
    if args.plot_timeline:
        path = _result_path(args, model).with_suffix(".timeline.html")
        write_timeline(path, load.answers)
        print(f"timeline in {path}")
    failed = [answer for answer in load.answers if answer.error]
    if failed:
        raise MinivllmError(f"{len(failed)} of {len(load.answers)} requests failed; the first: {failed[0].error}")


def _prepare(server: Server, card: dict[str, Any], args: Namespace) -> tuple[list[BenchRequest], list[bytes]]:
    """The requests, and their bodies. Where the server must count tokens or write texts, it is asked for each."""
    model = card["id"]
    with _progress(None, shown=not args.disable_tqdm, aside="asking the server") as bar:

        def count_tokens(text: str) -> int:
            bar.update(1)
            return server.count_tokens(model, text)

        def text_of(token_ids: list[int]) -> str:
            bar.update(1)
            return server.text_of(model, token_ids)

        if args.dataset_name == datasets.SHAREGPT:
            requests = datasets.sharegpt_requests(
                args.dataset_path,
                args.num_prompts,
                output_len=args.sharegpt_output_len,
                count_tokens=count_tokens,
                seed=args.seed,
            )
        else:
            requests = datasets.from_args(args, args.vocab_size or _vocab_size(card))
        return requests, [make_body(request, model, args, text_of) for request in requests]


@dataclass
class Load:
    """One measured run."""

    answers: list[Answer]
    duration_s: float
    client_cpu_s: float
    peak_concurrency: int


async def _run_load(
    endpoint: Endpoint, requests: list[BenchRequest], bodies: list[bytes], rate: float | RampUp, args: Namespace
) -> Load:
    num_warmups = min(args.num_warmups, len(requests))
    with _progress(num_warmups, shown=not args.disable_tqdm, aside="warming up") as bar:
        for request, body in zip(requests[:num_warmups], bodies):
            answer = await ask(endpoint, body, request.prompt_len)
            if answer.error:
                raise MinivllmError(f"the first request failed, so nothing is measured: {answer.error}")
            bar.update(1)
    with _progress(len(requests), shown=not args.disable_tqdm) as bar:
        return await run_load(
            endpoint,
            [(body, request.prompt_len) for request, body in zip(requests, bodies)],
            gaps=gaps(len(requests), rate, args.burstiness, args.seed),
            max_concurrency=args.max_concurrency,
            on_done=lambda: bar.update(1),
        )


async def run_load(
    endpoint: Endpoint,
    requests: list[tuple[bytes, int]],
    *,
    gaps: Sequence[float],
    max_concurrency: int | None = None,
    on_done: Any = lambda: None,
) -> Load:
    """Send each (body, prompt length) after its gap in seconds; the answers in the same order."""
    slots = asyncio.Semaphore(max_concurrency or len(requests))
    num_open = peak = 0

    async def one(body: bytes, prompt_len: int) -> Answer:
        nonlocal num_open, peak
        async with slots:
            num_open += 1
            peak = max(peak, num_open)
            answer = await ask(endpoint, body, prompt_len)
            num_open -= 1
        on_done()
        return answer

    start, cpu_start = time.perf_counter(), time.process_time()
    tasks = [asyncio.ensure_future(one(*request)) async for request in paced(requests, gaps, start)]
    answers = await asyncio.gather(*tasks)
    return Load(list(answers), time.perf_counter() - start, time.process_time() - cpu_start, peak)


def measure(
    load: Load, percents: Sequence[float], limits: Mapping[str, float] = MappingProxyType({})
) -> dict[str, Any]:
    """The numbers of a run; times in milliseconds, failed requests counted and left out.

    limits: of metrics, in milliseconds; with any, the requests a second that keep all of them are counted too.
    """
    good = [answer for answer in load.answers if answer.error is None]
    num_input = sum(answer.prompt_len for answer in good)
    num_output = sum(answer.num_output_tokens for answer in good)
    times = {
        "ttft": [answer.first_token_s for answer in good],
        "tpot": [tpot for answer in good if (tpot := answer.time_per_output_token_s) is not None],
        "itl": [gap for answer in good for gap in answer.inter_token_s],
        "e2el": [answer.latency_s for answer in good],
    }
    result: dict[str, Any] = {
        "duration": load.duration_s,
        "completed": len(good),
        "failed": len(load.answers) - len(good),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(good) / load.duration_s,
        "output_throughput": num_output / load.duration_s,
        "total_token_throughput": (num_input + num_output) / load.duration_s,
        "peak_concurrent_requests": load.peak_concurrency,
        "client_cpu_share": load.client_cpu_s / load.duration_s,
    }
    if limits:
        result["request_goodput"] = sum(_keeps(answer, limits) for answer in good) / load.duration_s
    for name, seconds in times.items():
        for statistic, value in summarize([1000 * s for s in seconds], percents).items():
            result[f"{statistic}_{name}_ms"] = value
    return result


def _keeps(answer: Answer, limits: Mapping[str, float]) -> bool:
    """Whether a request kept every limit, in milliseconds; a time it does not have keeps its limit."""
    times = {"ttft": answer.first_token_s, "tpot": answer.time_per_output_token_s or 0.0, "e2el": answer.latency_s}
    return all(1000 * times[name] <= limit for name, limit in limits.items())


def report(result: dict[str, Any], rate: float, max_concurrency: int | None, metrics: Sequence[str]) -> None:
    """Print vLLM's table."""
    print(title("Serving Benchmark Result", "="))
    print(row("Successful requests:", result["completed"]))
    print(row("Failed requests:", result["failed"]))
    if max_concurrency is not None:
        print(row("Maximum request concurrency:", max_concurrency))
    if rate != float("inf"):
        print(row("Request rate configured (RPS):", rate))
    print(row("Benchmark duration (s):", result["duration"]))
    print(row("Total input tokens:", result["total_input_tokens"]))
    print(row("Total generated tokens:", result["total_output_tokens"]))
    print(row("Request throughput (req/s):", result["request_throughput"]))
    if "request_goodput" in result:
        print(row("Request goodput (req/s):", result["request_goodput"]))
    print(row("Output token throughput (tok/s):", result["output_throughput"]))
    print(row("Peak concurrent requests:", result["peak_concurrent_requests"]))
    print(row("Total token throughput (tok/s):", result["total_token_throughput"]))
    print(row("Client CPU (% of one processor):", 100 * result["client_cpu_share"]))
    for name in metrics:
        print(title(METRICS[name], "-"))
        for key in (key for key in result if key.endswith(f"_{name}_ms")):
            statistic = key.removesuffix(f"_{name}_ms")
            label = statistic.upper() if statistic[1:2].isdigit() else statistic.capitalize()
            print(row(f"{label} {name.upper()} (ms):", result[key]))
    print("=" * WIDTH)
    if result["client_cpu_share"] > BUSY_CLIENT:
        print("The client kept a processor busy: these numbers may be its own. Use fewer requests or another machine.")


def _vocab_size(card: dict[str, Any]) -> int:
    """The model's, if the server runs from a directory that we see too; else the bytes that every vocabulary has."""
    try:
        return int(json.loads((Path(card["root"]) / CONFIG).read_text())["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return 256


def _allow_many_connections() -> None:
    """Each open request is an open file; the usual limit of 1,024 is too few."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _progress(total: int | None, *, shown: bool, aside: str | None = None) -> Any:
    """A bar. aside: what is done beside the measuring; it is shown only where that lasts, and does not stay."""
    from tqdm import tqdm

    if aside is None:
        return tqdm(total=total, disable=not shown)
    return tqdm(desc=aside, total=total, disable=not shown, delay=1, leave=False)


def _pairs(option: str, items: Sequence[str]) -> dict[str, str]:
    wrong = [item for item in items if "=" not in item]
    if wrong:
        raise ConfigError(f"{option} {wrong[0]}: write it as NAME=VALUE")
    return dict(item.split("=", 1) for item in items)


def _percents(text: str) -> list[float]:
    try:
        percents = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--metric-percentiles {text}: write numbers with commas, as in 50,99") from None
    if not all(0 <= percent <= 100 for percent in percents):
        raise ConfigError(f"--metric-percentiles {text}: each must be from 0 to 100")
    return percents


def _metrics(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in METRICS:
            raise ConfigError(f"--percentile-metrics {text}: {name!r} is not one of {', '.join(METRICS)}")
    return names


def _limits(items: Sequence[str]) -> dict[str, float]:
    limits = {}
    for item in items:
        name, _, value = item.partition(":")
        if name not in ("ttft", "tpot", "e2el"):
            raise ConfigError(f"--goodput {item}: write ttft, tpot or e2el, a colon and milliseconds, as in ttft:200")
        try:
            limits[name] = float(value)
        except ValueError:
            raise ConfigError(f"--goodput {item}: {value!r} is not a number of milliseconds") from None
    return limits


def _describe(args: Namespace, model: str, metadata: dict[str, str]) -> dict[str, Any]:
    return {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "backend": args.backend,
        "model_id": model,
        "num_prompts": args.num_prompts,
        "request_rate": args.request_rate if args.request_rate != float("inf") else "inf",
        "burstiness": args.burstiness,
        "ramp_up_strategy": args.ramp_up_strategy,
        "ramp_up_start_rps": args.ramp_up_start_rps,
        "ramp_up_end_rps": args.ramp_up_end_rps,
        "max_concurrency": args.max_concurrency,
        "dataset_name": args.dataset_name,
        "random_input_len": args.random_input_len,
        "random_output_len": args.random_output_len,
        "ignore_eos": args.ignore_eos,
        "seed": args.seed,
        "machine": machine(),
        **metadata,
    }


def _details(load: Load) -> dict[str, Any]:
    return {"requests": [asdict(answer) for answer in load.answers]}


def _result_path(args: Namespace, model: str) -> Path:
    name = args.result_filename
    if name is None:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        name = f"{args.backend}-{args.request_rate:g}qps-{Path(model).name}-{stamp}.json"
    return Path(args.result_dir or ".") / name
