"""POST /tokenize and /detokenize: the bodies."""

from __future__ import annotations

from typing import Annotated, Any, Union

import msgspec
from pydantic import BaseModel, ConfigDict, Discriminator, Tag

from minivllm.entrypoints.openai.chat_completion.protocol import ChatFields


class TokenizeCompletionRequest(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool | None = False


class TokenizeChatRequest(ChatFields):
    return_token_strs: bool | None = False


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


class TokenizeResponse(msgspec.Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(msgspec.Struct):
    prompt: str
