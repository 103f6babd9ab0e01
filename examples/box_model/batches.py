"""Documents packed into rows of token ids, several in a row.

Owns tokenizing and packing. A row holds whole documents; what is left over is padding that nobody trains on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from examples.box_model.chat import Segment

DOCUMENTS_AT_ONCE = 1000
IGNORED = -100


@dataclass
class Batch:
    """Four arrays [rows, length]. `targets` holds the next id where it is trained on and IGNORED elsewhere;
    `documents` numbers the documents of a row from 1, padding is 0."""

    ids: Tensor
    targets: Tensor
    positions: Tensor
    documents: Tensor

    def to(self, device: str) -> Batch:
        return Batch(
            *(array.to(device) for array in (self.ids, self.targets, self.positions, self.documents))
        )

    def without_empty_rows(self) -> Batch:
        used = self.documents[:, 0] > 0
        return Batch(self.ids[used], self.targets[used], self.positions[used], self.documents[used])


def encode(
    tokenizer: Tokenizer, documents: Iterable[list[Segment]]
) -> Iterator[tuple[list[int], list[bool]]]:
    """Each document's ids, and which of them the model is trained to say."""
    documents = list(documents)
    encoded = iter(tokenizer.encode_batch([text for document in documents for text, _ in document]))
    for document in documents:
        ids: list[int] = []
        said: list[bool] = []
        for _, is_said in document:
            piece = next(encoded).ids
            ids += piece
            said += [is_said] * len(piece)
        yield ids, said


class Row:
    """One row being filled."""

    def __init__(self, length: int) -> None:
        self.used = 0
        self.count = 0
        self.arrays = np.zeros((4, length), dtype=np.int64)
        self.arrays[1] = IGNORED

    def fits(self, ids: list[int]) -> bool:
        return self.used + len(ids) <= self.arrays.shape[1]

    def add(self, ids: list[int], said: list[bool]) -> None:
        begin, end = self.used, self.used + len(ids)
        self.used, self.count = end, self.count + 1
        self.arrays[0, begin:end] = ids
        self.arrays[1, begin : end - 1] = np.where(said[1:], ids[1:], IGNORED)
        self.arrays[2, begin:end] = range(len(ids))
        self.arrays[3, begin:end] = self.count


def pack(tokenizer: Tokenizer, documents: Iterator[list[Segment]], rows: int, length: int) -> Iterator[Batch]:
    """Batches without end (or until the documents end); a document longer than a row is left out."""
    full: list[Row] = []
    window = [Row(length) for _ in range(rows)]
    while chunk := list(islice(documents, DOCUMENTS_AT_ONCE)):
        for ids, said in encode(tokenizer, chunk):
            if len(ids) > length:
                continue
            place = next((index for index, row in enumerate(window) if row.fits(ids)), None)
            if place is None:
                place = max(range(rows), key=lambda index: window[index].used)
                full.append(window[place])
                window[place] = Row(length)
            window[place].add(ids, said)
            if len(full) == rows:
                yield _batch(full)
                full = []
    rest = full + [row for row in window if row.count]
    for begin in range(0, len(rest), rows):
        part = rest[begin : begin + rows]
        yield _batch(part + [Row(length) for _ in range(rows - len(part))])


def _batch(rows: list[Row]) -> Batch:
    stacked = torch.from_numpy(np.stack([row.arrays for row in rows], axis=1))
    return Batch(*stacked)
