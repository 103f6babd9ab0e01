"""From token ids to vectors and back to logits; tied models keep one packed matrix for both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from minivllm.layers.linear import linear_class
from minivllm.layers.weight import Weight, weight_of
from minivllm.ops.embedding import embedding
from minivllm.ops.op import OpSpec


@dataclass(frozen=True)
class GivenEmbeddings:
    """Vectors that some of a step's rows have in place of their tokens' embeddings, where the model is."""

    rows: torch.Tensor  # [K] int64, of the step
    values: torch.Tensor  # [K, hidden_size], in the model's dtype

    def put_into(self, embeddings: torch.Tensor) -> None:
        """embeddings: [T, hidden_size], changed in place."""
        embeddings.index_copy_(0, self.rows, self.values)


class LMHead:
    """Hidden states to logits."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        dtype: torch.dtype,
        device: str,
        quantization: str | None = None,
    ) -> None:
        if quantization == "int4":
            quantization = "int8"  # what four bits would cost here goes into every logit
        packed = linear_class(vocab_size, hidden_size, dtype=dtype, device=device, quantization=quantization)
        self.packed = packed(vocab_size, hidden_size, dtype)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [M, hidden_size] -> [M, vocab_size] float32."""
        return self.packed(hidden, out_dtype=torch.float32)

    def likeliest(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden: [M, hidden_size] -> each row's likeliest token, [M] int64; 1 for a row that has none, [M] uint8."""
        return self.packed.likeliest(hidden)

    def weights(self) -> Iterator[Weight]:
        shape = (self.packed.out_features, self.packed.in_features)
        yield Weight("weight", shape, self.packed.load_rows, self.packed.nbytes, self.packed.tensors)


class Embedding:
    """A table of its own."""

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: torch.dtype, device: str) -> None:
        self.weight = torch.empty(vocab_size, hidden_size, dtype=dtype, device=device)
        self._embedding = embedding.select(OpSpec(device, dtype))

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: [T] int64 -> [T, hidden_size]."""
        return self._embedding(ids, self.weight)

    def weights(self) -> Iterator[Weight]:
        yield weight_of("weight", self.weight)


class TiedEmbedding:
    """Rows of the LM head's matrix, which it shares."""

    def __init__(self, head: LMHead) -> None:
        self._head = head

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: [T] int64 -> [T, hidden_size]."""
        return self._head.packed.rows(ids)

    def weights(self) -> Iterator[Weight]:
        return self._head.weights()
