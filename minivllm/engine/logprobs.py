"""One answer's logprobs: rows of numbers from the core to `Logprob`s with text. Owns their order and their sum."""

from __future__ import annotations

from minivllm.messages.engine import EngineCoreOutput, LogprobsLists
from minivllm.outputs import FlatLogprobs, Logprob, PromptLogprobs, SampleLogprobs
from minivllm.sampling_params import SamplingParams
from minivllm.tokenizer.tokenizer import Tokenizer


class LogprobsProcessor:
    """The logprobs of one request so far. What was not asked for stays None."""

    def __init__(self, tokenizer: Tokenizer | None, params: SamplingParams) -> None:
        self._tokenizer = tokenizer if params.detokenize else None
        rows = FlatLogprobs if params.flat_logprobs else list
        self.logprobs: SampleLogprobs | None = None if params.logprobs is None else rows()
        self.cumulative_logprob: float | None = None if params.logprobs is None else 0.0
        self._has_ranks = params.logprob_token_ids is None  # of the tokens beside the sampled one
        self.prompt_logprobs: PromptLogprobs | None = None
        if params.prompt_logprobs is not None:
            self.prompt_logprobs = rows()
            self.prompt_logprobs.append(None)  # nothing predicts the first token of a prompt
        self.prompt_token_id_logprobs: list[list[float]] | None = None
        if params.prompt_logprob_token_ids is not None:
            self.prompt_token_id_logprobs = []
            self._num_rows_to_skip = params.prompt_logprob_start or 0
            self._num_named = len(params.prompt_logprob_token_ids[0])

    def continue_from(self, rows: SampleLogprobs) -> None:
        """Take the rows of an answer begun elsewhere, one for each of its tokens, the token itself first."""
        if self.logprobs is None:
            return
        for row in rows:
            self.logprobs.append(row)
            self.cumulative_logprob += next(iter(row.values())).logprob

    def update(self, output: EngineCoreOutput) -> None:
        """Append the rows of one step."""
        if output.new_logprobs is not None and self.logprobs is not None:
            self.logprobs.extend(self._rows(output.new_logprobs, self._has_ranks))
            self.cumulative_logprob += sum(row[0] for row in output.new_logprobs.logprobs)
        if output.new_prompt_logprobs is not None:
            self._add_prompt(output.new_prompt_logprobs)

    def _add_prompt(self, lists: LogprobsLists) -> None:
        """A row ends in the tokens that prompt_logprob_token_ids named, if it named any."""
        if self.prompt_token_id_logprobs is not None:
            for ids, values in zip(lists.token_ids, lists.logprobs):
                named = slice(len(ids) - self._num_named, None)
                if self._num_rows_to_skip:
                    self._num_rows_to_skip -= 1
                else:
                    self.prompt_token_id_logprobs.append(values[named])
                del ids[named], values[named]
        if self.prompt_logprobs is not None:
            self.prompt_logprobs.extend(self._rows(lists, True))

    def _rows(self, lists: LogprobsLists, has_ranks: bool) -> list[dict[int, Logprob]]:
        return [self._row(*row, has_ranks) for row in zip(lists.token_ids, lists.logprobs, lists.ranks)]

    def _row(
        self, token_ids: list[int], logprobs: list[float], rank: int, has_ranks: bool
    ) -> dict[int, Logprob]:
        """Row: the token itself first, then the most likely (or those asked for), of which it may be one."""
        row: dict[int, Logprob] = {}
        for i, (token, logprob) in enumerate(zip(token_ids, logprobs)):
            if token not in row:
                shown_rank = rank if i == 0 else i if has_ranks else None
                row[token] = Logprob(logprob, shown_rank, self._text(token))
        return row

    def _text(self, token_id: int) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.token_text(token_id)
