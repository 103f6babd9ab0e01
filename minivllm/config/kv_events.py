"""Whether, and where, the KV cache tells the world what it holds."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from minivllm.exceptions import ConfigError


class KVEventsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The keys of --kv-events-config: vLLM's names; but the default endpoints are of this machine only."""

    enable_kv_cache_events: bool = False
    publisher: Literal["zmq", "null"] | None = None  # None: zmq once events are on
    endpoint: str = "tcp://127.0.0.1:5557"  # a PUB socket binds here
    replay_endpoint: str | None = None  # a ROUTER socket binds here and sends again what subscribers missed
    buffer_steps: int = 10_000  # batches kept for that
    hwm: int = 100_000  # batches that may wait for a slow subscriber, beyond which it loses some
    max_queue_size: int = 100_000  # batches that may wait for the publishing thread
    topic: str = ""  # the first frame of every message

    @property
    def publishes(self) -> bool:
        return self.enable_kv_cache_events and self.publisher != "null"


def read_kv_events_config(values: dict[str, Any] | None) -> KVEventsConfig:
    """Check what the user gave.

    Raises:
        ConfigError: a key is unknown or its value wrong; the message names it.
    """
    try:
        config = msgspec.convert(values or {}, KVEventsConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"kv_events_config: {error}".replace("`", "")) from None
    for name in ("buffer_steps", "hwm", "max_queue_size"):
        if getattr(config, name) < (0 if name == "buffer_steps" else 1):
            raise ConfigError(f"kv_events_config: {name}={getattr(config, name)} is too small")
    return config
