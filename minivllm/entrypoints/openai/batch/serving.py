"""Several conversations at once, as one completion with a choice for each."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from minivllm.entrypoints.openai.as_chat import chat_request
from minivllm.entrypoints.openai.batch.protocol import BatchChatRequest
from minivllm.entrypoints.openai.protocol import CompletionTokensDetails, Usage, json_response
from minivllm.exceptions import RequestError

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from minivllm.entrypoints.openai.chat_completion.protocol import ChatCompletion, ChatCompletionRequest
    from minivllm.entrypoints.openai.chat_completion.serving import ServingChat


class ServingBatch:
    def __init__(self, chat: ServingChat) -> None:
        self._chat = chat

    async def create(self, request: BatchChatRequest, raw_request: Request) -> Response:
        """Answer all, or fail with the first that fails; the others are then ended.

        Raises:
            RequestError: a conversation is wrong; EngineError: one failed.
        """
        fields = dict(request.model_extra or {})
        asked = [chat_request({**fields, "messages": messages}, {}) for messages in request.messages]
        tasks = [asyncio.ensure_future(self._one(i, one, raw_request)) for i, one in enumerate(asked)]
        try:
            bodies = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return json_response(_together(bodies))

    async def _one(self, index: int, asked: ChatCompletionRequest, raw_request: Request) -> ChatCompletion:
        try:
            return await self._chat.whole(asked, raw_request)
        except RequestError as error:  # which of the conversations is wrong
            if error.param is not None and error.param.startswith("messages["):
                error.param, error.message = (
                    text.replace("messages[", f"messages[{index}][", 1) for text in (error.param, error.message)
                )
            raise


def _together(bodies: list[ChatCompletion]) -> ChatCompletion:
    first = bodies[0]
    for index, body in enumerate(bodies):
        body.choices[0].index = index
    first.choices = [body.choices[0] for body in bodies]
    first.usage = _sum([body.usage for body in bodies])
    return first


def _sum(usages: list[Usage]) -> Usage:
    cached = [u.prompt_tokens_details.cached_tokens for u in usages if u.prompt_tokens_details is not None]
    reasoning = [u.completion_tokens_details.reasoning_tokens for u in usages if u.completion_tokens_details]
    num_prompt = sum(usage.prompt_tokens for usage in usages)
    num_completion = sum(usage.completion_tokens for usage in usages)
    total = Usage.of(num_prompt, num_completion, sum(cached) if cached else None)
    if reasoning:
        total.completion_tokens_details = CompletionTokensDetails(sum(reasoning))
    return total
