"""POST /tokenize and /detokenize: the bodies."""

from __future__ import annotations

from typing import Annotated, Any, Union

import msgspec
from pydantic import BaseModel, ConfigDict, Discriminator, Tag, model_validator

from minivllm.entrypoints.openai.chat_completion.protocol import ChatFields
from minivllm.exceptions import RequestError

MAX_TOKENS = 1 << 20  # of /detokenize


class TokenizeCompletionRequest(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool | None = False


class TokenizeChatRequest(ChatFields):
    return_token_strs: bool | None = False

    @model_validator(mode="after")
    def _check_form(self) -> TokenizeChatRequest:
        if (self.model_extra or {}).get("prompt") is not None:
            raise RequestError("send a prompt or messages, not both", param="prompt")
        return self


def _form(body: Any) -> str:
    return "messages" if isinstance(body, dict) and "messages" in body else "prompt"


TokenizeRequest = Annotated[
    Union[  # noqa: UP007 (evaluated at run time; `|` of Annotated needs Python 3.11)
        Annotated[TokenizeCompletionRequest, Tag("prompt")], Annotated[TokenizeChatRequest, Tag("messages")]
    ],
    Discriminator(_form),
]


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str | None = None
    tokens: list[Any]

    @model_validator(mode="after")
    def _check(self) -> DetokenizeRequest:
        if len(self.tokens) > MAX_TOKENS:
            raise RequestError(f"tokens holds {len(self.tokens)} ids; at most {MAX_TOKENS} fit", param="tokens")
        return self


class TokenizeResponse(msgspec.Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(msgspec.Struct):
    prompt: str
