"""Lines about single requests: --enable-log-requests and -outputs. The only place that logs what users write."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from minivllm.logger import init_logger

if TYPE_CHECKING:
    from minivllm.outputs import RequestOutput
    from minivllm.tokenizer.tokenizer import Tokenizer

logger = init_logger(__name__)


class RequestLog:
    """outputs: also log what is generated; deltas: also each piece of a stream. max_len: of texts and lists of ids."""

    def __init__(self, *, outputs: bool, deltas: bool, max_len: int | None) -> None:
        self._outputs = outputs
        self._deltas = deltas
        self._max_len = max_len

    def request(
        self, request_id: str, token_ids: list[int] | None, params: Any, tokenizer: Tokenizer | None
    ) -> None:
        """A request that is about to be sent; its prompt only at level DEBUG. token_ids: None of one of vectors."""
        if token_ids is None:
            logger.info("%s: a prompt of embeddings, %s", request_id, params)
            return
        logger.info("%s: %d prompt tokens, %s", request_id, len(token_ids), params)
        if logger.isEnabledFor(logging.DEBUG):
            text = None if tokenizer is None else tokenizer.decode(token_ids, skip_special_tokens=False)
            logger.debug("%s: prompt %r, token ids %s", request_id, self._cut(text), self._cut(token_ids))

    def watched(
        self, request_id: str, outputs: AsyncGenerator[RequestOutput, None]
    ) -> AsyncGenerator[RequestOutput, None]:
        """The same outputs, logged if they are to be."""
        return self._logged(request_id, outputs) if self._outputs else outputs

    async def _logged(
        self, request_id: str, outputs: AsyncGenerator[RequestOutput, None]
    ) -> AsyncGenerator[RequestOutput, None]:
        texts: dict[int, str] = {}
        try:
            async for output in outputs:
                for answer in output.outputs:
                    texts[answer.index] = texts.get(answer.index, "") + answer.text
                    if answer.finish_reason is not None:
                        text = self._cut(texts[answer.index])
                        logger.info("%s[%d]: %r, finished: %s", request_id, answer.index, text, answer.finish_reason)
                    elif self._deltas:
                        logger.info("%s[%d]: … %r", request_id, answer.index, self._cut(answer.text))
                yield output
        finally:
            await outputs.aclose()

    def _cut(self, value: Any) -> Any:
        return value if value is None or self._max_len is None else value[: self._max_len]
