"""MessagePack, typed. No pickle: a byte string of ours can only ever become one of our structs."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgspec

T = TypeVar("T")

_encoder = msgspec.msgpack.Encoder()


def encode(message: Any) -> bytes:
    """Encode a struct, a dataclass, or plain values."""
    return _encoder.encode(message)


class Decoder(Generic[T]):
    """Decodes bytes into exactly `T`.

    Raises (on call):
        msgspec.DecodeError, msgspec.ValidationError: the bytes are not a `T`.
    """

    def __init__(self, type_: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(type_)

    def __call__(self, data: bytes | memoryview) -> T:
        return self._decoder.decode(data)
