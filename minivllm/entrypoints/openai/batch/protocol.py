"""POST /v1/chat/completions/batch: several conversations under the same parameters, one choice each."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

from minivllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from minivllm.entrypoints.openai.sampling_fields import SamplingFields
from minivllm.exceptions import RequestError

MAX_CONVERSATIONS = 1024


class BatchChatRequest(BaseModel):
    """messages: a list of conversations; every other field is chat's."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())
    KNOWN_ELSEWHERE: ClassVar[frozenset[str]] = frozenset(
        SamplingFields.KNOWN_ELSEWHERE | ChatCompletionRequest.model_fields.keys()
    )

    messages: list[list[Any]]

    @model_validator(mode="after")
    def _check(self) -> BatchChatRequest:
        if not 1 <= len(self.messages) <= MAX_CONVERSATIONS:
            raise RequestError(f"messages must hold 1 to {MAX_CONVERSATIONS} conversations", param="messages")
        extra = self.model_extra or {}
        for name, allowed in {"stream": (None, False), "n": (None, 1), "use_beam_search": (None, False)}.items():
            if extra.get(name) not in allowed:
                raise RequestError(f"{name} does not go together with a batch; leave it out", param=name)
        if extra.get("tools"):
            raise RequestError("tools do not go together with a batch; leave them out", param="tools")
        return self
