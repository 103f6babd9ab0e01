"""GET /v1/models: the bodies."""

from __future__ import annotations

import msgspec


class ModelCard(msgspec.Struct, tag_field="object", tag="model"):
    id: str
    created: int
    root: str
    max_model_len: int
    parent: str | None = None
    owned_by: str = "minivllm"


class ModelList(msgspec.Struct, tag_field="object", tag="list"):
    data: list[ModelCard]
