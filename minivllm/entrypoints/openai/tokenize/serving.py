"""Texts and conversations to the token ids the model would get, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minivllm.config.model import ModelConfig
from minivllm.entrypoints.openai.models.serving import ServedModels
from minivllm.entrypoints.openai.render import Renderer
from minivllm.entrypoints.openai.tokenize.protocol import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
    TokenizeResponse,
)
from minivllm.exceptions import RequestError


class ServingTokenize:
    def __init__(self, models: ServedModels, renderer: Renderer) -> None:
        self._models = models
        self._renderer = renderer

    async def tokenize(self, request: TokenizeCompletionRequest | TokenizeChatRequest) -> TokenizeResponse:
        self._models.resolve(request.model)
        if isinstance(request, TokenizeChatRequest):
            tokens = (await self._renderer.chat(request.conversation())).token_ids
        else:
            tokens = await self._renderer.encode(
                request.prompt, add_special_tokens=request.add_special_tokens
            )
        id_to_token = self._renderer.tokenizer.id_to_token
        token_strs = [id_to_token(token) for token in tokens] if request.return_token_strs else None
        return TokenizeResponse(len(tokens), self._models.max_model_len, tokens, token_strs)

    async def detokenize(self, request: DetokenizeRequest) -> DetokenizeResponse:
        self._models.resolve(request.model)
        vocab_size = self._renderer.tokenizer.vocab_size
        for token in request.tokens:
            if type(token) is not int or not 0 <= token < vocab_size:
                raise RequestError(
                    f"tokens must be whole numbers from 0 to {vocab_size - 1}, got {str(token)[:40]}",
                    param="tokens",
                )
        return DetokenizeResponse(await self._renderer.decode(request.tokens))

    def info(self, model: ModelConfig) -> dict[str, Any]:
        """What tokenizer_config.json says, with the chat template in use and the size of the vocabulary.

        Raises:
            RequestError: the server runs without a tokenizer.
        """
        tokenizer = self._renderer.tokenizer
        path = Path(model.tokenizer or model.model) / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return {**config, "chat_template": tokenizer.chat_template, "vocab_size": tokenizer.vocab_size}
