"""The operator's logits processors: what they are told of the batch, what they change, and how far a fault goes."""

from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from minivllm.exceptions import ConfigError, RequestError
from minivllm.logits_processors import check_names, load_logits_processors, name_of
from minivllm.ops.sampling import gumbel_noise
from minivllm.sample.custom import CustomProcessors
from minivllm.sample.sampler import Sampler
from minivllm.sample.step import SampleBatch
from minivllm.sampling_params import SamplingParams
from tests.sample.processors import Broken, NthToken, Sharpen, Tracking

HERE = "tests.sample.processors"
VOCAB = 50
INF = float("inf")


class Watched(Tracking):
    """Checks in every step that it was told the truth; the logits' first column names the request."""

    truth: dict[int, tuple[SamplingParams, list[int], list[int]]] = {}

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        assert len(logits) == len(self.requests)
        for index, (params, prompt, output) in self.requests.items():
            assert (params, prompt, output) == self.truth[int(logits[index, 0])]
        return logits + 1


def test_processors_see_every_request_at_its_index_through_any_arrivals_and_leavings():
    draw = random.Random(3)
    custom = CustomProcessors(lambda: [Watched(None, torch.device("cpu"), False)])
    tokens = np.zeros((12, 40), np.int32)
    alive: dict[int, tuple[SamplingParams, int, int]] = {}  # row -> params, prompt tokens, tokens
    for step in range(600):
        for row in draw.sample(sorted(alive), min(len(alive), draw.choice([0, 0, 1, 3]))):
            del alive[row]
            custom.remove_request(row)
        free = sorted(set(range(12)) - alive.keys())
        for row in draw.sample(free, min(len(free), draw.choice([0, 0, 1, 4]))):
            num_prompt = draw.randint(1, 5)
            tokens[row] = [draw.randrange(VOCAB) for _ in range(40)]
            alive[row] = (SamplingParams(seed=step), num_prompt, num_prompt + draw.choice([0, 0, 3]))
            custom.add_request(row, alive[row][0], [])
        rows = draw.sample(sorted(alive), draw.randint(0, len(alive)))  # the others get no token in this step
        if not rows:
            continue
        num_prompt = np.array([alive[row][1] for row in rows])
        num_tokens = np.array([alive[row][2] for row in rows])
        Watched.truth = {
            row: (params, tokens[row, :begin].tolist(), tokens[row, begin:end].tolist())
            for row, (params, begin, end) in alive.items()
        }
        logits = torch.zeros(len(rows), VOCAB)
        logits[:, 0] = torch.tensor(rows)
        expected = logits + 1
        assert custom.apply(logits, SampleBatch(np.array(rows), num_tokens, num_prompt, tokens)) is None
        assert torch.equal(logits, expected)
        for row in rows:
            alive[row] = (*alive[row][:2], min(alive[row][2] + 1, 40))


def sampler_with(*classes) -> Sampler:
    custom = CustomProcessors(lambda: [each(None, torch.device("cpu"), False) for each in classes])
    return Sampler(VOCAB, "processed_logits", custom=custom)


def run(sampler: Sampler, logits: torch.Tensor, *params: SamplingParams):
    for row, each in enumerate(params):
        sampler.add_request(row, each, row, [])
    count = len(params)
    tokens = np.full((count, 8), 7, np.int32)
    return sampler(logits.clone(), SampleBatch(np.arange(count), np.full(count, 4), np.full(count, 3), tokens))


def random_logits(num_rows: int) -> torch.Tensor:
    return 3 * torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(5))


def test_a_processor_comes_after_the_bias_and_before_the_penalties():
    forced = SamplingParams(
        temperature=0, logit_bias={9: 100}, presence_penalty=2, logprobs=-1, extra_args={"tokens": [9, 7]}
    )
    plain = SamplingParams(temperature=0)
    logits = random_logits(2)
    output = run(sampler_with(NthToken), logits, forced, plain)
    assert output.token_ids.tolist() == [7, logits[1].argmax()]  # one output token so far, which is a 7
    assert dict(zip(output.logprobs[0].token_ids[0], output.logprobs[0].logprobs[0]))[7] == -2.0


def test_one_that_keeps_the_argmax_comes_after_the_temperature_and_spares_the_greedy():
    logits = random_logits(2)
    sampled = SamplingParams(temperature=0.8, logprobs=-1)
    output = run(sampler_with(Sharpen), logits, sampled, SamplingParams(temperature=0, logprobs=0))
    noise = gumbel_noise(torch.tensor([0]), torch.tensor([4]), VOCAB)[0]
    assert output.token_ids[0] == (2 * (logits[0] / 0.8) + noise).argmax()
    assert output.logprobs[1].logprobs == [[logits[1].max().item()]]
    top = dict(zip(output.logprobs[0].token_ids[0], output.logprobs[0].logprobs[0]))
    assert [top[i] for i in range(VOCAB)] == pytest.approx((2 * logits[0] / 0.8).tolist(), rel=1e-6)


def test_one_that_raises_fails_the_requests_of_its_step_and_no_later_one():
    sampler = sampler_with(Broken, Sharpen)
    logits = random_logits(2)
    healthy = SamplingParams()
    broken = run(sampler, logits, healthy, SamplingParams(extra_args={"break": True}))
    assert set(broken.failed) == {0, 1} and "ZeroDivisionError: as asked" in broken.failed[0]
    sampler.remove_request(1)
    again = run(sampler, logits[:1], healthy)
    assert again.failed == {}
    assert again.token_ids.tolist() == run(sampler_with(Broken, Sharpen), logits[:1], healthy).token_ids.tolist()


def test_the_processor_of_the_documentation_works():
    page = (Path(__file__).parents[2] / "docs" / "sampling.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    names: dict = {}
    exec(block, names)
    even = SamplingParams(extra_args={"even": True})
    logits = torch.zeros(40, VOCAB)
    tokens = run(sampler_with(names["OnlyEven"]), logits, *[even, SamplingParams()] * 20).token_ids.tolist()
    assert all(token % 2 == 0 for token in tokens[::2]) and any(token % 2 for token in tokens[1::2])


class Cut(Tracking):
    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits[:, :-1]


def test_logits_of_another_shape_are_a_fault():
    assert "[1, 49]" in run(sampler_with(Cut), random_logits(1), SamplingParams()).failed[0]


class Nothing(Tracking):
    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.fill_(-float("inf"))


def test_one_that_leaves_no_token_is_not_the_requests_fault():
    sampler, torn = sampler_with(Nothing), SamplingParams(allowed_token_ids=[4], bad_words_token_ids=[[4]])
    output = run(sampler, random_logits(2), SamplingParams(allowed_token_ids=[4]), torn)
    assert "logits processor" in output.failed[0]
    assert output.failed[1].startswith("allowed_token_ids and bad_words")
    assert output.fields_at_fault == {1: "allowed_token_ids"}


@pytest.mark.parametrize(
    ("name", "says"),
    [("nowhere:X", "nowhere"), ("no_colon", "module:Class"), ("__main__:X", "module:Class"), (":X", "module:Class")],
)
def test_a_name_that_cannot_be_found_is_refused_before_anything_starts(name: str, says: str):
    with pytest.raises(ConfigError, match=says):
        check_names([name])


def test_a_class_is_found_by_its_name_and_must_be_a_processor():
    assert load_logits_processors([name_of(NthToken)]) == [NthToken]
    with pytest.raises(ConfigError, match="no subclass"):
        load_logits_processors([f"{HERE}:NoProcessor"])
    with pytest.raises(ConfigError, match="AttributeError"):
        load_logits_processors([f"{HERE}:Missing"])
    with pytest.raises(ConfigError, match="importable|imported"):
        name_of(type("Local", (Tracking,), {"__module__": "__main__"}))


@pytest.mark.parametrize("in_process", [True, False])
def test_llm_runs_a_class_given_as_such_or_by_name(tiny_model: Path, in_process: bool):
    from minivllm import LLM

    llm = LLM(
        str(tiny_model), max_model_len=256, kv_cache_memory_bytes=16 << 20, max_num_batched_tokens=64, max_num_seqs=8,
        logits_processors=[NthToken if in_process else f"{HERE}:NthToken"],
        disable_frontend_multiprocessing=in_process,
    )  # fmt: skip
    with llm:
        answers = [[100 + i, 30 + i, 40 + i] for i in range(20)]  # more than run at once, prompts in several chunks
        params = [
            SamplingParams(max_tokens=2 + i % 7, extra_args={"tokens": tokens}, seed=i, ignore_eos=True)
            for i, tokens in enumerate(answers)
        ]
        prompts = [[5] * (1 + 13 * (i % 8)) for i in range(20)]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        for i, output in enumerate(outputs):
            expected = (answers[i] + [answers[i][-1]] * 10)[: 2 + i % 7]
            assert output.outputs[0].token_ids == expected
        with pytest.raises(RequestError, match="NthToken: tokens must be a list") as refused:
            llm.generate([[1]], SamplingParams(extra_args={"tokens": 3}), use_tqdm=False)
        assert refused.value.param == "extra_args"
