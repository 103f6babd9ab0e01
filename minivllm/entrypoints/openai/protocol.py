"""What the bodies of several routes share. Responses are msgspec structs: pydantic is not on the per-token path."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import BaseModel
from starlette.responses import Response

_encode = msgspec.json.Encoder().encode


class StreamOptions(BaseModel):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct):
    reasoning_tokens: int


class Usage(msgspec.Struct):
    """In tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET  # where the model thinks

    @classmethod
    def of(cls, num_prompt_tokens: int, num_completion_tokens: int, num_cached_tokens: int | None = None) -> Usage:
        """num_cached_tokens: of the prompt, from the prefix cache; None: not told."""
        details = None if num_cached_tokens is None else PromptTokensDetails(num_cached_tokens)
        total = num_prompt_tokens + num_completion_tokens
        return cls(num_prompt_tokens, num_completion_tokens, total, details)


class PromptLogprob(msgspec.Struct):
    logprob: float
    rank: int | None
    decoded_token: str | None


# For each prompt position: token id -> its logprob; None where nothing predicts.
PromptLogprobsBody = list[dict[int, PromptLogprob] | None]


def json_response(body: msgspec.Struct) -> Response:
    return Response(_encode(body), media_type="application/json")
