"""The KV cache's events on a ZeroMQ PUB socket. Lives in the engine core, which it never holds up.

Owns the sequence numbers, the two sockets and the thread that sends. Nothing is encrypted: the default endpoints are
of this machine only.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque

import zmq

from minivllm.config.kv_events import KVEventsConfig
from minivllm.exceptions import ConfigError
from minivllm.logger import init_logger
from minivllm.messages.codec import encode
from minivllm.messages.kv_events import KVCacheEvent, KVEventBatch

logger = init_logger(__name__)

_POLL_S = 0.05  # between two looks at the replay socket while no events come
_FLUSH_MS = 500
_END_OF_REPLAY = (-1).to_bytes(8, "big", signed=True)


class KVEventPublisher:
    """Numbers batches and sends them from its own thread; when that falls behind too far, batches are lost.

    A replay request is [empty frame, first number wanted]; the answers are [empty, number, batch] for all that are
    still kept, then [empty, -1, empty].
    """

    def __init__(self, config: KVEventsConfig) -> None:
        """Bind.

        Raises:
            ConfigError: an endpoint cannot be bound; the message names it.
        """
        self._topic = config.topic.encode()
        self._next_number = 0
        self._queue: queue.Queue[tuple[int, KVEventBatch] | None] = queue.Queue(config.max_queue_size)
        self._sent: deque[tuple[int, bytes]] = deque(maxlen=config.buffer_steps)
        self._context = zmq.Context()
        self._replay: zmq.Socket | None = None
        try:
            self._socket = self._bind(zmq.PUB, config.endpoint, config.hwm)
            if config.replay_endpoint is not None:
                self._replay = self._bind(zmq.ROUTER, config.replay_endpoint, config.hwm)
        except ConfigError:
            self._context.destroy(linger=0)
            raise
        self._thread = threading.Thread(target=self._run, name="kv-events", daemon=True)
        self._thread.start()

    def _bind(self, kind: int, endpoint: str, hwm: int) -> zmq.Socket:
        if endpoint.startswith("tcp://") and not endpoint.startswith(("tcp://127.", "tcp://localhost:")):
            logger.warning("KV events leave this machine unencrypted, token ids included: %s", endpoint)
        socket = self._context.socket(kind)
        socket.set_hwm(hwm)
        socket.setsockopt(zmq.LINGER, _FLUSH_MS)
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise ConfigError(f"kv_events_config: cannot bind {endpoint}: {error}; choose another") from error
        return socket

    def publish(self, events: list[KVCacheEvent]) -> None:
        """Send one batch. Never blocks; a batch that finds no room is lost, and its number with it."""
        number, self._next_number = self._next_number, self._next_number + 1
        try:
            self._queue.put_nowait((number, KVEventBatch(time.time(), events)))
        except queue.Full:
            logger.warning("KV events: batch %d is lost, %d wait already", number, self._queue.qsize())

    def shutdown(self) -> None:
        """Send what waits, within half a second, and let go of the sockets. Idempotent."""
        if self._context.closed:
            return
        self._queue.put(None)
        self._thread.join()
        self._context.term()

    def _run(self) -> None:
        while True:
            try:
                item = self._queue.get(timeout=None if self._replay is None else _POLL_S)
                if item is None:
                    break
                self._send(*item)
            except queue.Empty:
                pass
            self._answer_replays()
        self._socket.close()
        if self._replay is not None:
            self._replay.close()

    def _send(self, number: int, batch: KVEventBatch) -> None:
        payload = encode(batch)
        if self._replay is not None:
            self._sent.append((number, payload))
        self._socket.send_multipart([self._topic, number.to_bytes(8, "big"), payload])

    def _answer_replays(self) -> None:
        while self._replay is not None and self._replay.poll(0):
            frames = self._replay.recv_multipart()
            if len(frames) != 3 or len(frames[2]) != 8:
                logger.warning("KV events: a replay request of %d frames is dropped", len(frames))
                continue
            client, first = frames[0], int.from_bytes(frames[2], "big")
            for number, payload in self._sent:
                if number >= first:
                    self._replay.send_multipart([client, b"", number.to_bytes(8, "big"), payload])
            self._replay.send_multipart([client, b"", _END_OF_REPLAY, b""])
