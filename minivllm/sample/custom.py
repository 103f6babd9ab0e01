"""The operator's own logits processors, at their two places in the sampler.

Owns the batch as they see it: requests at indices without gaps, and what changed since the last step. A processor
that raises fails the requests of that step, and is made anew for the next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from minivllm.logger import init_logger
from minivllm.logits_processors import AddedRequest, BatchUpdate, LogitsProcessor, MoveDirectionality
from minivllm.sample.step import SampleBatch
from minivllm.sampling_params import SamplingParams

logger = init_logger(__name__)

Move = tuple[int, int, MoveDirectionality]


@dataclass
class _Member:
    """A request in the batch."""

    row: int
    output: list[int] = field(default_factory=list)


class CustomProcessors:
    """A step of the sampler like the others (see `LogitsStep`), but for whole batches."""

    def __init__(self, make: Callable[[], list[LogitsProcessor]]) -> None:
        self._make = make
        self._params: dict[int, SamplingParams] = {}  # by table row
        self._is_lost = False  # a processor raised in this step
        self._reset()

    def _reset(self) -> None:
        processors = self._make()
        self._invariant = [p for p in processors if p.is_argmax_invariant()]
        self._others = [p for p in processors if not p.is_argmax_invariant()]
        self._members: list[_Member | None] = []  # by index; None: gone since the last step
        self._index_of: dict[int, int] = {}  # by table row
        self._columns: list[int] = []  # by index

    def add_request(self, row: int, params: SamplingParams, eos_token_ids: list[int]) -> None:
        self._params[row] = params

    def remove_request(self, row: int) -> None:
        self._params.pop(row, None)
        index = self._index_of.pop(row, None)
        if index is not None:
            self._members[index] = None

    def apply(self, logits: torch.Tensor, batch: SampleBatch) -> str | None:
        """Tell all what the batch is, and let those that may change the argmax change the logits in place.

        Returns why the batch cannot go on, if a processor raised.
        """
        self._is_lost = False
        try:
            update = self._follow(batch)
            for processor in self._others + self._invariant:
                processor.update_state(update)
        except Exception as error:
            return self._failed(error)
        return self._run(self._others, logits)

    def apply_invariant(self, logits: torch.Tensor, is_sampled: torch.Tensor) -> str | None:
        """Let the others change the logits of the requests that sample, [M] bool; as `apply`, which came before."""
        if self._is_lost or not self._invariant or not is_sampled.any():
            return None
        greedy = ~is_sampled
        kept = logits[greedy]
        why = self._run(self._invariant, logits)
        logits[greedy] = kept
        return why

    def _run(self, processors: list[LogitsProcessor], logits: torch.Tensor) -> str | None:
        in_order = self._columns == list(range(len(self._columns)))
        for processor in processors:
            given = logits if in_order else logits[self._columns]
            try:
                result = processor.apply(given)
                if result.shape != logits.shape:
                    raise ValueError(f"apply gave {list(result.shape)} for logits of {list(logits.shape)}")
                if not in_order:
                    logits[self._columns] = result
                elif result is not logits:
                    logits.copy_(result)
            except Exception as error:
                return self._failed(error, processor)
        return None

    def _failed(self, error: Exception, processor: LogitsProcessor | None = None) -> str:
        name = type(processor).__name__ if processor is not None else "update_state"
        logger.error("a logits processor failed (%s)", name, exc_info=error)
        self._reset()
        self._is_lost = True
        return f"a logits processor of this server failed ({name}: {type(error).__name__}: {error})"

    # The batch as processors see it ----------------------------------------------

    def _follow(self, batch: SampleBatch) -> BatchUpdate | None:
        """Make our indices those of this batch; what that takes."""
        rows = batch.rows.tolist()
        present = set(rows)
        for index, member in enumerate(self._members):
            if member is not None and member.row not in present:
                del self._index_of[member.row]
                self._members[index] = None
        holes = [index for index, member in enumerate(self._members) if member is None]
        added = [self._join(row, column, batch, holes) for column, row in enumerate(rows) if row not in self._index_of]
        moved = self._close(holes)
        self._columns = [0] * len(rows)
        for column, row in enumerate(rows):
            index = self._index_of[row]
            self._columns[index] = column
            self._catch_up(self._members[index], column, batch)
        return BatchUpdate(len(rows), holes, added, moved) if holes or added or moved else None

    def _join(self, row: int, column: int, batch: SampleBatch, holes: list[int]) -> AddedRequest:
        index = holes.pop(0) if holes else len(self._members)
        member = _Member(row)
        self._members[index : index + 1] = [member]
        self._index_of[row] = index
        prompt = batch.token_ids[row, batch.first_token(column) : batch.num_prompt_tokens[column]].tolist()
        return AddedRequest(index, self._params[row], prompt, member.output)

    def _close(self, holes: list[int]) -> list[Move]:
        """Fill the first holes with the last requests."""
        moved: list[Move] = []
        for hole in holes:
            while self._members and self._members[-1] is None:
                self._members.pop()
            if hole >= len(self._members):
                break
            last = len(self._members) - 1
            member = self._members[hole] = self._members.pop()
            self._index_of[member.row] = hole
            moved.append((last, hole, MoveDirectionality.UNIDIRECTIONAL))
        return moved

    @staticmethod
    def _catch_up(member: _Member, column: int, batch: SampleBatch) -> None:
        begin = batch.num_prompt_tokens[column] + len(member.output)
        member.output += batch.token_ids[member.row, begin : batch.num_tokens[column]].tolist()
