"""Whole steps of models with made-up weights: decode and prefill, through the worker as a server drives it.

Contexts are made up as well: a request begins at its last known token, its cache holding whatever is there. How long a
step takes does not depend on the numbers in the cache.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu.clock import Ceilings, Clock
from minivllm.config.cache import CacheConfig
from minivllm.config.device import DeviceConfig
from minivllm.config.engine import EngineConfig
from minivllm.config.hf_config import HFConfig
from minivllm.config.load import LoadConfig
from minivllm.config.model import ModelConfig
from minivllm.config.scheduler import SchedulerConfig
from minivllm.messages.worker import CachedRequestData, NewRequestData, SchedulerOutput
from minivllm.models.registry import ModelRegistry
from minivllm.platforms.platform import Platform
from minivllm.sampling_params import SamplingParams
from minivllm.worker.worker import Worker

_COMMON = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "max_position_embeddings": 131072, "torch_dtype": "bfloat16", "bos_token_id": 1,
    "eos_token_id": 2, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
SHAPES = {
    "1B": {**_COMMON, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
           "tie_word_embeddings": True},
    "8B": {**_COMMON, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128,
           "tie_word_embeddings": False},
}  # fmt: skip


OUT_OF_TIME = "not run: out of time"


class Row(NamedTuple):
    what: str
    rate: str  # tokens/s
    share: str  # of the roofline
    note: str


PLAIN = SamplingParams(temperature=0.8, max_tokens=10**6, ignore_eos=True)
ASKING = SamplingParams(
    temperature=0.8, repetition_penalty=1.1, presence_penalty=0.1, logit_bias={7: 1.0}, logprobs=5, max_tokens=10**6,
    ignore_eos=True,
)  # fmt: skip


class Model:
    def __init__(
        self, shape: dict, *, platform: Platform | None = None, device: str = "cuda", max_model_len: int = 16384,
        max_num_batched_tokens: int = 8192, batch_invariant: bool = False, cuda_decode: bool = True, **cache: int,
    ) -> None:  # fmt: skip
        begin = time.perf_counter()
        hf = HFConfig.from_dict(shape)
        with tempfile.TemporaryDirectory() as directory:
            (Path(directory) / "config.json").write_text(json.dumps(shape))
            config = EngineConfig(
                model=ModelConfig(model=directory, max_model_len=max_model_len),
                hf_config=hf,
                cache=CacheConfig(**cache),
                scheduler=SchedulerConfig(
                    max_num_seqs=256, max_num_batched_tokens=max_num_batched_tokens, async_scheduling=True
                ),
                load=LoadConfig(load_format="dummy"),
                device=DeviceConfig(device, batch_invariant, cuda_decode),
                model_class=ModelRegistry.target(hf.architecture),
            )
            self.worker = Worker(config, platform)
            self.ready = self.worker.initialize(lambda phase: None)
        self.hf = hf
        self._num_requests = 0
        self._step = 0
        model = self.worker.runner.model
        self.weight_bytes = sum(weight.num_bytes for weight in model.weights())
        embedding = hf.vocab_size * hf.hidden_size * 2
        self.read_bytes = self.weight_bytes - (0 if hf.tie_word_embeddings else embedding)
        self.kv_bytes_of_token = 2 * hf.num_hidden_layers * hf.num_key_value_heads * hf.head_dim * 2
        self.prefill(8, times=1)
        self.seconds_to_first_token = time.perf_counter() - begin

    def close(self) -> None:
        """Give the memory back; nothing may be asked of it any more."""
        import torch

        self.worker.shutdown()
        del self.worker
        gc.collect()
        torch.cuda.empty_cache()

    # Requests ----------------------------------------------------------------

    def requests(
        self, count: int, num_tokens: int, num_to_come: int, *, computed: int, params: SamplingParams = PLAIN
    ) -> list[NewRequestData]:
        """Requests in blocks of their own, with `computed` tokens in the cache."""
        blocks = -(-(num_tokens + num_to_come) // self.ready.block_size)
        if count * blocks > self.ready.num_blocks - 1:
            raise MemoryError(
                f"{count} requests of {num_tokens} tokens do not fit {self.ready.num_blocks} blocks"
            )
        made = []
        for i in range(count):
            self._num_requests += 1
            ids = list(range(1 + i * blocks, 1 + (i + 1) * blocks))
            prompt = [(7 * i + j) % (self.hf.vocab_size - 10) for j in range(num_tokens)]
            made.append(NewRequestData(f"r{self._num_requests}", prompt, [], params, i, [], [ids], computed))
        return made

    def _execute(self, plan: SchedulerOutput) -> object:
        self.worker.execute_model(plan)
        return (
            self.worker.start_sampling(None)
            if self.worker.is_asynchronous
            else self.worker.sample_tokens(None)
        )

    @staticmethod
    def _result(handle: object) -> None:
        if hasattr(handle, "result"):
            handle.result()

    def _finish(self, made: list[NewRequestData]) -> None:
        self._step += 1
        self._execute(SchedulerOutput(self._step, finished_req_ids=[request.request_id for request in made]))

    # Measurements ------------------------------------------------------------

    def capturing(self, name: str) -> Row:
        """What a capture holds up: a step that meets a new shape, or the start where all are made then."""
        runner = self.worker.runner
        *_, smallest = runner.capture_shapes
        begin = time.perf_counter()
        runner.capture(*smallest)
        seconds = (time.perf_counter() - begin) * len(runner.capture_shapes) / runner.most_captures
        note = f"{seconds * 1e3:.0f} ms; {runner.most_captures} at most"
        return Row(f"{name} capturing a decode step", "-", "-", note)

    def decode(
        self, batch: int, context: int, *, steps: int = 40, warm: int = 6, params: SamplingParams = PLAIN
    ) -> tuple[float, float]:
        """Seconds a step, and seconds of it that the host worked; two plans in flight, as a server has them."""
        made = self.requests(batch, context, steps + warm + 2, computed=context - 1, params=params)
        ids = [request.request_id for request in made]
        counts = dict.fromkeys(ids, 1)
        nothing: list = [[] for _ in ids]
        flying: deque = deque()
        host = begin = 0.0
        for i in range(steps + warm):
            self._step += 1
            if i == 0:
                plan = SchedulerOutput(
                    self._step, made, num_scheduled_tokens=counts, total_num_scheduled_tokens=batch
                )
            else:
                known = CachedRequestData(ids, nothing, [False] * batch, [context - 1 + i] * batch)
                plan = SchedulerOutput(
                    self._step, [], known, num_scheduled_tokens=counts, total_num_scheduled_tokens=batch
                )
            if i == warm:
                while flying:
                    self._result(flying.popleft())
                host, begin = 0.0, time.perf_counter()
            before = time.perf_counter()
            flying.append(self._execute(plan))
            host += time.perf_counter() - before
            if len(flying) == 2:
                self._result(flying.popleft())
        while flying:
            self._result(flying.popleft())
        elapsed = time.perf_counter() - begin
        self._finish(made)
        return elapsed / steps, host / steps

    def prefill(self, num_tokens: int, *, times: int = 5) -> float:
        """Seconds of one prompt that is one step."""
        spent = []
        for _ in range(times + 2):
            made = self.requests(1, num_tokens, 1, computed=0)
            self._step += 1
            plan = SchedulerOutput(
                self._step, made, num_scheduled_tokens={made[0].request_id: num_tokens},
                total_num_scheduled_tokens=num_tokens,
            )  # fmt: skip
            before = time.perf_counter()
            self._result(self._execute(plan))
            spent.append(time.perf_counter() - before)
            self._finish(made)
        return sorted(spent[2:])[times // 2]


def run(
    name: str, model: Model, ceilings: Ceilings, *, batches: tuple[int, ...], contexts: tuple[int, ...],
    prompts: tuple[int, ...], steps: int = 40, asking: tuple[int, ...] = (64,),
    is_time_left: Callable[[], bool] = lambda: True,
) -> Iterator[Row]:  # fmt: skip
    """A row as soon as it is measured; those that would begin when no time is left say so.

    asking: batches that are also measured with penalties, a bias and logprobs in every request.
    """
    hf = model.hf
    if model.worker.runner.capture_shapes is not None:
        yield model.capturing(name)
    for context in contexts:
        for batch, params in [(batch, PLAIN) for batch in batches] + [(batch, ASKING) for batch in asking]:
            what = f"{name} decode, batch {batch}, context {context:,}"
            if params is ASKING:
                what += ", penalties, bias and logprobs"
            if not is_time_left():
                yield Row(what, "-", "-", OUT_OF_TIME)
                continue
            try:
                seconds, host = model.decode(batch, context, steps=steps, params=params)
            except MemoryError as error:
                yield Row(what, "-", "-", str(error))
                continue
            floor = (model.read_bytes + batch * context * model.kv_bytes_of_token) / ceilings.bandwidth
            # (a large batch is bound by its products as well)
            floor = max(floor, 2 * batch * model.read_bytes / 2 / ceilings.flops)
            is_hidden = "hidden" if host < seconds else "NOT hidden"
            note = f"{seconds * 1e3:.2f} ms a step, host {host * 1e6:.0f} us ({is_hidden})"
            yield Row(what, f"{batch / seconds:,.0f}", f"{floor / seconds:.0%}", note)
    for num_tokens in prompts:
        if not is_time_left():
            yield Row(f"{name} prefill of {num_tokens:,}", "-", "-", OUT_OF_TIME)
            continue
        seconds = model.prefill(num_tokens)
        products = 2 * model.read_bytes / 2 * num_tokens
        attention = 4 * hf.num_hidden_layers * hf.num_attention_heads * hf.head_dim * num_tokens**2 / 2
        floor = (products + attention) / ceilings.flops
        yield Row(
            f"{name} prefill of {num_tokens:,}", f"{num_tokens / seconds:,.0f}", f"{floor / seconds:.0%}",
            f"{seconds * 1e3:.1f} ms",
        )  # fmt: skip


def price_of_invariance(
    name: str, make: Callable[..., Model], *, batches: tuple[int, ...] = (1, 64), context: int = 1024,
    num_tokens: int = 2048, steps: int = 40,
) -> Iterator[Row]:  # fmt: skip
    """A model's steps with --batch-invariant beside the same without: `make(batch_invariant=…)` makes either."""

    def measure(batch_invariant: bool) -> dict[str, tuple[int, float]]:
        """Of each kind of step, its tokens and seconds."""
        model = make(batch_invariant=batch_invariant)
        seconds = {
            f"decode, batch {batch}, context {context:,}": (batch, model.decode(batch, context, steps=steps)[0])
            for batch in batches
        }
        seconds[f"prefill of {num_tokens:,}"] = num_tokens, model.prefill(num_tokens)
        model.close()
        return seconds

    plain = measure(False)
    for what, (tokens, seconds) in measure(True).items():
        without = plain[what][1]
        note = f"{seconds * 1e3:.2f} ms, {seconds / without:.2f} × the {without * 1e3:.2f} ms without"
        yield Row(f"{name} batch invariant {what}", f"{tokens / seconds:,.0f}", "-", note)


def gain_of_cuda_decode(
    name: str, make: Callable[..., Model], *,
    sizes: tuple[tuple[int, int], ...] = ((1, 512), (64, 512), (64, 2048), (8, 8192)), steps: int = 40,
) -> Iterator[Row]:  # fmt: skip
    """A model's captured decodes with attention in CUDA C++ beside Triton's: `make(cuda_decode=…)` makes either.

    sizes: of requests, and tokens of each.
    """
    seconds: dict[bool, list[float]] = {}
    for is_cuda in (False, True):
        model = make(cuda_decode=is_cuda)
        seconds[is_cuda] = [model.decode(batch, context, steps=steps)[0] for batch, context in sizes]
        model.close()
    for (batch, context), triton, ours in zip(sizes, seconds[False], seconds[True], strict=True):
        note = f"{ours * 1e3:.2f} ms, {ours / triton:.2f} × the {triton * 1e3:.2f} ms by Triton"
        what = f"{name} decode in CUDA C++, batch {batch}, context {context:,}"
        yield Row(what, f"{batch / ours:,.0f}", "-", note)


def sampling(vocab_size: int, batch: int, device: str, clock: Clock) -> list[Row]:
    """The device's part of choosing tokens, beside what must be read: the logits."""
    import torch

    from minivllm.ops.bitmask import apply_bitmask
    from minivllm.ops.op import OpSpec
    from minivllm.ops.penalties import apply_penalties
    from minivllm.ops.sampling import gumbel_argmax, top_k_top_p_min_p
    from minivllm.ops.scaling import soft_cap
    from minivllm.sample.logprobs import LogprobsReader

    spec = OpSpec(device, torch.float32, {"vocab_size": vocab_size})
    choose, truncate = gumbel_argmax.select(spec), top_k_top_p_min_p.select(spec)
    logits = torch.randn(batch, vocab_size, device=device)
    temperature, top_p = (torch.full((batch,), value, device=device) for value in (0.8, 0.9))
    top_k, min_p = (
        torch.full((batch,), 50, dtype=torch.int32, device=device),
        torch.zeros(batch, device=device),
    )
    seeds, positions = (torch.arange(batch, device=device) for _ in range(2))
    counts = torch.zeros(batch, vocab_size, dtype=torch.int32, device=device)
    penalise, read = apply_penalties.select(spec), LogprobsReader(spec)
    mask, cap = apply_bitmask.select(spec), soft_cap.select(spec)
    bits = torch.full((batch, -(-vocab_size // 32)), -1, dtype=torch.int32, device=device)  # all are allowed
    rows = []
    for what, work in (
        ("noise and argmax", lambda: choose(logits, temperature, seeds, positions)),
        ("top-k, top-p, min-p", lambda: truncate(logits.clone(), top_k, top_p, min_p)),
        ("penalties", lambda: penalise(logits, counts, positions, top_p, min_p, min_p)),
        ("logprobs of 1 and of the 5 likeliest", lambda: read(logits, positions, 5)),
        ("masks of bits", lambda: mask(logits, positions, bits)),
        ("soft cap", lambda: cap(logits, 30.0)),
    ):
        seconds = clock.seconds(work)
        note = f"{seconds * 1e6:.0f} us, {logits.nbytes / seconds / 1e9:,.0f} GB/s of logits"
        rows.append(Row(f"sampling, {batch} rows: {what}", "-", "-", note))
    return rows
