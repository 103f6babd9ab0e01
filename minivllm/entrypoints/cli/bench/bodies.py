"""What is sent: a request of a data set as the body of one of the server's APIs."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from minivllm.entrypoints.cli.bench.datasets import BenchRequest

CHAT = "openai-chat"
# --backend -> the route it speaks to, unless --endpoint names another.
ENDPOINTS = {"openai": "/v1/completions", "vllm": "/v1/completions", CHAT: "/v1/chat/completions"}
SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty",
)  # fmt: skip


def make_body(request: BenchRequest, model: str, args: Namespace, text_of: Callable[[list[int]], str]) -> bytes:
    """text_of: token ids as text, for an API that takes no others."""
    body: dict[str, Any] = {"model": model}
    if args.backend == CHAT:
        text = text_of(request.prompt_token_ids) if request.text is None else request.text
        body["messages"] = [{"role": "user", "content": text}]
        body["max_completion_tokens"] = request.output_len
    else:
        body["prompt"] = request.prompt
        body["max_tokens"] = request.output_len
    body |= {name: value for name in SAMPLING if (value := getattr(args, name)) is not None}
    if args.logprobs is not None:
        chat = {"logprobs": True, "top_logprobs": args.logprobs}
        body |= chat if args.backend == CHAT else {"logprobs": args.logprobs}
    if args.ignore_eos:
        body["ignore_eos"] = True
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps({**body, **args.extra_body}).encode()
