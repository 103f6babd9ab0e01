"""What a benchmark asks of the server it measures, beside the load: its model, token counts, texts, a profile."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx

from minivllm.exceptions import ConfigError

_LOOK_EVERY_S = 0.5


class Server:
    """verify: refuse a certificate that nobody vouches for."""

    def __init__(self, base_url: str, headers: dict[str, str], *, verify: bool = True) -> None:
        self._base_url = base_url
        # A str would have to be ASCII.
        self._headers = {name: value.encode() for name, value in headers.items()}
        self._tls = httpx.create_ssl_context(verify=verify, trust_env=False)  # reads files: once, not for each question

    def model(self, name: str | None, *, patience_s: float = 0) -> dict[str, Any]:
        """The server's card of the model, the first if none is named; it may take `patience_s` seconds to answer.

        Raises:
            ConfigError: nobody answers there, we are refused, or there is no such model.
        """
        deadline = time.monotonic() + patience_s
        is_waiting = False
        while True:
            try:
                cards = self._call("GET", "/v1/models", timeout=10)["data"]
                break
            except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
                if isinstance(error, httpx.HTTPStatusError) and error.response.is_client_error:
                    raise ConfigError(
                        f"{self._base_url}/v1/models answers {error.response.status_code}; a key is taken from "
                        "MINIVLLM_API_KEY, and --base-url says where another server is"
                    ) from error
                if time.monotonic() >= deadline:
                    raise ConfigError(
                        f"no server answers at {self._base_url}/v1/models ({error}); start one with: minivllm serve "
                        "MODEL, or pass --base-url"
                    ) from error
                if not is_waiting:
                    is_waiting = True
                    print(f"waiting up to {patience_s:g} s for {self._base_url} to answer", file=sys.stderr)
            time.sleep(_LOOK_EVERY_S)
        for card in cards:
            if name is None or card["id"] == name:
                return card
        served = ", ".join(card["id"] for card in cards)
        raise ConfigError(f"{self._base_url} does not serve {name}; it serves {served}")

    def count_tokens(self, model: str, text: str) -> int:
        """How many tokens the server makes of a text.

        Raises:
            ConfigError: it does not say.
        """
        return int(self._answer("/tokenize", {"model": model, "prompt": text}, "count", "sharegpt"))

    def text_of(self, model: str, token_ids: list[int]) -> str:
        """Token ids as text.

        Raises:
            ConfigError: the server does not say.
        """
        return str(self._answer("/detokenize", {"model": model, "tokens": token_ids}, "prompt", "openai-chat"))

    @contextlib.contextmanager
    def profiled(self) -> Iterator[None]:
        """Have the server record itself.

        Raises:
            ConfigError: it does not.
        """
        self._answer("/start_profile", None, "status", "--profile")
        try:
            yield
        finally:
            files = self._answer("/stop_profile", None, "files", "--profile")
            print("profile, on the server:", *files)

    def _answer(self, path: str, body: Any, field: str, needed_by: str) -> Any:
        try:
            return self._call("POST", path, body)[field]
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self._base_url}{path} does not answer as {needed_by} needs: {error}") from error

    def _call(self, method: str, path: str, body: Any = None, timeout: float = 60) -> Any:
        options: dict[str, Any] = {} if body is None else {"json": body}
        response = httpx.request(
            method, self._base_url + path, headers=self._headers, timeout=timeout, trust_env=False,
            verify=self._tls, **options,
        )  # fmt: skip
        response.raise_for_status()
        return response.json()
