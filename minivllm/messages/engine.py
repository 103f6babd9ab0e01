"""What crosses between a front end and an engine core.

The structs of the running conversation are encoded as MessagePack arrays: append new fields last, with a default.
Those of the start, and SamplingParams, are maps.

A conversation, on two sockets; further API servers have two each of their own, on which they hear EngineCoreReady and
then speak as the first does. Each names itself by its client_index:
    core  DEALER ─▶ ROUTER client   StartProgress*, then EngineCoreReady or StartFailed
    client ROUTER ─▶ DEALER core    RequestType byte, payload; of ADD several (until the end)
    core  PUSH ─▶ PULL client       EngineCoreOutputs, or ENGINE_CORE_DEAD    (until the end)
"""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import Any, Literal

import msgspec

from minivllm.messages.stats import SchedulerStats
from minivllm.sampling_params import SamplingParams

ENGINE_CORE_DEAD = b"ENGINE_CORE_DEAD"  # a frame of its own on the output socket; the cause follows as a second frame
SLEEPING_PARTS = ("weights", "kv_cache")  # what can be given back, and what `wake_up` may be asked for
PauseMode = Literal["abort", "wait", "keep"]  # what becomes of open requests


class RequestType(Enum):
    """The first frame of a message to the core."""

    ADD = b"\x00"  # EngineCoreRequest
    ABORT = b"\x01"  # list[str] of request ids
    UTILITY = b"\x03"  # UtilityRequest
    SHUTDOWN = b"\x04"  # float: seconds that running requests get to finish


class FinishReason(IntEnum):
    """Why a request ended; `str()` is what clients see."""

    STOP = 0
    LENGTH = 1
    ABORT = 2
    ERROR = 3
    REPETITION = 4

    def __str__(self) -> str:
        return self.name.lower()


# Bytes of one number, by the dtypes that embeddings may have.
EMBEDDING_DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}


class PromptEmbeds(msgspec.Struct, array_like=True, gc=False):
    """A prompt as vectors, which stand where the embeddings of its tokens would: a row a position."""

    dtype: str  # one of EMBEDDING_DTYPES
    hidden_size: int
    data: bytes  # the rows, one after another, little endian

    @property
    def row_bytes(self) -> int:
        return self.hidden_size * EMBEDDING_DTYPES[self.dtype]

    @property
    def num_tokens(self) -> int:
        return len(self.data) // self.row_bytes

    def rows(self, start: int, stop: int) -> memoryview:
        """The bytes of the rows from start up to stop, as far as there are any."""
        return memoryview(self.data)[start * self.row_bytes : stop * self.row_bytes]


class LoRAIdentity(msgspec.Struct, array_like=True, gc=False):
    """Which adapter computed a KV block: its name, and which load of it, since a name may be given to another."""

    name: str
    load_id: str  # another for every load


class EngineCoreRequest(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    """A request as the core knows it: its state is its tokens.

    A resend after a crash fills `prior_output_token_ids`; nothing generated ever becomes prompt.
    `seed` is always set: the noise of every token is a function of it and the token's position.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    seed: int  # 0 … 2**64 - 1
    eos_token_ids: list[int] = []
    arrival_time: float = 0.0
    prior_output_token_ids: list[int] = []
    client_index: int = 0
    priority: int = 0
    cache_salt: str | None = None
    grammar: str | None = None  # what the output must match, as llguidance reads it; made by the processor
    prompt_embeds: PromptEmbeds | None = None  # then prompt_token_ids holds as many zeros, which mean nothing
    lora: LoRAIdentity | None = None  # so far nothing sets it


class LogprobsLists(msgspec.Struct, array_like=True, gc=False):
    """Logprobs of consecutive positions. Row i: the token itself first, then the k most likely, then (of a prompt) the
    tokens that prompt_logprob_token_ids names there."""

    token_ids: list[list[int]]
    logprobs: list[list[float]]
    ranks: list[int]  # of the token itself; 1 = most likely


class EngineCoreOutput(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    """What one step brought one request."""

    request_id: str
    new_token_ids: list[int] = []
    new_logprobs: LogprobsLists | None = None
    new_prompt_logprobs: LogprobsLists | None = None  # rows for prompt positions 1, 2, … in order, chunk by chunk
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token, when one of stop_token_ids ended it; or what else did
    error: str | None = None  # with FinishReason.ERROR
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache; set on the first output
    scheduled_time: float | None = None  # core's monotonic clock, first time in a step; set on the first output
    error_param: str | None = None  # the request's field, where its own fault ended it; None where ours did
    num_preemptions: int = 0  # of the request so far


class UtilityRequest(msgspec.Struct, array_like=True):
    """Call one of the core's public utilities (see EngineCore.UTILITIES)."""

    call_id: int
    method: str
    args: list[Any] = []
    client_index: int = 0


class UtilityOutput(msgspec.Struct, array_like=True, omit_defaults=True):
    """Its answer; `failure` is a message when it raised, `conflict` one when the engine is in no state for it now."""

    call_id: int
    result: Any = None
    failure: str | None = None
    conflict: str | None = None


class EngineCoreOutputs(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    """One message per client per step."""

    outputs: list[EngineCoreOutput] = []
    scheduler_stats: SchedulerStats | None = None
    timestamp: float = 0.0  # core's monotonic clock
    utility_output: UtilityOutput | None = None


class StartProgress(msgspec.Struct, tag="progress"):
    """The core has entered a phase of its start."""

    phase: str


class StartFailed(msgspec.Struct, tag="failed"):
    """The core cannot start. `message` is the one line the user should see last."""

    message: str
    exit_code: int = 1


class EngineCoreReady(msgspec.Struct, tag="ready"):
    """The core serves. Every `auto` is resolved here."""

    max_model_len: int
    num_gpu_blocks: int
    block_size: int
    kv_cache_bytes: int
    max_num_seqs: int
    max_num_batched_tokens: int
    dtype: str
    vocab_size: int
    kv_cache_size_tokens: int = 0
    kv_cache_max_concurrency: float = 0.0
    numerics_id: str = ""  # device and instruction family in use: equal ids give equal bits


CoreToClient = StartProgress | StartFailed | EngineCoreReady
