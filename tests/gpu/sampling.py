"""Sampling on a device beside sampling on the host, of the same logits, whatever each request asks for."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from minivllm.messages.engine import LogprobsLists
from minivllm.platforms.platform import Platform
from minivllm.sample.sampler import Sampler, SamplerOutput
from minivllm.sample.step import GrammarMask, SampleBatch
from minivllm.sampling_params import SamplingParams, StructuredOutputsParams, ThinkingTokens
from minivllm.worker.buffers import Staging
from minivllm.worker.device_sampling import DeviceSampling
from minivllm.worker.request_state import RequestTable

MODES = ("raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits")
MARKS = ThinkingTokens([10], [20, 21], is_open=True)
EOS = [9]
ASKED: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.3},
    {"temperature": 0.9, "top_p": 0.8, "min_p": 0.01, "top_k": 20},
    {"temperature": 0, "repetition_penalty": 1.5},
    {"frequency_penalty": 0.5, "presence_penalty": -0.3, "logit_bias": {3: 2.0, 1 << 30: 1.0}},
    {"allowed_token_ids": [1, 2, 3, 4, 96]},
    {"min_tokens": 9, "stop_token_ids": [6]},
    {"bad_words_token_ids": [[3, 8, 8, 6], [8, 7], [5]], "repetition_penalty": 0.8},
    {"bad_words_token_ids": [[8, 7]], "temperature": 0},
    {"logprob_token_ids": [1, 5, 9, 13]},
    {"thinking_token_budget": 4, "thinking": MARKS},
    {"thinking_token_budget": 2, "thinking": MARKS},
    {"structured_outputs": StructuredOutputsParams(regex="x")},
    {"structured_outputs": StructuredOutputsParams(regex="y"), "allowed_token_ids": [*range(20, 60)], "top_k": 2},
]
WITH_GRAMMAR = (12, 13)
NUM_ROWS = 64  # of the table


def everybody(**more: Any) -> list[SamplingParams]:
    """A request of each kind."""
    return [SamplingParams(max_tokens=None, **each, **more) for each in ASKED]


def masks(columns: Sequence[int], vocab_size: int, seed: int = 0) -> GrammarMask:
    """What grammars may say of these columns: half of all tokens, by chance."""
    shape = (len(columns), -(-vocab_size // 32) + 1)
    return GrammarMask(np.array(columns), np.random.default_rng(seed).integers(0, 1 << 32, shape, dtype=np.uint32))


class OnHost:
    """A sampler with these requests in rows of a table, on the CPU."""

    def __init__(self, requests: list[SamplingParams], mode: str, vocab_size: int) -> None:
        self.rows = np.array([(5 * i + 2) % NUM_ROWS for i in range(len(requests))])
        self.sampler = Sampler(vocab_size, mode)
        for i, (row, params) in enumerate(zip(self.rows.tolist(), requests)):
            self.sampler.add_request(row, params, i, EOS)

    def batch(self, tokens: list[list[int]], num_prompt: int) -> SampleBatch:
        table = np.zeros((NUM_ROWS, 64), np.int32)
        for row, own in zip(self.rows, tokens):
            table[row, : len(own)] = own
        lengths = np.array([len(own) for own in tokens])
        return SampleBatch(self.rows, lengths, np.full(len(tokens), num_prompt), table)

    def sample(
        self, logits: torch.Tensor, tokens: list[list[int]], num_prompt: int, grammar: GrammarMask | None = None
    ) -> SamplerOutput:
        """logits: on the CPU; tokens: all of each request's, of which the first `num_prompt` are its prompt."""
        return self.sampler(logits.clone(), self.batch(tokens, num_prompt), grammar)


class OnDevice(OnHost):
    """The same on a device; the host does not know the last token of anybody."""

    def __init__(
        self,
        requests: list[SamplingParams],
        mode: str,
        vocab_size: int,
        platform: Platform,
        *,
        to_device: Callable[[torch.Tensor], torch.Tensor],
        max_num_rows: int = 32,
    ) -> None:
        super().__init__(requests, mode, vocab_size)
        self._to_device, self._staging = to_device, Staging(platform)
        self.sampling = DeviceSampling(self.sampler, platform, self._staging, vocab_size, max_num_rows)
        self.sampling._last = to_device(self.sampling._last)

    @torch.inference_mode()
    def sample(
        self, logits: torch.Tensor, tokens: list[list[int]], num_prompt: int, grammar: GrammarMask | None = None
    ) -> SamplerOutput:
        batch, sampling = self.batch(tokens, num_prompt), self.sampling
        for row, length in zip(batch.rows, batch.num_tokens):
            batch.token_ids[row, length - 1] = 55
        given, last_ids = self._to_device(logits.clone()), self._to_device(torch.tensor([own[-1] for own in tokens]))
        self._staging.begin()
        inputs = sampling.inputs(batch.rows, batch.num_tokens, len(tokens))
        drawn = sampling.draw(given, inputs)
        self._staging.end()
        pending = sampling.sample(given, drawn, inputs, batch, last_ids, grammar)
        self.given = given
        self.before_arrival()
        sampling.absorb(RequestTable(NUM_ROWS, 64, 16), all_of_it=True)
        return sampling.output(pending)

    def before_arrival(self) -> None:
        """Called when all is given to the device and nothing has come back."""


def differences(ours: SamplerOutput, hosts: SamplerOutput, tolerance: float = 0.0) -> list[int]:
    """The columns that are not the same; tolerance: of logprobs."""
    if (ours.failed, ours.fields_at_fault) != (hosts.failed, hosts.fields_at_fault):
        return sorted({*ours.failed, *hosts.failed})
    return [
        i
        for i in range(len(hosts.token_ids))
        if i not in hosts.failed
        and not (
            ours.token_ids[i] == hosts.token_ids[i]
            and _is_close(ours.logprobs.get(i), hosts.logprobs.get(i), tolerance)
        )
    ]


def _is_close(ours: LogprobsLists | None, hosts: LogprobsLists | None, tolerance: float) -> bool:
    if ours is None or hosts is None:
        return ours is hosts
    if (ours.token_ids, ours.ranks) != (hosts.token_ids, hosts.ranks):
        return False
    values = np.array(ours.logprobs), np.array(hosts.logprobs)
    return np.allclose(*values, rtol=0, atol=tolerance)


def steps(
    host: OnHost, device: OnDevice, vocab_size: int, num_steps: int = 8, tolerance: float = 0.0
) -> list[list[int]]:
    """`differences` of each of some steps, whose last tokens are such that bad words, budgets and counts matter."""
    rng, prompt, found = random.Random(3), [1, 2, 8], []
    tokens = [list(prompt) for _ in host.rows]
    for step in range(num_steps):
        logits = 3 * torch.randn(len(tokens), vocab_size, generator=torch.Generator().manual_seed(step))
        logits[:, ::9] = logits[:, ::9].round()  # ties
        given = (logits, tokens, len(prompt), masks(WITH_GRAMMAR, vocab_size, step))
        expected = host.sample(*given)
        assert not expected.failed
        found.append(differences(device.sample(*given), expected, tolerance))
        for own in tokens:
            own.append(rng.choice([3, 8, 8, 8, 6, 20, 21, 10, rng.randrange(90)]))
    return found
