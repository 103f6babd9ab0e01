"""A small client of an OpenAI server for `chat` and `complete`: one model, streamed answers, errors in one line."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from minivllm import envs
from minivllm.exceptions import ConfigError, MinivllmError
from minivllm.utils.argparse_utils import FlexibleArgumentParser
from minivllm.utils.text import one_line

_TIMEOUT = httpx.Timeout(None, connect=10.0)  # a long prompt may take minutes to its first token


class ServerError(MinivllmError):
    """The server refused, or went away."""


@dataclass
class Stats:
    """One answer, in seconds and tokens; tokens are None where the server does not say."""

    first_token_s: float = 0.0
    total_s: float = 0.0
    num_prompt_tokens: int | None = None
    num_tokens: int | None = None

    def __str__(self) -> str:
        if self.num_tokens is None:
            return f"{self.first_token_s:.2f} s to the first token, {self.total_s:.2f} s in all"
        decode_s = self.total_s - self.first_token_s
        speed = f", {(self.num_tokens - 1) / decode_s:.1f} tokens/s" if self.num_tokens > 1 and decode_s > 0 else ""
        return (
            f"{self.num_prompt_tokens} tokens in, {self.num_tokens} out; "
            f"{self.first_token_s:.2f} s to the first{speed}"
        )


def add_client_arguments(parser: FlexibleArgumentParser) -> None:
    """Where the server is, and which of its models."""
    parser.add_argument("--url", default="http://localhost:8000/v1", metavar="URL", help="The server's API.")
    parser.add_argument("--model-name", metavar="NAME", help="Name of the model; default: the first the server lists.")
    parser.add_argument(
        "--api-key", metavar="KEY", help="Key to send; default: the environment variable MINIVLLM_API_KEY."
    )
    parser.add_argument("--stats", action="store_true", help="Print tokens and speed after each answer.")


class Client:
    """Asks one server for one model."""

    def __init__(self, url: str, *, model: str | None = None, api_key: str | None = None) -> None:
        """Raises ConfigError if nobody answers there, ServerError if the server refuses."""
        key = api_key or envs.get("MINIVLLM_API_KEY")
        headers = {"Authorization": f"Bearer {key}".encode()} if key else {}
        self.url = url.rstrip("/")
        self._http = httpx.Client(headers=headers, timeout=_TIMEOUT, trust_env=False)
        self.model = model or self._first_model()

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Client:
        return cls(args.url, model=args.model_name, api_key=args.api_key)

    def _first_model(self) -> str:
        with self._reported():
            response = self._http.get(f"{self.url}/models")
            _raise_for_status(response)
            try:
                return response.json()["data"][0]["id"]
            except (ValueError, LookupError, TypeError):
                raise ServerError(f"{self.url}/models lists no model; is --url right?") from None

    def stream(self, path: str, body: dict[str, Any], stats: Stats) -> Iterator[str]:
        """The answer's text, piece by piece, as it comes. `stats` is filled on the way."""
        body = {"model": self.model, **body, "stream": True, "stream_options": {"include_usage": True}}
        start = time.monotonic()
        with self._reported(), self._http.stream("POST", f"{self.url}/{path}", json=body) as response:
            if response.is_error:
                response.read()
            _raise_for_status(response)
            for chunk in _events(response):
                _read_usage(chunk, stats)
                for choice in chunk.get("choices", ()):
                    text = choice.get("text") or choice.get("delta", {}).get("content")
                    if text:
                        stats.first_token_s = stats.first_token_s or time.monotonic() - start
                        yield text
        stats.total_s = time.monotonic() - start

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """Turn transport failures into our errors."""
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise ConfigError(
                f"no server answers at {self.url} ({one_line(error)}); start one with: minivllm serve MODEL, "
                "or pass --url"
            ) from error
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise ConfigError(f"--url {self.url}: {one_line(error)}; it looks like http://localhost:8000/v1") from error
        except httpx.TransportError as error:
            raise ServerError(f"the connection to {self.url} broke: {one_line(error)}") from error


def print_answer(pieces: Iterator[str]) -> str:
    """Print pieces as they come, end the line, and return the whole. Ctrl-C ends the answer, not the program."""
    answer = []
    try:
        for piece in pieces:
            answer.append(piece)
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        pieces.close()  # type: ignore[attr-defined]  # a generator: closing it hangs up, and the server aborts
    print(flush=True)
    return "".join(answer)


def read_lines(prompt: str) -> Iterator[str]:
    """What the user types, line by line, until end of file, /exit or Ctrl-C."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() a history and editing keys
    while True:
        try:
            line = input(prompt)
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line.strip() in ("/exit", "/quit"):
            return
        if line.strip():
            yield line


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The stream's JSON events up to [DONE]."""
    for line in response.iter_lines():
        data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
        if data == "[DONE]":
            return
        if data:
            event = json.loads(data)
            if "error" in event:
                raise ServerError(_message(event))
            yield event
    raise ServerError("the server ended the stream before the answer was finished")


def _read_usage(chunk: dict[str, Any], stats: Stats) -> None:
    usage = chunk.get("usage")
    if usage:
        stats.num_prompt_tokens, stats.num_tokens = usage["prompt_tokens"], usage["completion_tokens"]


def _raise_for_status(response: httpx.Response) -> None:
    if not response.is_error:
        return
    try:
        message = _message(response.json())
    except ValueError:
        message = response.text[:200]
    hint = "; pass --api-key" if response.status_code == 401 else ""
    raise ServerError(f"the server answered {response.status_code}: {one_line(message)}{hint}")


def _message(body: Any) -> str:
    error = body.get("error", body) if isinstance(body, dict) else body
    return str(error.get("message", error) if isinstance(error, dict) else error)
