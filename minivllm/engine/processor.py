"""A user's prompt and parameters to an `EngineCoreRequest`: the one place where a request is checked.

Owns validation against the model (vocabulary, lengths, logprobs), defaults, end-of-sequence tokens, seeds
and internal request ids. What passes here cannot make a step of the engine fail.
"""

from __future__ import annotations

import copy
import itertools
import os
import time
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypedDict

from minivllm.config.engine import EngineConfig
from minivllm.config.structured_outputs import read_structured_outputs_config
from minivllm.engine.end_tokens import end_tokens
from minivllm.engine.parallel_sampling import child_seed
from minivllm.engine.prompt_embeds import check_prompt_embeds, check_taken, read_prompt_embeds
from minivllm.engine.structured import make_checker
from minivllm.exceptions import RequestError, UnsupportedError
from minivllm.logits_processors import load_logits_processors
from minivllm.messages.engine import EngineCoreReady, EngineCoreRequest, PromptEmbeds
from minivllm.reasoning.registry import reasoning_parser_class
from minivllm.sampling_params import SamplingParams, StructuredOutputsParams, ThinkingTokens, check_encodable
from minivllm.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from minivllm.reasoning.abstract import ReasoningMarks
    from minivllm.structured_output.checker import GrammarChecker

_MASK_64 = (1 << 64) - 1
_UNSEEDED = 0x756E736565646564  # keeps what --seed gives apart from what equal seeds of requests give


class _TextPrompt(TypedDict):
    prompt: str


class TextPrompt(_TextPrompt, total=False):
    """A prompt as text."""

    cache_salt: str


class _TokensPrompt(TypedDict):
    prompt_token_ids: list[int]


class TokensPrompt(_TokensPrompt, total=False):
    """A prompt as token ids, perhaps with the text they came from."""

    prompt: str
    cache_salt: str


class _EmbedsPrompt(TypedDict):
    prompt_embeds: Any


class EmbedsPrompt(_EmbedsPrompt, total=False):
    """A prompt as vectors in place of embeddings: a tensor or an array, [num_tokens, hidden_size]."""

    cache_salt: str


Prompt = str | list[int] | TextPrompt | TokensPrompt | EmbedsPrompt

_PROMPT_KEYS = {"prompt", "prompt_token_ids", "prompt_embeds", "cache_salt"}
_MAX_BAD_WORDS_TOKENS = 1024  # of all bad words together
_MAX_BIAS = 1e30  # float32 holds it, divided by the lowest temperature and times the highest penalty, too
_MAX_CACHE_SALT = 128  # characters
_NOT_IN_CACHE_SALT = set("@/\\\0")
_MAX_FANNED_OUT_BYTES = 1 << 30  # likewise, of vectors
_MAX_FANNED_OUT_TOKENS = 1 << 22  # prompt tokens of the n requests together: each holds its own list in the core
# generation_config.json's names -> SamplingParams' names
_DEFAULTS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def default_sampling_params(generation_config: dict[str, Any]) -> dict[str, Any]:
    """The sampling parameters a model's generation config sets, under `SamplingParams`' names."""
    return {
        ours: generation_config[theirs]
        for theirs, ours in _DEFAULTS.items()
        if generation_config.get(theirs) is not None
    }


def _check_priority(priority: int) -> None:
    """It only has to fit its message: without `--scheduling-policy priority` it is ignored, as vLLM does."""
    if not isinstance(priority, int) or isinstance(priority, bool) or not -(2**63) <= priority < 2**63:
        raise RequestError(f"priority={priority!r} must be a whole number of 64 bits", param="priority")


@dataclass(frozen=True)
class ParsedPrompt:
    """A prompt taken apart: one of text and token_ids may be missing, or both are, and embeds is given."""

    text: str | None
    token_ids: list[int] | None
    cache_salt: str | None = None
    embeds: Any = None  # as it was given


def parse_prompt(prompt: Prompt) -> ParsedPrompt:
    """Read any of the prompt forms.

    Raises:
        RequestError: it is none of them.
    """
    if isinstance(prompt, str):
        return ParsedPrompt(prompt, None)
    if isinstance(prompt, (list, tuple)):
        return ParsedPrompt(None, list(prompt))
    if not isinstance(prompt, dict):
        raise RequestError(
            f"a prompt is a string, a list of token ids or a dict, not {type(prompt).__name__}",
            param="prompt",
        )
    unknown = set(prompt) - _PROMPT_KEYS
    if unknown:
        raise UnsupportedError(f"prompt key {sorted(unknown)[0]!r} is not supported yet", param="prompt")
    text, token_ids, salt = prompt.get("prompt"), prompt.get("prompt_token_ids"), prompt.get("cache_salt")
    if text is not None and not isinstance(text, str):
        raise RequestError(f"prompt must be a string, not {type(text).__name__}", param="prompt")
    if token_ids is not None and not isinstance(token_ids, (list, tuple)):
        raise RequestError("prompt_token_ids must be a list of token ids", param="prompt")
    embeds = prompt.get("prompt_embeds")
    if text is None and token_ids is None and embeds is None:
        raise RequestError('a prompt dict needs "prompt", "prompt_token_ids" or "prompt_embeds"', param="prompt")
    if embeds is not None and not (text is None and token_ids is None):
        raise RequestError("prompt_embeds stand in place of a prompt; leave one of them out", param="prompt_embeds")
    if salt is not None and not _is_cache_salt(salt):
        raise RequestError(
            f"cache_salt must be a string of 1 to {_MAX_CACHE_SALT} characters without @, /, \\ and NUL",
            param="cache_salt",
        )
    return ParsedPrompt(text, None if token_ids is None else list(token_ids), salt, embeds)


def _is_cache_salt(salt: Any) -> bool:
    return isinstance(salt, str) and 0 < len(salt) <= _MAX_CACHE_SALT and not _NOT_IN_CACHE_SALT & set(salt)


class Processor:
    """Makes requests for one engine. Holds no state of any request; its methods may run in any thread.

    A request without a seed gets one from `--seed` and its place in the order of requests: a script run again
    samples the same, and equal requests still differ.
    """

    def __init__(self, config: EngineConfig, ready: EngineCoreReady, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        self.max_model_len = ready.max_model_len
        self._seed = (config.model.seed ^ _UNSEEDED) & _MASK_64
        self._num_seeded = itertools.count()  # next() is atomic
        self.vocab_size = config.hf_config.vocab_size
        max_logprobs = config.model.max_logprobs
        self._logits_processors = load_logits_processors(config.model.logits_processors)
        self.max_logprobs = self.vocab_size if max_logprobs == -1 else max_logprobs
        self.eos_token_ids, self.extra_stop_token_ids = end_tokens(config, tokenizer)
        self._structured = read_structured_outputs_config(config.structured_outputs.structured_outputs_config)
        self._config = config

    def process_inputs(
        self, request_id: str, prompt: Prompt, params: SamplingParams, priority: int = 0
    ) -> tuple[EngineCoreRequest, str | None]:
        """The request for the core, and the prompt's text if it came as text.

        Raises:
            RequestError: the prompt or a parameter does not fit this model; `param` names it.
        """
        check_encodable("request_id", request_id)
        parsed = parse_prompt(prompt)
        embeds = self._embeds(parsed, params)
        # Zeros stand where there are no tokens.
        token_ids = self._token_ids(parsed, params) if embeds is None else [0] * embeds.num_tokens
        self._check_params(params)
        self._check_prompt_rows(params, len(token_ids))
        if params.n * len(token_ids) > _MAX_FANNED_OUT_TOKENS:
            raise RequestError(
                f"n={params.n} answers to a prompt of {len(token_ids)} tokens are more than {_MAX_FANNED_OUT_TOKENS} "
                "prompt tokens together; lower n or send several requests",
                param="n",
            )
        if embeds is not None and params.n * len(embeds.data) > _MAX_FANNED_OUT_BYTES:
            raise RequestError(
                f"n={params.n} answers to prompt_embeds of {len(embeds.data)} bytes are more than "
                f"{_MAX_FANNED_OUT_BYTES} bytes together; lower n or send several requests",
                param="n",
            )
        _check_priority(priority)
        request = EngineCoreRequest(
            request_id=f"{request_id}-{os.urandom(4).hex()}",
            prompt_token_ids=token_ids,
            sampling_params=self._complete(params, token_ids, known=embeds is None),
            seed=self._seed_of(params),
            eos_token_ids=self.eos_token_ids,
            arrival_time=time.monotonic(),
            priority=priority,
            cache_salt=parsed.cache_salt,
            grammar=self._grammar(params),
            prompt_embeds=embeds,
        )
        return request, parsed.text

    def checks_at_once(self, params: SamplingParams) -> bool:
        """Whether the rest takes no longer than a moment: there is no constraint, or it is known."""
        wanted = params.structured_outputs
        return wanted is None or self.tokenizer is None or self._grammars.knows(self._with_options(wanted))

    def _grammar(self, params: SamplingParams) -> str | None:
        """The grammar of an answer that must have a form."""
        wanted = params.structured_outputs
        if wanted is None:
            return None
        self._check_tokenizer(wanted)
        return self._grammars.grammar_of(self._with_options(wanted))

    def _check_tokenizer(self, wanted: StructuredOutputsParams) -> None:
        if self.tokenizer is None:
            raise wanted.error("there is no tokenizer; drop --skip-tokenizer-init")

    @cached_property
    def _grammars(self) -> GrammarChecker:
        return make_checker(self._config, self.tokenizer)

    def _with_options(self, wanted: StructuredOutputsParams) -> StructuredOutputsParams:
        """What the request asks for, and --structured-outputs-config for all of them."""
        wanted, server = copy.copy(wanted), self._structured
        wanted.disable_any_whitespace |= server.disable_any_whitespace and wanted.whitespace_pattern is None
        wanted.disable_additional_properties |= server.disable_additional_properties
        return wanted

    def prepare(self) -> None:
        """Start what the first constraint needs, unless --structured-outputs-config says when that should be."""
        if self.tokenizer is not None and self._structured.preload is None:
            self._grammars.start()

    def shutdown(self) -> None:
        """End what was started to check requests. Another request starts it again."""
        if "_grammars" in vars(self):
            self._grammars.close()

    def _embeds(self, parsed: ParsedPrompt, params: SamplingParams) -> PromptEmbeds | None:
        if parsed.embeds is None:
            return None
        self._check_embeds_go_with(params)
        return read_prompt_embeds(parsed.embeds, self._config.hf_config.hidden_size, self.max_model_len)

    def _check_embeds_go_with(self, params: SamplingParams) -> None:
        """Raises RequestError: they are not served, or `params` ask for something of the prompt's tokens."""
        check_taken(self._config.model)
        for name in ("prompt_logprobs", "prompt_logprob_token_ids", "truncate_prompt_tokens"):
            if getattr(params, name) is not None:
                raise RequestError(
                    f"{name} needs a prompt of tokens, and prompt_embeds have none; leave one of them out", param=name
                )

    def _token_ids(self, parsed: ParsedPrompt, params: SamplingParams) -> list[int]:
        token_ids = parsed.token_ids
        if token_ids is None:
            if self.tokenizer is None:
                raise RequestError(
                    "text prompts need a tokenizer; send token ids, or drop --skip-tokenizer-init",
                    param="prompt",
                )
            check_encodable("prompt", parsed.text)
            token_ids = self.tokenizer.encode(parsed.text)
        self._check_token_ids(token_ids)
        token_ids = self._truncate(token_ids, params)
        if len(token_ids) >= self.max_model_len:
            raise RequestError(
                f"the prompt has {len(token_ids)} tokens, and the model's context of {self.max_model_len} must also "
                "hold the answer; shorten the prompt or raise --max-model-len",
                param="prompt",
            )
        return token_ids

    def _truncate(self, token_ids: list[int], params: SamplingParams) -> list[int]:
        """The prompt's last `truncate_prompt_tokens` tokens; -1: as many as fit before the answer asked for."""
        limit = params.truncate_prompt_tokens
        if limit is None:
            return token_ids
        longest = max(1, self.max_model_len - (params.max_tokens or 1))
        if limit > longest:
            raise RequestError(
                f"truncate_prompt_tokens={limit} is more than the {longest} tokens that fit before the answer; "
                "lower it, or give -1",
                param="truncate_prompt_tokens",
            )
        return token_ids[-(longest if limit == -1 else limit) :]

    def _check_token_ids(self, token_ids: list[int]) -> None:
        if not token_ids:
            raise RequestError("the prompt is empty; send at least one token", param="prompt")
        try:
            numbers = array("q", token_ids)  # refuses what is no whole number, at C speed
        except (TypeError, OverflowError) as error:
            raise RequestError(
                f"a prompt of token ids must hold whole numbers: {error}", param="prompt"
            ) from error
        low, high = min(numbers), max(numbers)
        if low < 0 or high >= self.vocab_size:
            wrong = low if low < 0 else high
            raise RequestError(
                f"token id {wrong} is outside the vocabulary of {self.vocab_size}", param="prompt"
            )

    def _check_params(self, params: SamplingParams) -> None:
        if params.logprob_token_ids is None:
            self._check_logprobs("logprobs", params.logprobs)
        self._check_logprobs("prompt_logprobs", params.prompt_logprobs)
        self._check_in_vocabulary("stop_token_ids", params.stop_token_ids)
        self._check_in_vocabulary("logprob_token_ids", params.logprob_token_ids)
        for row in params.prompt_logprob_token_ids or ():
            self._check_in_vocabulary("prompt_logprob_token_ids", (token for token in row if token != -1))
        if params.allowed_token_ids is not None:
            if not params.allowed_token_ids:
                raise RequestError(
                    "allowed_token_ids is empty; name at least one token", param="allowed_token_ids"
                )
            if len(params.allowed_token_ids) > self.vocab_size:
                raise RequestError(
                    f"allowed_token_ids holds {len(params.allowed_token_ids)} ids, of a vocabulary of "
                    f"{self.vocab_size}; name each once",
                    param="allowed_token_ids",
                )
            self._check_in_vocabulary("allowed_token_ids", params.allowed_token_ids)
        if params.logit_bias:
            self._check_in_vocabulary("logit_bias", params.logit_bias)
            self._check_biases(params.logit_bias)
        for custom in self._logits_processors:
            try:
                custom.validate_params(params)
            except RequestError:
                raise
            except Exception as error:  # the operator's own check says no in its own way
                raise RequestError(f"{custom.__name__}: {error}", param="extra_args") from error
        if params.thinking_token_budget is not None and self._marks is None:
            raise RequestError(
                f"thinking_token_budget={params.thinking_token_budget} needs to know how the model marks what it "
                "thinks; start the server with --reasoning-parser, or leave it out",
                param="thinking_token_budget",
            )
        if (
            params.thinking_token_budget is not None
            and params.structured_outputs is not None
            and self._structured.enable_in_reasoning
        ):
            raise RequestError(
                f"thinking_token_budget={params.thinking_token_budget} ends thinking, which is a part of what "
                f"{params.structured_outputs.param} asks for (enable_in_reasoning of --structured-outputs-config); "
                "leave one of them out",
                param="thinking_token_budget",
            )
        if params.bad_words and self.tokenizer is None:
            raise RequestError(
                "bad_words need a tokenizer; use logit_bias, or drop --skip-tokenizer-init", param="bad_words"
            )
        if params.stop and self.tokenizer is None:
            raise RequestError(
                "stop strings need a tokenizer; use stop_token_ids, or drop --skip-tokenizer-init",
                param="stop",
            )

    def _check_leaves_a_token(self, params: SamplingParams) -> None:
        """Contradictions that need no model: every first token is forbidden. params: as the core runs them.

        Those with a grammar show when its mask is made, see `Sampler`.
        """
        allowed = params.allowed_token_ids
        candidates = range(self.vocab_size) if allowed is None else set(allowed)
        forbidden = {
            "bad_words": {words[0] for words in params.bad_words_token_ids if len(words) == 1},
            "min_tokens": {*self.eos_token_ids, *params.stop_token_ids} if params.min_tokens else set(),
        }
        all_forbidden = set().union(*forbidden.values())
        if len(all_forbidden) < len(candidates) or not all_forbidden.issuperset(candidates):
            return
        names = [name for name, ids in forbidden.items() if not ids.isdisjoint(candidates)]
        raise RequestError(
            f"{' and '.join(names)} forbid{'s' if len(names) == 1 else ''} every token "
            f"{'there is' if allowed is None else 'of allowed_token_ids'}"
            f"{' (an answer must not end before min_tokens)' if 'min_tokens' in names else ''}; allow another token",
            param=names[0] if allowed is None else "allowed_token_ids",
        )

    @staticmethod
    def _check_prompt_rows(params: SamplingParams, num_prompt_tokens: int) -> None:
        """Of prompt_logprob_token_ids there is a row for each token of the prompt after the first, from start on."""
        rows, start = params.prompt_logprob_token_ids, params.prompt_logprob_start or 0
        if rows is not None and len(rows) != num_prompt_tokens - 1 - start:
            raise RequestError(
                f"prompt_logprob_token_ids has {len(rows)} rows; a prompt of {num_prompt_tokens} tokens with "
                f"prompt_logprob_start={start} needs {max(0, num_prompt_tokens - 1 - start)}",
                param="prompt_logprob_token_ids",
            )

    def _check_logprobs(self, name: str, asked: int | None) -> None:
        if asked is None:
            return
        wanted = self.vocab_size if asked == -1 else asked
        if wanted > self.max_logprobs:
            raise RequestError(
                f"{name}={asked} asks for {wanted} logprobs, more than --max-logprobs {self.max_logprobs}",
                param=name,
            )

    def _check_in_vocabulary(self, name: str, token_ids: Iterable[int] | None) -> None:
        for token in token_ids or ():
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < self.vocab_size:
                raise RequestError(
                    f"{name}: {token!r} is no token id of a vocabulary of {self.vocab_size}", param=name
                )

    @staticmethod
    def _check_biases(logit_bias: dict[int, float]) -> None:
        for token, bias in logit_bias.items():
            if not isinstance(bias, (int, float)) or isinstance(bias, bool) or not abs(bias) <= _MAX_BIAS:
                raise RequestError(
                    f"logit_bias of token {token} must be a number from -{_MAX_BIAS:g} to {_MAX_BIAS:g}, got {bias!r}",
                    param="logit_bias",
                )

    def _complete(self, params: SamplingParams, prompt_token_ids: list[int], *, known: bool = True) -> SamplingParams:
        """The parameters as the core runs them. The answer ends where the context does, as in vLLM.

        known: whether the ids are the prompt's, and not in the place of embeddings.
        """
        num_prompt_tokens = len(prompt_token_ids)
        room = self.max_model_len - num_prompt_tokens
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        if params.min_tokens > max_tokens:
            raise RequestError(
                f"min_tokens={params.min_tokens} leaves no room: the prompt is {num_prompt_tokens} of "
                f"{self.max_model_len} tokens; lower it, shorten the prompt or raise --max-model-len",
                param="min_tokens",
            )
        changes: dict[str, Any] = {"max_tokens": max_tokens}
        if self.extra_stop_token_ids and not params.ignore_eos:
            changes["stop_token_ids"] = [*params.stop_token_ids, *self.extra_stop_token_ids]
        if self.tokenizer is None:
            changes["detokenize"] = False
        changes["bad_words_token_ids"] = self._bad_words(params.bad_words)
        changes["thinking"] = self._thinking(params, prompt_token_ids if known else [])
        completed = params.clone(**changes)
        self._check_leaves_a_token(completed)
        return completed

    def _thinking(self, params: SamplingParams, prompt_token_ids: list[int]) -> ThinkingTokens | None:
        """Where the answer thinks, if something begins or is forced where that ends."""
        waits = params.structured_outputs is not None and not self._structured.enable_in_reasoning
        if self._marks is None or not (waits or params.thinking_token_budget is not None):
            return None
        marks = self._marks
        ends = [] if params.ignore_eos or not waits else [*self.eos_token_ids, *self.extra_stop_token_ids]
        return ThinkingTokens(
            list(marks.start),
            list(marks.end),
            marks.is_open_after(prompt_token_ids),
            withheld=[token for token in ends if token < self.vocab_size],
        )

    @cached_property
    def _marks(self) -> ReasoningMarks | None:
        parser = reasoning_parser_class(self._config.reasoning)
        if parser is None or self.tokenizer is None:
            return None
        return parser.marks(lambda text: self.tokenizer.encode(text, add_special_tokens=False))

    def _bad_words(self, words: list[str]) -> list[list[int]]:
        """Token ids of each word at the start of a text, and within one, where a space before it makes another
        first token but no further ones (vLLM's rule).

        Raises:
            RequestError: a word has a token that the model does not, or they have too many tokens.
        """
        found: list[list[int]] = []
        for word in words:
            alone = self.tokenizer.encode(word.lstrip(), add_special_tokens=False)
            spaced = self.tokenizer.encode(" " + word.lstrip(), add_special_tokens=False)
            found.append(alone)
            if len(spaced) == len(alone) and spaced[:1] != alone[:1]:
                found.append(spaced)
        found = [ids for ids in found if ids]
        for ids in found:
            self._check_in_vocabulary("bad_words", ids)
        num_tokens = sum(map(len, found))
        if num_tokens > _MAX_BAD_WORDS_TOKENS:
            raise RequestError(
                f"bad_words are {num_tokens} tokens; at most {_MAX_BAD_WORDS_TOKENS} fit", param="bad_words"
            )
        return found

    def _seed_of(self, params: SamplingParams) -> int:
        """0 … 2**64 - 1: the request's own, a negative one in two's complement, or the next of ours."""
        if params.seed is None:
            return child_seed(self._seed, next(self._num_seeded))
        return params.seed & _MASK_64

    # Resends

    def check_resend(self, request: EngineCoreRequest, params: SamplingParams) -> EngineCoreRequest:
        """A request made before, by this front end or another: it keeps its id, seed and prior output.

        Raises:
            RequestError: it does not fit this model, or `params` are not its own.
        """
        if params != request.sampling_params:
            raise RequestError(
                "sampling_params differ from those the request carries; pass request.sampling_params",
                param="sampling_params",
            )
        if params.n > 1 and request.prior_output_token_ids:
            raise RequestError(
                f"n={params.n} answers have each a prior output of their own; resend each as a request with n=1",
                param="n",
            )
        prompt, prior = request.prompt_token_ids, request.prior_output_token_ids
        if request.lora is not None:
            raise UnsupportedError("a request with an adapter (lora) cannot be run here", param="lora")
        if request.prompt_embeds is not None:
            self._check_embeds_go_with(params)
            check_prompt_embeds(request.prompt_embeds, self._config.hf_config.hidden_size)
            num_vectors = request.prompt_embeds.num_tokens
            if prompt != [0] * num_vectors:
                raise RequestError(
                    f"prompt_token_ids must hold {num_vectors} zeros, one for each of prompt_embeds", param="prompt"
                )
        self._check_token_ids(prompt)
        if prior:
            self._check_token_ids(prior)
        if len(prompt) >= self.max_model_len or len(prompt) + len(prior) > self.max_model_len:
            raise RequestError(
                f"prompt and prior output have {len(prompt)} and {len(prior)} tokens, and the model's context is "
                f"{self.max_model_len}; raise --max-model-len to what it was",
                param="prompt",
            )
        self._check_params(params)
        self._check_leaves_a_token(params)
        self._check_prompt_rows(params, len(prompt))
        self._check_grammar(request, params)
        return request

    def _check_grammar(self, request: EngineCoreRequest, params: SamplingParams) -> None:
        if (request.grammar is None) != (params.structured_outputs is None):
            raise RequestError(
                "structured_outputs and the grammar made of it must come together", param="structured_outputs"
            )
        if request.grammar is None:
            return
        self._check_tokenizer(params.structured_outputs)
        error = self._grammars.why_not(request.grammar)
        if error is not None:
            raise params.structured_outputs.error(error)
