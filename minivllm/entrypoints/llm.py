"""Offline use: `LLM(model).generate(prompts)`.

Owns the forms prompts may come in, the progress bar, and the order of the outputs. Knows nothing of HTTP.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from minivllm.engine.arg_utils import EngineArgs
from minivllm.engine.beam_search import Beam, BeamSearch
from minivllm.engine.llm_engine import LLMEngine
from minivllm.engine.processor import Prompt, parse_prompt
from minivllm.entrypoints.chat_utils import ContentFormat, is_conversation, parse_messages
from minivllm.exceptions import RequestError
from minivllm.logger import configure, init_logger
from minivllm.outputs import BeamSearchOutput, BeamSearchSequence, RequestOutput
from minivllm.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
from minivllm.tokenizer.chat_template import content_format
from minivllm.tokenizer.tokenizer import Tokenizer

logger = init_logger(__name__)

Message = dict[str, Any]
Params = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """A model ready to generate. Its engine core is a process of its own, ended by `shutdown`, by leaving a `with`
    block, or with the object.

    model: a local directory or a hub id, the model in the box when not given; chat_template: a file or Jinja text,
    for `chat`. Other keywords are the fields of EngineArgs; a misspelt one is an error that names the nearest.
    `disable_frontend_multiprocessing=True` runs the engine core in this process.

    Raises:
        ConfigError, ModelFilesError, EngineStartError: the engine cannot start as asked.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = "",
        *,
        chat_template: str | None = None,
        disable_log_stats: bool = True,
        **engine_args: Any,
    ) -> None:
        self._start(EngineArgs(model, disable_log_stats=disable_log_stats, **engine_args), chat_template)

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> LLM:
        llm = cls.__new__(cls)
        llm._start(engine_args, None)
        return llm

    def _start(self, engine_args: EngineArgs, chat_template: str | None) -> None:
        configure("LLM", engine_args.log_level)
        self._chat_template = read_template(chat_template)
        self._ids = itertools.count()
        self._turn = threading.Lock()
        self._sleeps = False
        self.llm_engine = LLMEngine.from_engine_args(engine_args)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete each prompt; outputs come in the prompts' order.

        prompts: a text, token ids, a dict (see TextPrompt, TokensPrompt, EmbedsPrompt), or a list of any of these.
        sampling_params: one for all, one for each, or None for the model's defaults.
        priority: one for each prompt, lower first; read under scheduling_policy="priority" only.

        One call at a time runs; calls of other threads wait for their turn.
        A request that fails inside the engine comes back with finish_reason "error" and `error` set; the others go on.
        Ctrl-C aborts them all.

        Raises:
            RequestError: some prompt or parameter is wrong; none has been run.
            EngineDeadError: the engine is gone.
        """
        prompts = _as_list(prompts)
        params = self._params_for(prompts, sampling_params)
        if priority is not None and len(priority) != len(prompts):
            raise RequestError(
                f"{len(prompts)} prompts but {len(priority)} priorities; give one each", param="priority"
            )
        priorities = priority or [0] * len(prompts)
        checked = [self._check(*item, index) for index, item in enumerate(zip(prompts, params, priorities))]
        ids = [str(next(self._ids)) for _ in prompts]
        with self._turn:
            if self._sleeps:
                raise RequestError("the engine sleeps; call wake_up() first")
            try:
                for item in zip(ids, checked, params, priorities):
                    self.llm_engine.add_request(*item)
                outputs = self._run(set(ids), use_tqdm)
            except BaseException:
                # Also for what is no Exception: an interrupted call must not leave work running behind the next one.
                with contextlib.suppress(Exception):
                    self.llm_engine.abort_request(ids)
                raise
        return [outputs[request_id] for request_id in ids]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | None = None,
        chat_template_content_format: ContentFormat | Literal["auto"] = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several; the rest is as in `generate`."""
        tokenizer = self._tokenizer()
        conversations = [messages] if is_conversation(messages) else messages
        template = read_template(chat_template) or self._chat_template
        in_use = template or tokenizer.template_for(tools) or ""
        form = chat_template_content_format
        if form == "auto":
            form = content_format(in_use)
        options = {
            "chat_template": template,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "tools": tools,
            **(chat_template_kwargs or {}),
        }
        prompts = []
        for conversation in conversations:
            text = tokenizer.render_chat_template(parse_messages(conversation, form, template=in_use), **options)
            prompts.append({"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)})
        return self.generate(prompts, sampling_params, use_tqdm, priority=priority)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        use_tqdm: bool = False,
        *,
        concurrency_limit: int | None = None,
    ) -> list[BeamSearchOutput]:
        """The `beam_width` likeliest answers to each prompt, best first; outputs come in the prompts' order.

        concurrency_limit: prompts searched at once; None: all.

        Raises:
            RequestError: some prompt or parameter is wrong; none has been run.
            EngineGenerateError: a request failed inside the engine; EngineDeadError: the engine is gone.
        """
        prompts = _as_list(prompts)
        if concurrency_limit is not None and concurrency_limit < 1:
            raise RequestError(f"concurrency_limit must be at least 1, got {concurrency_limit}")
        checked = [self._check(prompt, SamplingParams(), 0, index) for index, prompt in enumerate(prompts)]
        if any("prompt_embeds" in each for each in checked):
            raise RequestError("beam search needs prompts of tokens, not prompt_embeds", param="prompt_embeds")
        searches = [BeamSearch(each["prompt_token_ids"], params, self.llm_engine.processor) for each in checked]
        extras = [{k: v for k, v in each.items() if k == "cache_salt"} for each in checked]
        at_once = concurrency_limit or len(searches) or 1
        with tqdm(total=len(searches), desc="Beam search", disable=not use_tqdm) as bar:
            for begin in range(0, len(searches), at_once):
                self._search(searches[begin : begin + at_once], extras[begin : begin + at_once])
                bar.update(len(searches[begin : begin + at_once]))
        return [BeamSearchOutput([self._sequence(search, beam) for beam in search.best()]) for search in searches]

    def _search(self, searches: list[BeamSearch], extras: list[dict[str, str]]) -> None:
        """Take all searches to their ends, a step of each at a time."""
        while going := [(search, extra) for search, extra in zip(searches, extras) if not search.finished]:
            asked = [[{"prompt_token_ids": ids} | extra for ids in search.prompts()] for search, extra in going]
            flat = [prompt for prompts in asked for prompt in prompts]
            outputs = iter(self.generate(flat, going[0][0].step_params, use_tqdm=False))
            for (search, _), prompts in zip(going, asked):
                search.advance(list(itertools.islice(outputs, len(prompts))))

    def _sequence(self, search: BeamSearch, beam: Beam) -> BeamSearchSequence:
        tokens = search.prompt_token_ids + beam.token_ids
        tokenizer = self.llm_engine.tokenizer
        hides_special = search.params.skip_special_tokens
        return BeamSearchSequence(
            tokens=tokens,
            logprobs=beam.logprobs,
            cum_logprob=beam.cum_logprob,
            text=None if tokenizer is None else tokenizer.decode(tokens, skip_special_tokens=hides_special),
            finish_reason="stop" if beam.stopped else "length",
            stop_reason=beam.token_ids[-1] if beam.stopped else None,
        )

    def get_tokenizer(self) -> Any:
        """The tokenizer as transformers has it: a copy, so that its settings cannot change the engine's."""
        return self._tokenizer_copy

    @cached_property
    def _tokenizer_copy(self) -> Any:
        return copy.deepcopy(self._tokenizer().hf)

    def _tokenizer(self) -> Tokenizer:
        if self.llm_engine.tokenizer is None:
            raise RequestError("there is no tokenizer: LLM was made with skip_tokenizer_init=True")
        return self.llm_engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses when it is given none: the generation config's values over SamplingParams' own."""
        return SamplingParams(**self.llm_engine.default_sampling_params)

    def reset_prefix_cache(self) -> bool:
        """Forget every cached KV block."""
        return self.llm_engine.reset_prefix_cache()

    def sleep(self, level: int = 1) -> None:
        """Give back the KV cache's memory, at level 2 the weights' too, until `wake_up`; needs enable_sleep_mode."""
        with self._turn:
            self.llm_engine.sleep(level)
            self._sleeps = True

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Have memory again: "weights" (read again if they were given back), "kv_cache", or by default all of it."""
        with self._turn:
            self._sleeps = not self.llm_engine.wake_up(tags)

    def start_profile(self, profile_prefix: str = "") -> None:
        """Record the steps to come into the directory of profiler_config."""
        with self._turn:
            if not self.llm_engine.start_profile(profile_prefix):
                raise RequestError("a profile is being recorded; stop_profile ends it")

    def stop_profile(self) -> list[str]:
        """End the recording; the files it is in."""
        with self._turn:
            return self.llm_engine.stop_profile()

    def shutdown(self) -> None:
        """End the engine; a second call does nothing."""
        if "llm_engine" in self.__dict__:  # not when the start failed
            self.llm_engine.shutdown()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.shutdown()

    def __del__(self) -> None:
        # At interpreter exit half of the modules are gone, and the core ends with us anyway.
        with contextlib.suppress(Exception):
            self.shutdown()

    def _params_for(self, prompts: list[Prompt], given: Params) -> list[SamplingParams]:
        if given is None:
            given = self.get_default_sampling_params()
        params = [given] * len(prompts) if isinstance(given, SamplingParams) else list(given)
        for each in params:
            if not isinstance(each, SamplingParams):
                raise RequestError(
                    f"sampling_params must hold SamplingParams, got {each!r}; write SamplingParams(temperature=…)",
                    param="sampling_params",
                )
        if len(params) != len(prompts):
            raise RequestError(
                f"{len(prompts)} prompts but {len(params)} sampling_params; give one each, or one for all",
                param="sampling_params",
            )
        return [each.clone(output_kind=RequestOutputKind.FINAL_ONLY) for each in params]

    def _check(self, prompt: Prompt, params: SamplingParams, priority: int, index: int) -> Prompt:
        """The prompt with its token ids, having passed every check of the engine's."""
        try:
            request, text = self.llm_engine.processor.process_inputs("check", prompt, params, priority)
        except RequestError as error:
            raise type(error)(f"prompt {index}: {error}", param=error.param) from error
        checked: Prompt = {"prompt": text, "prompt_token_ids": request.prompt_token_ids}
        if request.prompt_embeds is not None:
            checked = {"prompt_embeds": request.prompt_embeds}
        salt = parse_prompt(prompt).cache_salt
        return checked if salt is None else {**checked, "cache_salt": salt}

    def _run(self, ids: set[str], use_tqdm: bool) -> dict[str, RequestOutput]:
        """Step until these requests are finished."""
        outputs: dict[str, RequestOutput] = {}
        with _Progress(len(ids), shown=use_tqdm) as progress:
            while len(outputs) < len(ids):
                for output in self.llm_engine.step():
                    if output.finished and output.request_id in ids:
                        outputs[output.request_id] = output
                        progress.add(output)
        for request_id, output in outputs.items():
            if output.error is not None:
                logger.error("request %s failed in the engine: %s", request_id, output.error)
        return outputs


class _Progress:
    """vLLM's bar: requests done, and tokens per second in and out so far."""

    def __init__(self, total: int, *, shown: bool) -> None:
        self._bar = tqdm(
            total=total,
            desc="Processed prompts",
            disable=not shown,
            dynamic_ncols=True,
            postfix="est. speed input: 0.00 toks/s, output: 0.00 toks/s",
        )
        self._num_input_tokens = 0
        self._num_output_tokens = 0

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._bar.close()

    def add(self, output: RequestOutput) -> None:
        self._num_input_tokens += output.num_prompt_tokens
        self._num_output_tokens += sum(len(answer.token_ids) for answer in output.outputs)
        if self._bar.disable:
            return
        elapsed = self._bar.format_dict["elapsed"] or 1e-9
        self._bar.set_postfix_str(
            f"est. speed input: {self._num_input_tokens / elapsed:.2f} toks/s, "
            f"output: {self._num_output_tokens / elapsed:.2f} toks/s",
            refresh=False,
        )
        self._bar.update(1)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list. [] is no prompts; [1, 2] is one prompt of two tokens."""
    if isinstance(prompts, (str, dict)):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise RequestError(f"prompts must be a string, token ids, a dict or a list, not {type(prompts).__name__}")
    return [list(prompts)] if prompts and isinstance(prompts[0], int) else list(prompts)


def read_template(template: str | None) -> str | None:
    """The text of a chat template given as a file or as text.

    Raises:
        RequestError: it is neither a file nor Jinja text.
    """
    if template is None or any(brace in template for brace in ("{{", "{%", "{#")):
        return template
    try:
        return Path(template).read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(
            f"chat_template {template!r} is neither Jinja text nor a file that can be read: {error.strerror}",
            param="chat_template",
        ) from error
