"""All that requests can ask of sampling, asked once before there are any: a kernel that is first launched among them is
compiled there, and every stream stands still for seconds.

The requests are made up, and have their output already, as after a preemption: no decode is run, which would be
captured.
"""

from __future__ import annotations

import numpy as np

from minivllm.messages.worker import GrammarOutput, NewRequestData, SchedulerOutput
from minivllm.sampling_params import SamplingParams, ThinkingTokens
from minivllm.worker.model_runner import ModelRunner

# Ids are small, so that they are in any vocabulary.
_PROMPT, _OUTPUT, _EOS = [1, 2], [1, 2], [0]
_CHANGES = {
    "repetition_penalty": 1.5, "frequency_penalty": 0.5, "presence_penalty": 0.5, "logit_bias": {1: 1.0},
    "allowed_token_ids": [1, 2, 3], "min_tokens": 9, "stop_token_ids": [3], "bad_words_token_ids": [[3], [1, 2]],
    "thinking_token_budget": 0, "thinking": ThinkingTokens([1], [2, 3], is_open=True), "max_tokens": None,
}  # fmt: skip
# What cannot be asked for at once: few logprobs, those of the whole vocabulary, those of named tokens.
ASKED = [
    SamplingParams(**_CHANGES, temperature=0, logprobs=2, prompt_logprobs=2),
    SamplingParams(**_CHANGES, top_k=5, top_p=0.9, min_p=0.1, logprobs=-1),
    SamplingParams(**_CHANGES, top_k=5, logprob_token_ids=[1, 2], prompt_logprobs=0),
]
_NUM_ROWS = (1, 2, 4)  # where an array begins follows from these: at a multiple of 16 bytes it is another kernel


def run(runner: ModelRunner, max_num_batched_tokens: int, max_num_seqs: int) -> None:
    """Each asks for all, in batches of as many rows as kernels tell apart; what they get is not waited for.

    The runner's cache may be one block: all write to it.
    """
    length = min(len(_PROMPT) + len(_OUTPUT), runner.table.token_ids.shape[1])
    most = min(max_num_seqs, max_num_batched_tokens // length)
    finished: list[str] = []
    for num_rows in {min(each, max(most, 1)) for each in _NUM_ROWS}:
        for params in ASKED:
            plan = _plan(runner, params, num_rows, length, min(length, max_num_batched_tokens))
            plan.finished_req_ids = finished
            finished = list(plan.num_scheduled_tokens)
            runner.execute_model(plan)
            runner.start_sampling(_allow_all(finished, runner.sampler.vocab_size))
    runner.execute_model(SchedulerOutput(0, finished_req_ids=finished))


def _plan(
    runner: ModelRunner, params: SamplingParams, num_rows: int, length: int, num_scheduled: int
) -> SchedulerOutput:
    """The last `num_scheduled` of each request's tokens; of which the one to come is sampled."""
    tokens = [*_PROMPT, *_OUTPUT][:length]
    num_prompt = len(_PROMPT)
    requests = [
        NewRequestData(
            f"warm-up-{i}",
            tokens[:num_prompt],
            tokens[num_prompt:],
            params,
            seed=i,
            eos_token_ids=_EOS,
            block_ids=[[0] for _ in runner.table.blocks],
            num_computed_tokens=length - num_scheduled,
        )
        for i in range(num_rows)
    ]
    return SchedulerOutput(
        0,
        scheduled_new_reqs=requests,
        num_scheduled_tokens={request.request_id: num_scheduled for request in requests},
        total_num_scheduled_tokens=num_rows * num_scheduled,
    )


def _allow_all(request_ids: list[str], vocab_size: int) -> GrammarOutput:
    """A mask that is there, and forbids nothing."""
    return GrammarOutput(request_ids, np.full((len(request_ids), -(-vocab_size // 32)), -1, np.int32).tobytes())
