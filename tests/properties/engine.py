"""A real worker with its kernels, a scheduler per schedule, and the requests whose answers must never change.

Answers are compared bit for bit: tokens, every logprob and rank, in their order.
"""

from __future__ import annotations

import random
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch

from minivllm.core.sched.scheduler import Scheduler
from minivllm.engine.plans_in_flight import PlansInFlight
from minivllm.messages.engine import EngineCoreOutput, EngineCoreRequest, LogprobsLists, PromptEmbeds
from minivllm.messages.worker import GrammarOutput, ModelRunnerOutput, SchedulerOutput
from minivllm.sampling_params import SamplingParams, ThinkingTokens
from minivllm.structured_output.grammar import to_grammar
from minivllm.structured_output.manager import GrammarManager
from minivllm.structured_output.vocabulary import Vocabulary
from minivllm.worker.worker import Worker
from tests.models.loop import BLOCK_SIZE, engine_config

VOCAB = 512
MOST_STEPS = 5000  # of one schedule

Row = tuple[list[int], list[float], int]  # token ids, their logprobs, the first one's rank

# By class name, as an operator gives them: one for those who ask, one for all.
PROCESSORS = [f"tests.sample.processors:{name}" for name in ("Follow", "Sharpen")]
# Most ask for the likeliest token alone: steps of theirs keep no logits, those with the others do.
GREEDY_PARAMS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0},
    {"temperature": 0, "logprobs": 2},
    {"temperature": 0},
    {"temperature": 0, "structured_outputs": {"regex": "[a-f]{4,30}[0-9]+"}},
    {"temperature": 0},
    {"temperature": 0.8},
]
# Every step of the sampler alone and together, with and without logprobs beside it.
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0, "logprobs": 3, "prompt_logprobs": 2},
    {"temperature": 0, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "logprobs": 0},
    {"temperature": 1, "logprobs": 5},
    {"temperature": 0.8, "top_k": 20, "logprobs": 2},
    {"temperature": 1.2, "top_p": 0.9, "logprobs": 1, "presence_penalty": 0.7},
    {"temperature": 0.9, "min_p": 0.05, "prompt_logprobs": 0},
    {
        "temperature": 0.7, "top_k": 100, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.1,
        "frequency_penalty": 0.3, "presence_penalty": -0.2, "logit_bias": {7: 3.0, 400: -2.0}, "min_tokens": 6,
        "stop_token_ids": list(range(0, VOCAB, 40)), "logprobs": 4, "prompt_logprobs": 3,
    },
    {"temperature": 1, "allowed_token_ids": list(range(100, 164)), "logprobs": -1},
    {"temperature": 0, "extra_args": {"follow": 3}, "logprobs": 1},
    {
        "temperature": 0.9, "extra_args": {"follow": 5},
        "bad_words_token_ids": [[i, j] for i in range(9) for j in range(60)],
    },
    {
        "temperature": 1, "logprob_token_ids": [1, 50, 99],
        "repetition_detection": {"max_pattern_size": 2, "min_count": 2},
    },
    {"temperature": 1.5, "structured_outputs": {"regex": "[a-f]{4,30}[0-9]+"}, "logprobs": 2, "presence_penalty": 0.5},
    {
        "temperature": 1.5, "min_tokens": 5, "logprobs": 1,
        "structured_outputs": {"json": {"type": "array", "items": {"enum": ["ab", 12, None]}, "minItems": 2}},
    },
    {
        "temperature": 1.5, "structured_outputs": {"choice": ["yes", "no", "perhaps"]}, "thinking_token_budget": 7,
        "thinking": ThinkingTokens([300], [301, 302], is_open=True), "logprobs": 0,
    },
]  # fmt: skip


@dataclass
class Answer:
    """All that came back for one request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Row] = field(default_factory=list)
    prompt_logprobs: list[Row] = field(default_factory=list)
    end: tuple[str, int | None, str | None] | None = None  # finish reason, stop token, error

    def take(self, output: EngineCoreOutput) -> None:
        assert self.end is None, f"{output.request_id} was answered after its end"
        self.token_ids += output.new_token_ids
        self.logprobs += _rows(output.new_logprobs)
        self.prompt_logprobs += _rows(output.new_prompt_logprobs)
        if output.finish_reason is not None:
            self.end = (str(output.finish_reason), output.stop_reason, output.error)

    def after(self, num_tokens: int) -> Answer:
        """What is left of it once so many tokens have been delivered."""
        return Answer(self.token_ids[num_tokens:], self.logprobs[num_tokens:], self.prompt_logprobs, self.end)

    def assert_begins(self, whole: Answer) -> None:
        """It was cut short, and up to there it is the whole one."""
        for column in ("token_ids", "logprobs", "prompt_logprobs"):
            part = getattr(self, column)
            assert part == getattr(whole, column)[: len(part)], column


def _rows(lists: LogprobsLists | None) -> list[Row]:
    return [] if lists is None else list(zip(lists.token_ids, lists.logprobs, lists.ranks))


class Engine:
    """One worker, whose cache is left dirty from one schedule to the next."""

    def __init__(
        self, model: Path, *, num_blocks: int = 256, logits_processors: list[str] = PROCESSORS, **options: Any
    ) -> None:
        config = engine_config(
            model,
            num_gpu_blocks_override=num_blocks,
            max_num_seqs=16,
            max_num_batched_tokens=2048,
            logits_processors=logits_processors,
            **options,
        )
        self.hidden_size = config.hf_config.hidden_size
        self.worker = Worker(config)
        self.grammars = GrammarManager(vocabulary(config.hf_config.vocab_size).for_llguidance)
        self.ready = self.worker.initialize(lambda phase: None)

    def scheduler(self, **changes: Any) -> Scheduler:
        """A fresh one over all of the cache, unless changed."""
        sizes = {
            "max_num_batched_tokens": self.ready.max_num_batched_tokens,
            "max_num_seqs": self.ready.max_num_seqs,
            "max_model_len": self.ready.max_model_len,
            "num_blocks": self.ready.num_blocks,
            "block_size": BLOCK_SIZE,
            "kv_cache_groups": self.ready.kv_cache_groups,
            "grammars": self.grammars,
        }
        return Scheduler(**sizes | changes)

    def alone(self, request: EngineCoreRequest, max_model_len: int) -> Answer:
        """The answer with nothing else in the batch, nothing cached and the prompt in one piece."""
        run = Run(self, self.scheduler(enable_prefix_caching=False, max_model_len=max_model_len))
        run.add(request)
        while run.is_busy:
            run.step()
        return run.answers[request.request_id]


class Run:
    """One schedule: a scheduler of its own and what it has answered. `num_in_flight` plans at most are made and
    executed before the first of them is accounted for.
    """

    def __init__(self, engine: Engine, scheduler: Scheduler, num_in_flight: int = 1) -> None:
        self.engine, self.scheduler = engine, scheduler
        self._in_flight = PlansInFlight(scheduler, self, num_in_flight)
        self.answers: dict[str, Answer] = {}
        self.num_steps = self.num_preemptions = self.num_cached_tokens = 0

    @property
    def is_busy(self) -> bool:
        return bool(self._in_flight) or self.scheduler.has_requests()

    def add(self, request: EngineCoreRequest) -> None:
        self.answers[request.request_id] = Answer()
        self.scheduler.add_request(request)

    def abort(self, *request_ids: str) -> None:
        self._take(self.scheduler.abort_requests(request_ids))

    def step(self, *, abort_meanwhile: tuple[str, ...] = ()) -> None:
        """Plan, and account for the oldest plan; `abort_meanwhile` are aborts that arrive while the worker computes."""
        assert self.num_steps < MOST_STEPS, f"no end: {sorted(self.scheduler.requests)}"
        self.num_steps += 1
        self._in_flight.fill()
        if not self._in_flight:
            return
        plan, outputs = self._in_flight.account_for_oldest(lambda: self.abort(*abort_meanwhile))
        self._take(outputs)
        self.num_preemptions += len(plan.preempted_req_ids)
        if not plan.num_scheduled_tokens:
            time.sleep(0.001)  # perhaps a grammar is being compiled
        self.scheduler.check_integrity()

    # As a Runner: the worker's work is done when it is asked for.

    def execute_model(self, plan: SchedulerOutput) -> Future[None]:
        return _done(self.engine.worker.execute_model(plan))

    def sample_tokens(self, grammar: GrammarOutput | None) -> Future[ModelRunnerOutput]:
        return _done(self.engine.worker.sample_tokens(grammar))

    def _take(self, outputs_by_client: dict[int, list[EngineCoreOutput]]) -> None:
        for outputs in outputs_by_client.values():
            for output in outputs:
                self.num_cached_tokens += output.num_cached_tokens
                self.answers[output.request_id].take(output)


def _done(result: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(result)
    return future


def vocabulary(vocab_size: int) -> Vocabulary:
    """Token i is byte i % 256, once for each 256: as good as any for models that know no text. The last one ends."""
    tokens = [bytes([i % 256]) * (i // 256 + 1) for i in range(vocab_size)]
    return Vocabulary(tokens, {}, [vocab_size - 1])


def make_subjects(
    lengths: list[int], *, max_tokens: int = 24, seed: int = 0, all_params: list[dict[str, Any]] = PARAMS
) -> list[EngineCoreRequest]:
    """Requests of so many prompt tokens: stems in common, all params in turn. The longest fills the context."""
    pick = random.Random(f"subjects {seed}")
    stems = [[pick.randrange(VOCAB) for _ in range(max(lengths))] for _ in range(2)]
    subjects = []
    for i, length in enumerate(lengths):
        num_shared = min(length, pick.choice([0, 32, 64, length - length // 8]))
        tail = [pick.randrange(VOCAB) for _ in range(length - num_shared)]
        params = all_params[i % len(all_params)]
        limit = None if length == max(lengths) else pick.randint(max_tokens // 2, max_tokens)
        sampling_params = SamplingParams(max_tokens=limit, **params)
        wanted = sampling_params.structured_outputs
        subjects.append(
            EngineCoreRequest(
                request_id=f"subject {i}",
                prompt_token_ids=pick.choice(stems)[:num_shared] + tail,
                sampling_params=sampling_params,
                seed=pick.randrange(2**64),
                eos_token_ids=[pick.randrange(VOCAB)],
                grammar=None if wanted is None else to_grammar(wanted, {}),
            )
        )
    return subjects


def in_vectors(request: EngineCoreRequest, table: torch.Tensor) -> EngineCoreRequest:
    """The same prompt as the vectors that its tokens have in a table of embeddings, [vocab_size, hidden_size]."""
    vectors = table[torch.tensor(request.prompt_token_ids)].contiguous()
    dtype, data = str(vectors.dtype).removeprefix("torch."), vectors.view(torch.uint8).numpy().tobytes()
    return msgspec.structs.replace(
        request,
        prompt_token_ids=[0] * len(vectors),
        prompt_embeds=PromptEmbeds(dtype, vectors.shape[1], data),
        sampling_params=request.sampling_params.clone(prompt_logprobs=None),
    )


def resend(request: EngineCoreRequest, request_id: str, prior: list[int]) -> EngineCoreRequest:
    """The same request under another name, with part of its answer delivered before."""
    return msgspec.structs.replace(request, request_id=request_id, prior_output_token_ids=prior)
