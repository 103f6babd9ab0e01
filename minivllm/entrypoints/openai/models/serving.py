"""The names under which the one model is served."""

from __future__ import annotations

import time

from minivllm.entrypoints.openai.models.protocol import ModelCard, ModelList
from minivllm.exceptions import ModelNotFoundError


class ServedModels:
    """names: at least one; the first is reported. root: what the operator called the model."""

    def __init__(self, names: list[str], *, root: str, max_model_len: int) -> None:
        self.names = names
        self.root = root
        self.max_model_len = max_model_len
        self._created = int(time.time())

    def resolve(self, name: str | None) -> str:
        """The name to report; None and "" mean the first.

        Raises:
            ModelNotFoundError: no such model; the message lists those served.
        """
        if not name:
            return self.names[0]
        if name not in self.names:
            served = ", ".join(f"`{known}`" for known in self.names)
            raise ModelNotFoundError(
                f"The model `{name[:200]}` does not exist; this server has {served}", param="model"
            )
        return name

    def card(self, name: str) -> ModelCard:
        return ModelCard(self.resolve(name), self._created, self.root, self.max_model_len)

    def list(self) -> ModelList:
        return ModelList([self.card(name) for name in self.names])
