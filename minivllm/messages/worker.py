"""What crosses between scheduler and worker: the plan of a step, and its result."""

from __future__ import annotations

import msgspec

from minivllm.messages.engine import LogprobsLists, PromptEmbeds
from minivllm.messages.kv_cache import ONE_FULL_GROUP, KVCacheGroup
from minivllm.sampling_params import SamplingParams


class NewRequestData(msgspec.Struct, array_like=True, gc=False):
    """A request the worker has not seen (or has forgotten)."""

    request_id: str
    prompt_token_ids: list[int]
    prior_output_token_ids: list[int]
    sampling_params: SamplingParams
    seed: int
    eos_token_ids: list[int]
    block_ids: list[list[int]]  # one list a KV cache group
    num_computed_tokens: int
    prompt_embeds: PromptEmbeds | None = None  # in place of the embeddings of prompt_token_ids


class CachedRequestData(msgspec.Struct, array_like=True, gc=False):
    """Requests the worker knows, as columns of equal length. The worker itself appended the tokens it sampled."""

    request_ids: list[str] = []
    new_block_ids: list[list[list[int]]] = []  # a list a group, or []: appended to the block tables …
    resumed: list[bool] = []  # … or replacing them, after a preemption
    num_computed_tokens: list[int] = []


class SchedulerOutput(msgspec.Struct, array_like=True, gc=False):
    """One step. Tokens num_computed … num_computed + num_scheduled of each request are computed.

    A request whose last known token is among them gets one token sampled; others (prompt chunks) none.
    """

    step: int
    scheduled_new_reqs: list[NewRequestData] = []
    scheduled_cached_reqs: CachedRequestData = msgspec.field(default_factory=CachedRequestData)
    num_scheduled_tokens: dict[str, int] = {}  # in batch order
    total_num_scheduled_tokens: int = 0
    finished_req_ids: list[str] = []  # since the last step: forget them
    preempted_req_ids: list[str] = []  # in this step: their blocks are gone, their tokens stay


class GrammarOutput(msgspec.Struct, array_like=True, gc=False):
    """Which tokens may come next in some requests of a step; the others are free."""

    request_ids: list[str] = []
    bitmask: bytes = b""  # a row each, of 32-bit words: bit t % 32 of word t // 32 allows token t


class ModelRunnerOutput(msgspec.Struct, array_like=True, gc=False):
    """The result of one step, in the batch order of the plan."""

    request_ids: list[str] = []
    sampled_token_ids: list[list[int]] = []  # [] for a request that got none
    logprobs: dict[str, LogprobsLists] = {}  # only of requests that asked
    prompt_logprobs: dict[str, LogprobsLists] = {}  # of the prompt positions this step computed
    failed: dict[str, str] = {}  # request id -> why this one request cannot go on (a non-finite row, …)
    fields_at_fault: dict[str, str] = {}  # of those failed because their own fields contradict each other: one of these


class WorkerReady(msgspec.Struct, array_like=True):
    """What the worker resolved when it loaded the model and laid out the cache."""

    max_model_len: int
    num_blocks: int
    block_size: int
    kv_cache_bytes: int
    max_num_seqs: int
    max_num_batched_tokens: int
    dtype: str
    numerics_id: str
    kv_cache_groups: tuple[KVCacheGroup, ...] = ONE_FULL_GROUP
    plans_in_flight: int = 1  # steps it is to be given before the first one's result is in, at most
