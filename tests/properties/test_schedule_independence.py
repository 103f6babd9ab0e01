"""Any schedule gives the answer of the request alone, to the last bit of every logprob.

Seeded random schedules on the real worker with the native kernels: arrivals, chunk and batch sizes, pools so
tight that requests are preempted, prefixes found in the cache, aborts of others, resends, one and two threads, one
plan in flight or several, priorities and every rule of the scheduler drawn at random, logits processors of an
operator's own; some requests have a grammar, some think first, some prompts are vectors. For every instruction set this
machine has, every dtype, int8 and int4 weights, fp8 and int8 caches, and shapes with grouped heads, windows, windows
beside full attention and several attention segments. `--walk-steps` is the number of engine steps, all cases together.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from make_random_model import make_model

from minivllm.messages.engine import EngineCoreRequest
from minivllm.messages.kv_cache import blocks_of_request, has_null_block
from minivllm.models.decoder import DecoderForCausalLM
from minivllm.ops import native
from minivllm.ops.op import OpSpec
from tests.core.requests import drawn_rules
from tests.properties.engine import (
    GREEDY_PARAMS,
    PARAMS,
    PROCESSORS,
    VOCAB,
    Answer,
    Engine,
    Run,
    in_vectors,
    make_subjects,
    resend,
)

UNAVAILABLE = native.why_not(OpSpec("cpu", torch.float32))
pytestmark = [pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE)), pytest.mark.timeout(0)]

SUPPORTED = native.lib.supported_isas() if native.lib is not None else []
ISAS = [isa for isa in SUPPORTED if isa not in ("avx512_vnni", "avx512_bf16")]  # these differ by linear layers only
DTYPES = ["float32", "bfloat16", "float16"]
# Many end shortly before a block does: they soon need one more, and the pool may have none.
SHORT = [5, 31, 62, 95, 126, 64, 30, 180, 12, 94, 61, 2, 127, 158, 33, 28]
# model, lengths of the prompts, token budgets; sizes that split over threads, and sizes that fill no tile
SHAPES = {
    "grouped heads": (
        {"arch": "qwen3", "hidden_size": 256, "intermediate_size": 704, "num_heads": 8, "head_dim": 64},
        SHORT,
        [3, 19, 64, 64, 150, 700],
    ),
    "a window and biases": (
        {
            "arch": "qwen2",
            "sliding_window": 40,
            "hidden_size": 80,
            "intermediate_size": 208,
            "vocab_size": 3001,
        },
        SHORT,
        [7, 32, 50, 100, 333, 2048],
    ),
    "windows and full layers": (
        {"arch": "gemma3", "num_layers": 5, "sliding_window_pattern": 3, "sliding_window": 40, "head_dim": 32},
        # None much longer than the rest: the least pool is hardly enough for two, so what a window lets go of is taken.
        [94, 126, 61, 127, 95, 64, 125, 93, 62, 30, 5, 126],
        [17, 17, 40, 40, 150, 700],
    ),
    "long prompts": (
        {"arch": "llama3", "head_dim": 32, "num_kv_heads": 1, "tie_word_embeddings": False},
        [1030, 30, 1090, 1024, 62, 990, 31, 5, 94, 63],
        [150, 512, 1025, 2048],
    ),
    "soft caps": (
        {"arch": "gemma2", "num_layers": 2, "sliding_window": 40, "vocab_size": 3001},
        SHORT,
        [19, 64, 150, 700],
    ),
}
CASES = [(shape, dtype, isa, "auto") for shape in SHAPES if shape != "soft caps" for dtype in DTYPES for isa in ISAS]
CASES += [("soft caps", "bfloat16", isa, "auto") for isa in ISAS]
CASES += [("grouped heads", "bfloat16", isa, kv_dtype) for isa in ISAS for kv_dtype in ("fp8", "int8")]
CASES += [("long prompts", "bfloat16", "amx", "int8"), ("a window and biases", "float32", "avx512", "int8")]
CASES += [(shape, "int8", isa, "auto") for shape in ("grouped heads", "a window and biases") for isa in ISAS]
CASES += [("a window and biases", "int4", isa, "auto") for isa in ISAS]
CASES += [("grouped heads", "bfloat16", "avx512_bf16", "auto"), ("a window and biases", "int8", "avx512_vnni", "auto")]
CASES = [case for case in CASES if case[2] in SUPPORTED]
GREEDY_SHAPES = ("grouped heads", "a window and biases")  # the second's vocabulary fills no tile
GREEDY_CASES = [case for case in CASES if case[0] in GREEDY_SHAPES and case[1] != "float16" and case[3] == "auto"]
MAX_TOKENS = 24
LEAST_SCHEDULES = 8  # of each case, so hundreds in all


@pytest.fixture
def num_steps(walk_steps: int) -> int:
    return max(walk_steps // len(CASES), 100)


@pytest.fixture
def processors() -> list[str]:
    return PROCESSORS


@pytest.fixture
def engine(case: tuple[str, str, str, str], processors: list[str], tmp_path: Path) -> Iterator[Engine]:
    """The engine of a case; its instruction set is in use for the length of the test."""
    shape, dtype, isa, kv_dtype = case
    isa_before, threads_before = native.lib.isa(), native.lib.num_threads()
    native.lib.set_isa(isa)
    quantization = dtype if dtype.startswith("int") else None
    model = make_model(tmp_path, dtype="bfloat16" if quantization else dtype, seed=3, **SHAPES[shape][0])
    yield Engine(model, quantization=quantization, kv_cache_dtype=kv_dtype, logits_processors=processors)
    native.lib.set_isa(isa_before)
    native.lib.set_num_threads(threads_before)


class Walk:
    """Schedule after schedule on one engine."""

    def __init__(
        self, engine: Engine, case: tuple[str, str, str, str], all_params: list[dict[str, Any]] = PARAMS
    ) -> None:
        _, lengths, self.budgets = SHAPES[case[0]]
        self.engine = engine
        self.random = random.Random(f"walk {case}")
        seed = CASES.index(case)
        self.subjects = make_subjects(lengths, max_tokens=MAX_TOKENS, seed=seed, all_params=all_params)
        # Some are given as vectors, of a table that no token's are from: with prefixes in common all the same.
        table = torch.randn(VOCAB, engine.hidden_size, generator=torch.Generator().manual_seed(1)) / 8
        self.subjects[3::5] = [in_vectors(subject, table) for subject in self.subjects[3::5]]
        self.max_model_len = max(lengths) + MAX_TOKENS
        self.num_steps = self.num_schedules = self.num_preemptions = self.num_cached_tokens = 0
        native.lib.set_num_threads(1)
        self.alone = [engine.alone(subject, self.max_model_len) for subject in self.subjects]

    def schedule(self) -> None:
        """One random schedule from its first arrival to its last answer."""
        pick = self.random
        native.lib.set_num_threads(pick.choice([1, 2]))
        num_in_flight = pick.choice([1, 2, 2, 3])
        run = Run(self.engine, self._scheduler(num_in_flight), num_in_flight)
        expected: dict[str, Answer] = {}
        aborted: set[str] = set()
        num_requests = pick.randint(3, 9)
        pace = pick.choice([0.2, 0.6, 1.0])  # chance of an arrival before each step
        while run.is_busy or len(expected) < num_requests:
            while len(expected) < num_requests and pick.random() < pace:
                self._arrive(run, expected)
            meanwhile = self._abort_some(run, aborted)
            run.step(abort_meanwhile=meanwhile)
        self._check(run, expected, aborted)
        self.num_schedules += 1
        self.num_steps += run.num_steps
        self.num_preemptions += run.num_preemptions
        self.num_cached_tokens += run.num_cached_tokens

    def _scheduler(self, num_in_flight: int):
        pick = self.random
        budget = pick.choice(self.budgets)
        groups = self.engine.ready.kv_cache_groups
        least = blocks_of_request(groups, self.max_model_len, budget * num_in_flight, 32) + has_null_block(groups)
        max_num_seqs = min(budget, pick.choice([1, 3, 8, 16, 16]))
        return self.engine.scheduler(
            **drawn_rules(pick, max_num_seqs),
            max_num_batched_tokens=budget,
            max_plans_in_flight=num_in_flight,
            max_num_seqs=max_num_seqs,
            max_model_len=self.max_model_len,
            num_blocks=pick.choice([least, least, least + 1, least + 2, self.engine.ready.num_blocks]),
            enable_prefix_caching=pick.random() < 0.8,
            enable_chunked_prefill=budget < self.max_model_len or pick.random() < 0.5,
        )

    def _arrive(self, run: Run, expected: dict[str, Answer]) -> None:
        which = self.random.randrange(len(self.subjects))
        subject, whole = self.subjects[which], self.alone[which]
        num_prior = self.random.randrange(len(whole.token_ids)) if self.random.random() < 0.15 else 0
        request = resend(subject, f"{len(expected)}: subject {which}", whole.token_ids[:num_prior])
        request.priority, request.arrival_time = self.random.randrange(-2, 3), self.random.random()
        run.add(request)
        expected[request.request_id] = whole.after(num_prior)

    def _abort_some(self, run: Run, aborted: set[str]) -> tuple[str, ...]:
        """Now, or (returned) while the next step runs."""
        alive = list(run.scheduler.requests)
        if not alive or self.random.random() > 0.06:
            return ()
        victim = self.random.choice(alive)
        aborted.add(victim)
        if self.random.random() < 0.5:
            return (victim,)
        run.abort(victim)
        return ()

    @staticmethod
    def _check(run: Run, expected: dict[str, Answer], aborted: set[str]) -> None:
        for request_id, answer in run.answers.items():
            assert answer.end is not None, f"{request_id} was never answered"
            if request_id in aborted and answer.end[0] == "abort":
                answer.assert_begins(expected[request_id])
            else:
                assert answer == expected[request_id], request_id


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(case).replace(" ", "-"))
def test_any_schedule_gives_the_answer_of_the_request_alone(case, engine: Engine, num_steps: int):
    walk = Walk(engine, case)
    while walk.num_steps < num_steps or walk.num_schedules < LEAST_SCHEDULES:
        walk.schedule()
    print(
        f"{walk.num_schedules} schedules, {walk.num_steps} steps, {walk.num_preemptions} preemptions, "
        f"{walk.num_cached_tokens} tokens found in the cache"
    )
    if num_steps >= 700:  # else a walk may be too short to meet both
        assert walk.num_preemptions and walk.num_cached_tokens


@pytest.mark.parametrize("processors", [[]], ids=["no-processors"])
@pytest.mark.parametrize("case", GREEDY_CASES, ids=lambda case: " ".join(case).replace(" ", "-"))
def test_tokens_chosen_without_logits_are_those_that_logits_give_alone(
    case, engine: Engine, num_steps: int, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        patch.setattr(DecoderForCausalLM, "can_choose", False)
        walk = Walk(engine, case, GREEDY_PARAMS)
    num_chosen, likeliest = 0, DecoderForCausalLM.likeliest

    def counted(*args):
        nonlocal num_chosen
        num_chosen += 1
        return likeliest(*args)

    monkeypatch.setattr(DecoderForCausalLM, "likeliest", counted)
    while walk.num_steps < num_steps or walk.num_schedules < LEAST_SCHEDULES:
        walk.schedule()
    assert num_chosen > 10


@pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))
def test_the_subjects_end_in_every_way_and_say_different_things(tmp_path: Path):
    """Else the walks would show little."""
    engine = Engine(make_model(tmp_path, dtype="bfloat16", seed=3))
    subjects: list[EngineCoreRequest] = make_subjects(SHORT, max_tokens=MAX_TOKENS)
    answers = [engine.alone(subject, max(SHORT) + MAX_TOKENS) for subject in subjects]
    assert {answer.end[0] for answer in answers} >= {"length", "stop"}
    constrained = [answer.end[0] for subject, answer in zip(subjects, answers) if subject.grammar is not None]
    assert "stop" in constrained and "error" not in constrained
    assert all(len(set(answer.token_ids)) > 3 for answer in answers)
