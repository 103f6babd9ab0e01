"""An engine without a model, behind the interface of `AsyncLLM`, and a tokenizer of bytes.

The engine checks requests with the real `Processor` and answers each with the tokens of a fixed text; answer i
of n ends in the digit i. Logprobs are a function of the token id alone.
"""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from typing import Any

from minivllm.config.engine import EngineConfig
from minivllm.config.frontend import FrontendConfig
from minivllm.config.hf_config import HFConfig
from minivllm.config.model import ModelConfig
from minivllm.engine.processor import Processor
from minivllm.exceptions import EngineDeadError, RequestError
from minivllm.messages.engine import EngineCoreReady
from minivllm.messages.stats import BLOCK_CACHED, BLOCK_EMPTY, BLOCK_HELD, BLOCK_SHARED, EngineSnapshot
from minivllm.outputs import CompletionOutput, Logprob, RequestOutput
from minivllm.sampling_params import RequestOutputKind, SamplingParams

VOCAB_SIZE = 260
EOS = 256
MAX_MODEL_LEN = 200
ANSWER = "Paris, bien sûr: naïve 你好"


class ByteTokenizer:
    """A token is a byte. The template is "<role>content\n" for each message."""

    vocab_size = VOCAB_SIZE
    eos_token_id = EOS
    special_ids = frozenset({EOS})
    chat_template: str | None = "bytes"

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return bytes(token for token in ids if token < 256).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def id_to_token(self, token_id: int) -> str:
        return f"<{token_id}>"

    def template_for(self, tools: list[dict] | None = None) -> str | None:
        return self.chat_template

    def render_chat_template(
        self, messages: list[dict], *, add_generation_prompt: bool = True, **kwargs: Any
    ) -> str:
        if kwargs.get("boom"):
            raise RequestError("the chat template refuses these messages: boom", param="messages")
        text = "".join(f"<{message['role']}>{message['content']}\n" for message in messages)
        text = f"<tools>{len(kwargs['tools'])}\n{text}" if kwargs.get("tools") else text
        return text + ("<assistant>" if add_generation_prompt else "")


def fake_logprob(token_id: int) -> float:
    return -token_id / 100


def logprobs_row(token_id: int, num_top: int) -> dict[int, Logprob]:
    """The token itself, then the `num_top` likeliest, which are the lowest ids."""
    row = {token_id: Logprob(fake_logprob(token_id), token_id + 1, chr(token_id))}
    for i in range(num_top):
        row.setdefault(i, Logprob(fake_logprob(i), i + 1, chr(i)))
    return row


@dataclass
class Call:
    """What the engine was asked."""

    prompt: Any
    params: SamplingParams
    request_id: str
    priority: int


class FakeEngine:
    """`AsyncLLM`, as far as the server uses it."""

    def __init__(self, *, tokenizer: ByteTokenizer | None = None, **model: Any) -> None:
        hf_config = HFConfig("FakeForCausalLM", 8, 8, 1, 1, 1, 8, VOCAB_SIZE, MAX_MODEL_LEN)
        self.config = EngineConfig(ModelConfig(model="fake", **model), hf_config)
        self.ready = EngineCoreReady(
            MAX_MODEL_LEN, 10, 32, 1 << 20, 8, 64, "float32", VOCAB_SIZE, 320, 1.6, "cpu"
        )
        self.tokenizer = None if model.get("skip_tokenizer_init") else tokenizer or ByteTokenizer()
        self.processor = Processor(self.config, self.ready, self.tokenizer)
        self.default_sampling_params: dict[str, Any] = {}
        self.calls: list[Call] = []
        self.num_open = 0
        self.num_snapshots = 0
        self.answer = ANSWER
        self.fail_after: int | None = None  # outputs until `failure`
        self.failure: Exception = EngineDeadError()
        self.refuses: Exception | None = None  # as a full queue does
        self.ends_early = False  # the generator just stops, as it never should
        self.num_cached_tokens = 0
        self.slow_start: asyncio.Event | None = None  # nothing comes before it is set
        self.go_on = asyncio.Event()  # cleared: every answer stops after its first token
        self.go_on.set()
        self.dead_error: EngineDeadError | None = None
        self._dead = asyncio.Event()

    def die(self) -> None:
        """As if the core was killed: open requests hear of it."""
        self.dead_error = EngineDeadError("the engine core was killed by SIGKILL")
        self._dead.set()
        self.fail_after, self.failure = 1, self.dead_error
        self.go_on.set()

    async def wait_dead(self) -> BaseException:
        await self._dead.wait()
        return self.dead_error

    @property
    def errored(self) -> bool:
        return self.dead_error is not None

    async def check_health(self) -> None:
        if self.dead_error is not None:
            raise self.dead_error

    async def snapshots(self) -> list[EngineSnapshot]:
        if self.dead_error is not None:
            raise self.dead_error
        self.num_snapshots += 1
        blocks = bytes([BLOCK_SHARED] * 2 + [BLOCK_HELD, BLOCK_CACHED] + [BLOCK_EMPTY] * 6)
        return [EngineSnapshot(2, 1, 0.3, 20, 8, 12, num_blocks=10, block_stride=1, blocks=blocks)]

    def check_admission(self, num_requests: int = 1) -> None:
        if self.refuses is not None:
            raise self.refuses

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, *, priority: int = 0
    ) -> AsyncGenerator[RequestOutput, None]:
        request, _ = self.processor.process_inputs(request_id, prompt, sampling_params, priority)
        self.calls.append(Call(prompt, sampling_params, request_id, priority))
        self.num_open += 1
        try:
            async for output in self._outputs(request.prompt_token_ids, request.sampling_params, request_id):
                yield output
        finally:
            self.num_open -= 1

    async def _outputs(
        self, prompt_token_ids: list[int], params: SamplingParams, request_id: str
    ) -> AsyncGenerator[RequestOutput, None]:
        answers = [self._answer(index, params) for index in range(params.n)]
        prompt_logprobs = None
        if params.prompt_logprobs is not None:
            prompt_logprobs = [None, *(logprobs_row(t, params.prompt_logprobs) for t in prompt_token_ids[1:])]
        whole = RequestOutput(request_id, None, prompt_token_ids, answers, True, prompt_logprobs)
        whole.num_cached_tokens = self.num_cached_tokens
        if self.slow_start is not None:
            await self.slow_start.wait()
        outputs = [whole] if params.output_kind is RequestOutputKind.FINAL_ONLY else list(_deltas(whole))
        for count, output in enumerate(outputs):
            if count == 1 or len(outputs) == 1:
                await self.go_on.wait()
            if count == self.fail_after:
                raise self.failure
            if self.ends_early and output.finished:
                return
            await asyncio.sleep(0)
            yield output

    def _answer(self, index: int, params: SamplingParams) -> CompletionOutput:
        text = self.answer if params.n == 1 else f"{self.answer} {index}"
        token_ids = list(text.encode())
        reason = "stop"
        if len(token_ids) > params.max_tokens:
            token_ids, reason = token_ids[: params.max_tokens], "length"
        rows = (
            None if params.logprobs is None else [logprobs_row(token, params.logprobs) for token in token_ids]
        )
        text = bytes(token_ids).decode("utf-8", "replace")
        return CompletionOutput(index, text, token_ids, None, rows, reason, None)


def _deltas(whole: RequestOutput):
    """One output a token, answers in turn; a character's text comes with its last byte."""
    num_steps = max(len(answer.token_ids) for answer in whole.outputs)
    for step in range(num_steps):
        for answer in whole.outputs:
            if step >= len(answer.token_ids):
                continue
            last = step == len(answer.token_ids) - 1
            before = bytes(answer.token_ids[:step]).decode("utf-8", "ignore")
            after = bytes(answer.token_ids[: step + 1]).decode("utf-8", "replace" if last else "ignore")
            delta = replace(
                answer,
                text=after.removeprefix(before),
                token_ids=[answer.token_ids[step]],
                logprobs=answer.logprobs and [answer.logprobs[step]],
                finish_reason=answer.finish_reason if last else None,
            )
            finished = last and answer is whole.outputs[-1]
            prompt_logprobs = whole.prompt_logprobs if step == 0 else None
            yield replace(whole, outputs=[delta], finished=finished, prompt_logprobs=prompt_logprobs)


def server_args(**changes: Any) -> Namespace:
    """What the command line leaves when nothing is said."""
    return Namespace(**{**vars(FrontendConfig()), "model": "fake", **changes})
