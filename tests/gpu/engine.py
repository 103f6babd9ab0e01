"""What an engine on a GPU must keep, checked with tiny random models; part of `python -m tests.gpu`.

Each check takes a `Device` and gives a `Finding`. On a CPU the same checks run on the device that is none
(tests/worker/test_gpu_checks.py), which proves the checks, not the card.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minivllm.config.device import DeviceConfig
from minivllm.logger import init_logger
from minivllm.platforms.platform import Platform, detect
from minivllm.sampling_params import SamplingParams
from tests.gpu import sampling
from tests.models.loop import Answer, Loop

logger = init_logger(__name__)

_EXAMPLES = str(Path(__file__).resolve().parents[2] / "examples")
PROMPT_LENGTHS = (150, 33, 64, 5, 97, 1)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"arch": "llama"},
    "mistral with a window": {"arch": "mistral", "sliding_window": 40},
    "qwen2": {"arch": "qwen2"},
    "qwen3": {"arch": "qwen3"},
    "gemma2": {"arch": "gemma2", "num_layers": 3, "sliding_window": 40},
    "gemma3": {"arch": "gemma3", "num_layers": 3, "sliding_window_pattern": 3, "sliding_window": 40},
}


# Options, and how far they may take logprobs by the mean: about 1.5 times (fp8) and twice (int8) what they do on the
# device that is none. It finds scales and layouts that are wrong; the kernels' own cases look at digits.
EIGHT_BITS: dict[str, tuple[dict[str, Any], float]] = {
    "quantization_int8": ({"quantization": "int8"}, 0.13),
    "quantization_fp8": ({"quantization": "fp8"}, 0.65),
    "kv_cache_int8": ({"kv_cache_dtype": "int8"}, 0.05),
    "kv_cache_fp8": ({"kv_cache_dtype": "fp8"}, 0.27),
}


class Finding(NamedTuple):
    difference: float
    tolerance: float  # good if the difference is no larger


@dataclass
class Device:
    """Where the engine runs. One platform for all checks of a card; of the fake one, one a model."""

    name: str = "cuda"
    new_platform: Callable[[bool], Platform] = field(
        default=lambda batch_invariant: detect(DeviceConfig("cuda", batch_invariant))
    )
    dtype: str = "bfloat16"  # where bits are compared

    def loop(self, model: Path, *, batch_invariant: bool = False, **options: Any) -> Loop:
        options.setdefault("max_model_len", 512)
        return Loop(
            model, platform=self.new_platform(batch_invariant), batch_invariant=batch_invariant, **options
        )


def _model(directory: str, dtype: str = "float32", **shape: Any) -> Path:
    if _EXAMPLES not in sys.path:
        sys.path.insert(0, _EXAMPLES)
    from make_random_model import make_model

    return make_model(Path(directory), dtype=dtype, **{"arch": "qwen3", "seed": 3, **shape})


def _prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, 490, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]


def _mixed() -> list[SamplingParams]:
    kinds: list[dict[str, Any]] = [
        {"temperature": 0}, {"temperature": 0.9}, {"temperature": 0.8, "top_p": 0.9, "top_k": 40},
        {"temperature": 0.7, "repetition_penalty": 1.2, "bad_words_token_ids": [[3, 4]]},
        {"temperature": 0, "logprobs": 3, "logit_bias": {5: 1.5}},
        {"temperature": 1.1, "min_p": 0.05, "prompt_logprobs": 1},
    ]  # fmt: skip
    return [SamplingParams(max_tokens=16 + 3 * i, ignore_eos=True, **kind) for i, kind in enumerate(kinds)]


def _num_different(answers: list[Answer], expected: list[Answer]) -> float:
    """How many requests have other tokens or logprobs, to the bit."""
    return float(sum(ours != its for ours, its in zip(answers, expected, strict=True)))


# Checks ----------------------------------------------------------------------


def _beside_transformers(device: Device, shape: dict[str, Any], **options: Any) -> list[float]:
    """How far each logprob of greedy tokens is from transformers' in float32; and half of what its best token has above
    ours: two logprobs that are off by so much explain it."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as directory:
        path = _model(directory, **shape)
        where = "cuda" if device.name == "cuda" else "cpu"
        hf = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
            .to(where)
            .eval()
        )
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=3)
        off: list[float] = []
        for prompt, answer in zip(_prompts(), device.loop(path, **options).run(_prompts(), params)):
            assert answer.error is None and answer.tokens, answer
            with torch.inference_mode():
                logits = hf(torch.tensor([prompt + answer.tokens], device=where)).logits[0].float().cpu()
            expected = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            for row, token, found in zip(expected, answer.tokens, answer.logprobs):
                off += [abs(value - row[i].item()) for i, value in found.items()]
                off.append((row.max() - row[token]).item() / 2)
    return off


def parity(device: Device, shape: dict[str, Any]) -> Finding:
    """The same logprobs as transformers', but for rounding."""
    return Finding(max(_beside_transformers(device, shape)), 1e-3)


def eight_bits(device: Device, name: str) -> Finding:
    """Weights, or the cache, in eight bits: by the mean, close to what transformers makes of float32."""
    options, tolerance = EIGHT_BITS[name]
    return Finding(statistics.fmean(_beside_transformers(device, {"arch": "qwen3"}, **options)), tolerance)


def schedule_independence(device: Device) -> Finding:
    """With --batch-invariant: requests alone, and the same together, in chunks, preempted, ahead of their tokens."""
    with tempfile.TemporaryDirectory() as directory:
        path, prompts, params = _model(directory, device.dtype), _prompts(), _mixed()

        def loop(**options: Any) -> Loop:
            return device.loop(path, batch_invariant=True, **options)

        alone = loop(enable_prefix_caching=False)
        expected = [
            alone.run([prompt], [each], seeds=[i])[0] for i, (prompt, each) in enumerate(zip(prompts, params))
        ]
        different = 0.0
        for options in (
            {}, {"max_num_batched_tokens": 48}, {"plans_in_flight": 2}, {"enforce_eager": True},
            {"num_gpu_blocks_override": 10, "max_model_len": 256, "plans_in_flight": 2},
        ):  # fmt: skip
            different += _num_different(loop(**options).run(prompts, params, stagger=2), expected)
    return Finding(different, 0.0)


def graphs_against_eager(device: Device) -> Finding:
    """The same answers, to the bit, with captured decodes and without: the same kernels on the same rows."""
    with tempfile.TemporaryDirectory() as directory:
        path, prompts, params = _model(directory, device.dtype), _prompts(), _mixed()
        eager = device.loop(path, enforce_eager=True, batch_invariant=True).run(prompts, params)
        captured = device.loop(path, batch_invariant=True).run(prompts, params)
    return Finding(_num_different(captured, eager), 0.0)


def cuda_decode_against_triton(device: Device) -> Finding:
    """Logprobs of greedy tokens by captured decodes in CUDA C++, and how far those by Triton's are: by the mean, over
    the tokens both have. Infinite if the first were not what they are said to be."""
    with tempfile.TemporaryDirectory() as directory:
        path = _model(directory, "float16", head_dim=64, max_position_embeddings=8192)
        prompts = [*_prompts(), [i * 31 % 490 for i in range(1100)]]
        params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=3)
        answers = []
        for is_cuda in (True, False):
            loop = device.loop(path, cuda_decode_attention=is_cuda, max_model_len=4096)
            if device.name == "cuda" and is_cuda != loop.ready.numerics_id.endswith("cuda_decode"):
                return Finding(float("inf"), 0.0)
            answers.append(loop.run(prompts, params))
    off: list[float] = []
    for ours, its in zip(*answers, strict=True):
        for token, expected, found, values in zip(ours.tokens, its.tokens, ours.logprobs, its.logprobs):
            off += [abs(found[i] - values[i]) for i in found.keys() & values.keys()]
            if token != expected:
                break
    return Finding(statistics.fmean(off), 5e-3)


def sampling_as_on_the_host(device: Device) -> Finding:
    """Requests of every kind, of all logprobs modes: rows whose tokens, ranks or reasons to fail are not the host's, or
    whose logprobs are not within 1e-4."""
    platform, vocab_size, different = device.new_platform(False), 32003, 0
    for mode in sampling.MODES:
        requests = sampling.everybody(logprobs=4)
        host = sampling.OnHost(requests, mode, vocab_size)
        ours = sampling.OnDevice(
            requests, mode, vocab_size, platform, to_device=lambda tensor: tensor.to(platform.device)
        )
        different += sum(map(len, sampling.steps(host, ours, vocab_size, num_steps=6, tolerance=1e-4)))
    return Finding(float(different), 0.0)


def no_wait_in_a_step(device: Device) -> Finding:
    """1 if torch finds the host waiting for the device while a step is given to it; captures, once a shape, aside."""
    with tempfile.TemporaryDirectory() as directory:
        # Without a prefix cache the second run has the steps of the first.
        loop = device.loop(_model(directory, device.dtype), plans_in_flight=2, enable_prefix_caching=False)
        prompts, params = _prompts(), _mixed()
        loop.run(prompts, params)
        worker = loop.worker
        worker.execute_model = _unwaiting(worker.execute_model)
        worker.start_sampling = _unwaiting(worker.start_sampling)
        try:
            loop.run(prompts, params)
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            logger.warning("a step waits for the device", exc_info=error)
            return Finding(1.0, 0.0)
    return Finding(0.0, 0.0)


def _unwaiting(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same call, in which torch raises where it would wait for a card; a device that is none never waits."""
    if not torch.cuda.is_available():
        return call

    def called(*args: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return call(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return called


def memory_accounting(device: Device) -> Finding:
    """Bytes above --gpu-memory-utilization of what was free, after a busy run; a tenth of a percent is let pass.

    By what the driver has free, graphs and all that torch keeps for later included.
    """
    share = 0.3
    platform = device.new_platform(False)

    def free_bytes() -> int:
        return torch.cuda.mem_get_info()[0] if device.name == "cuda" else platform.memory_available_bytes()

    platform.release_unused()
    free = free_bytes()
    with tempfile.TemporaryDirectory() as directory:
        loop = device.loop(
            _model(directory, device.dtype),
            num_gpu_blocks_override=None,
            gpu_memory_utilization=share,
            max_num_seqs=64,
            checks_integrity=False,  # of millions of blocks
        )
        loop.run(_prompts() * 8, _mixed() * 8)
        used = max(0, free - free_bytes())
    return Finding(max(0.0, used - share * free), free / 1000)


def sleep(device: Device) -> Finding:
    """Answers before and after sleeping at each level, to the bit: weights come back, and graphs are captured anew."""
    with tempfile.TemporaryDirectory() as directory:
        loop = device.loop(_model(directory, device.dtype), batch_invariant=True, enable_prefix_caching=False)
        prompts, params = _prompts()[:3], _mixed()[:3]
        expected, different = loop.run(prompts, params), 0.0
        for level in (1, 2):
            loop.worker.sleep(level)
            loop.worker.wake_up()
            different += _num_different(loop.run(prompts, params), expected)
    return Finding(different, 0.0)


def server(device: Device) -> Finding:
    """A server of its own process: an answer streams, and is the one that comes whole."""
    from tests.e2e.server import Server

    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryDirectory() as run_dir:
        options = ["--max-model-len", "512", "--async-scheduling", "--device", device.name]
        running = Server(_model(directory), *options, run_dir=Path(run_dir))
        try:
            body = {
                "model": directory,
                "prompt": "one two three",
                "max_tokens": 20,
                "temperature": 0,
                "ignore_eos": True,
            }

            def post(**more: Any) -> str:
                request = urllib.request.Request(
                    f"{running.url}/v1/completions", json.dumps({**body, **more}).encode(),
                    {"Content-Type": "application/json"},
                )  # fmt: skip
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return answer.read().decode()

            whole = json.loads(post())["choices"][0]["text"]
            events = [line[6:] for line in post(stream=True).splitlines() if line.startswith("data: {")]
            streamed = "".join(json.loads(event)["choices"][0]["text"] for event in events)
        finally:
            running.stop()
    return Finding(float(not whole or whole != streamed), 0.0)


CHECKS: dict[str, Callable[[Device], Finding]] = {
    **{
        f"engine_parity_{name.replace(' ', '_')}": (lambda device, shape=shape: parity(device, shape))
        for name, shape in FAMILIES.items()
    },
    "engine_schedule_independence": schedule_independence,
    "engine_graphs_against_eager": graphs_against_eager,
    "engine_cuda_decode_against_triton": cuda_decode_against_triton,
    "engine_sampling_as_on_the_host": sampling_as_on_the_host,
    **{f"engine_{name}": partial(eight_bits, name=name) for name in EIGHT_BITS},
    "engine_no_wait_in_a_step": no_wait_in_a_step,
    "engine_sleep": sleep,
    "engine_memory_accounting": memory_accounting,
    "engine_server": server,
}
