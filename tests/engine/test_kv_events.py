"""The KV cache's events, heard over real sockets."""

from __future__ import annotations

import socket
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import zmq

from minivllm.config.kv_events import KVEventsConfig
from minivllm.config.observability import ObservabilityConfig
from minivllm.core.kv_cache_utils import root_hash
from minivllm.engine.core import EngineCore
from minivllm.engine.kv_events import KVEventPublisher
from minivllm.exceptions import ConfigError
from minivllm.messages.codec import Decoder
from minivllm.messages.engine import EngineCoreRequest
from minivllm.messages.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch
from minivllm.sampling_params import SamplingParams
from tests.engine.engines import make_config

BLOCK_SIZE = 16  # of the fake executor
TIMEOUT_MS = 10_000
decode = Decoder(KVEventBatch)


@pytest.fixture
def endpoints(tmp_path: Path) -> dict[str, str]:
    return {"endpoint": f"ipc://{tmp_path}/pub", "replay_endpoint": f"ipc://{tmp_path}/replay"}


@contextmanager
def socket_to(kind: int, endpoint: str) -> Iterator[zmq.Socket]:
    context = zmq.Context()
    connected = context.socket(kind)
    connected.setsockopt(zmq.RCVTIMEO, TIMEOUT_MS)
    connected.setsockopt(zmq.LINGER, 0)
    try:
        connected.connect(endpoint)
        yield connected
    finally:
        context.destroy(linger=0)


@contextmanager
def core_with(events: dict[str, Any] | None) -> Iterator[EngineCore]:
    config = replace(make_config(), observability=ObservabilityConfig(kv_events_config=events))
    core = EngineCore(config, on_death=lambda cause: None, on_progress=lambda phase: None)
    try:
        yield core
    finally:
        core.shutdown()


def answer(core: EngineCore, prompt: list[int], name: str = "a") -> None:
    params = SamplingParams(max_tokens=1, ignore_eos=True)
    core.add_request(EngineCoreRequest(name, prompt, params, seed=1))
    while core.has_requests():
        core.step()


def replayed(endpoint: str, first: int, until: int | None = None) -> list[tuple[int, KVEventBatch]]:
    """All batches from `first` on; asks again until number `until` is among them."""
    deadline = time.monotonic() + TIMEOUT_MS / 1000
    while True:
        heard = []
        with socket_to(zmq.DEALER, endpoint) as client:
            client.send_multipart([b"", first.to_bytes(8, "big")])
            while True:
                _, number, payload = client.recv_multipart()
                if not payload:
                    break
                heard.append((int.from_bytes(number, "big"), decode(payload)))
        if until is None or any(number == until for number, _ in heard):
            return heard
        assert time.monotonic() < deadline, f"batch {until} never came"


def until_heard(publish: Callable[[], None], subscriber: zmq.Socket) -> list[bytes]:
    """Publish until the subscription is there; the first message heard."""
    for _ in range(TIMEOUT_MS // 20):
        publish()
        if subscriber.poll(20):
            return subscriber.recv_multipart()
    raise AssertionError("nothing was heard")


def test_events_name_stored_and_forgotten_blocks(endpoints: dict[str, str]):
    prompt = list(range(40))
    with core_with({"enable_kv_cache_events": True, **endpoints}) as core:
        answer(core, prompt)
        answer(core, prompt, "b")  # found: nothing is stored
        core.reset_prefix_cache()
        (first, stored), (second, cleared) = replayed(endpoints["replay_endpoint"], 0, until=1)
    assert (first, second) == (0, 1)
    [event] = stored.events
    assert isinstance(event, BlockStored)
    assert (event.parent_block_hash, event.token_ids, event.block_size) == (None, prompt[:32], BLOCK_SIZE)
    assert event.block_hashes[0] == sha256(root_hash() + array("I", prompt[:16]).tobytes()).digest()
    assert cleared.events == [AllBlocksCleared()]


def test_blocks_that_are_handed_out_again_are_removed(endpoints: dict[str, str]):
    with core_with({"enable_kv_cache_events": True, **endpoints}) as core:
        num_blocks = core.ready.num_gpu_blocks
        for index in range(num_blocks):
            answer(core, [index % 64] * 33, f"r{index}")
        batches = replayed(endpoints["replay_endpoint"], 0, until=num_blocks - 1)
    events = [event for _, batch in batches for event in batch.events]
    stored = {name for event in events if isinstance(event, BlockStored) for name in event.block_hashes}
    removed = [name for event in events if isinstance(event, BlockRemoved) for name in event.block_hashes]
    assert removed and stored >= set(removed)


def test_a_subscriber_hears_topic_number_and_batch(endpoints: dict[str, str]):
    publisher = KVEventPublisher(KVEventsConfig(endpoint=endpoints["endpoint"], topic="kv@pod-1"))
    try:
        with socket_to(zmq.SUB, endpoints["endpoint"]) as subscriber:
            subscriber.subscribe("kv@")
            topic, first, payload = until_heard(lambda: publisher.publish([AllBlocksCleared()]), subscriber)
            assert (topic, decode(payload).events) == (b"kv@pod-1", [AllBlocksCleared()])
            publisher.publish([BlockRemoved([b"x"])])
            numbers = [int.from_bytes(first, "big")]
            while decode(payload).events != [BlockRemoved([b"x"])]:
                _, number, payload = subscriber.recv_multipart()
                numbers.append(int.from_bytes(number, "big"))
            assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))  # no gap
    finally:
        publisher.shutdown()
        publisher.shutdown()


def test_a_replay_begins_where_it_is_asked_to_and_forgets_what_is_old(endpoints: dict[str, str]):
    publisher = KVEventPublisher(KVEventsConfig(**endpoints, buffer_steps=3))
    try:
        for _ in range(5):
            publisher.publish([AllBlocksCleared()])
        replay = endpoints["replay_endpoint"]
        assert [number for number, _ in replayed(replay, 0, until=4)] == [2, 3, 4]
        assert [number for number, _ in replayed(replay, 4)] == [4]
        assert replayed(replay, 5) == []
    finally:
        publisher.shutdown()


@pytest.mark.parametrize(
    "events", [None, {}, {"enable_kv_cache_events": True, "publisher": "null"}, {"publisher": "zmq"}]
)
def test_nothing_is_recorded_for_nobody(events: dict | None):
    with core_with(events) as core:
        answer(core, list(range(40)))
        assert core.scheduler.take_kv_events() == []


def test_an_endpoint_that_cannot_be_bound_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        endpoint = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"cannot bind {endpoint}"):
            with core_with({"enable_kv_cache_events": True, "endpoint": endpoint}):
                pass
