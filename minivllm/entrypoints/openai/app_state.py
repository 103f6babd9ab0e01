"""What serves each route, built once the engine is known, and put where the routes look: `app.state`."""

from __future__ import annotations

import hashlib
import json
import time
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from minivllm.config.frontend import FrontendConfig
from minivllm.config.profiler import read_profiler_config
from minivllm.entrypoints.openai.app import frontend_config
from minivllm.logger import init_logger
from minivllm.tracing import RequestTracer
from minivllm.utils.box_model import is_box_model
from minivllm.version import __version__

if TYPE_CHECKING:
    from fastapi import FastAPI

    from minivllm.config.engine import EngineConfig
    from minivllm.engine.async_llm import AsyncLLM
    from minivllm.engine.front import StatLogger
    from minivllm.entrypoints.answer_format import AnswerFormat
    from minivllm.entrypoints.openai.request_log import RequestLog
    from minivllm.messages.stats import IterationStats, SchedulerStats

logger = init_logger(__name__)


class StatLoggers:
    """Hands the engine's numbers to loggers that are made once the engine is known."""

    def __init__(self) -> None:
        self.loggers: list[StatLogger] = []

    def record(self, scheduler_stats: SchedulerStats | None, iteration: IterationStats) -> None:
        for stat_logger in self.loggers:
            stat_logger.record(scheduler_stats, iteration)

    def log(self, now: float) -> None:
        for stat_logger in self.loggers:
            stat_logger.log(now)


def init_app_state(engine: AsyncLLM, args: Namespace, app: FastAPI, stats: StatLoggers | None = None) -> None:
    """Give the app its engine, and build what serves each route."""
    from minivllm.entrypoints.openai.batch.serving import ServingBatch
    from minivllm.entrypoints.openai.chat_completion.serving import ServingChat
    from minivllm.entrypoints.openai.completion.serving import ServingCompletion
    from minivllm.entrypoints.openai.messages.serving import ServingMessages
    from minivllm.entrypoints.openai.models.serving import ServedModels
    from minivllm.entrypoints.openai.playground.feed import EngineFeed
    from minivllm.entrypoints.openai.profile.serving import ServingProfile
    from minivllm.entrypoints.openai.render import Renderer, TemplateSettings
    from minivllm.entrypoints.openai.responses.serving import ServingResponses
    from minivllm.entrypoints.openai.serving_base import ServingSettings
    from minivllm.entrypoints.openai.tokenize.serving import ServingTokenize
    from minivllm.metrics.logging import LoggingStatLogger
    from minivllm.metrics.prometheus import PrometheusStatLogger
    from minivllm.metrics.serving import SleepMetrics, ToolCallMetrics

    frontend, ready, state = frontend_config(args), engine.ready, app.state
    names = engine.config.model.served_model_name or [args.model]
    state.engine = engine
    state.engine_feed = EngineFeed(engine, state.lifecycle)
    state.models = ServedModels(names, root=args.model, max_model_len=ready.max_model_len)
    several = frontend.api_server_count > 1
    if stats is not None and not engine.config.observability.disable_log_stats:
        stats.loggers += [
            PrometheusStatLogger(state.registry, names[0], ready, multiprocess=several),
            LoggingStatLogger(time.monotonic()),
        ]
    templates = TemplateSettings(
        chat_template=read_chat_template(frontend.chat_template),
        content_format=frontend.chat_template_content_format,
        template_kwargs=frontend.default_chat_template_kwargs or {},
        trust_request_template=frontend.trust_request_chat_template,
    )
    _warn_of_other_template(engine, templates.chat_template)
    renderer = state.renderer = Renderer(
        engine.tokenizer, max_model_len=ready.max_model_len, templates=templates
    )
    counts = not engine.config.observability.disable_log_stats
    state.sleep_metrics = SleepMetrics(state.registry)
    endpoint = engine.config.observability.otlp_traces_endpoint
    state.tracer = None if endpoint is None else RequestTracer(endpoint, names[0])
    settings = ServingSettings(
        response_role=frontend.response_role,
        return_tokens_as_token_ids=frontend.return_tokens_as_token_ids,
        force_include_usage=frontend.enable_force_include_usage,
        system_fingerprint=_fingerprint(engine, names[0]),
        exclude_tools_when_none=frontend.exclude_tools_when_tool_choice_none,
        answer_format=answer_format(frontend, engine.config),
        shows_cached_tokens=frontend.enable_prompt_tokens_details,
        keep_alive_s=frontend.sse_keep_alive_interval,
        request_log=_request_log(frontend),
        tracer=state.tracer,
        tool_metrics=ToolCallMetrics(state.registry, names[0]) if counts else None,
    )
    common = (engine, state.models, renderer, state.lifecycle, settings)
    state.serving_completion = ServingCompletion(*common)
    state.serving_chat = ServingChat(*common)
    state.serving_profile = ServingProfile(
        engine, read_profiler_config(engine.config.observability.profiler_config)
    )
    state.serving_tokenize = ServingTokenize(state.models, renderer)
    chat = state.serving_chat
    state.serving_batch = ServingBatch(chat)
    state.serving_messages = ServingMessages(chat, state.lifecycle, settings.keep_alive_s)
    # Several servers share no memory: what one had stored, the next request would not find.
    state.serving_responses = ServingResponses(chat, state.lifecycle, settings.keep_alive_s, stores=not several)


def answer_format(frontend: FrontendConfig, config: EngineConfig) -> AnswerFormat:
    """How the model writes calls and reasoning, as the arguments say; of the model in the box it is known.

    Raises:
        ConfigError: a parser is unknown, or a plug-in fails.
    """
    from minivllm.entrypoints.answer_format import AnswerFormat
    from minivllm.reasoning.registry import reasoning_parser_class
    from minivllm.tool_parsers.registry import TOOL_PARSERS

    if frontend.tool_parser_plugin:
        TOOL_PARSERS.import_plugin(frontend.tool_parser_plugin)
    name, auto = frontend.tool_call_parser, frontend.enable_auto_tool_choice
    if name is None and is_box_model(config.model.model):
        name, auto = "hermes", True
    parser = TOOL_PARSERS.get(name) if name is not None else None
    return AnswerFormat(parser, reasoning_parser_class(config.reasoning), auto, frontend.tool_strict_level)


def _warn_of_other_template(engine: AsyncLLM, template: str | None) -> None:
    own = None if engine.tokenizer is None else engine.tokenizer.chat_template
    if template is not None and own is not None and template.strip() != own.strip():
        logger.warning("--chat-template differs from the model's own template, which it was trained on")


def _request_log(frontend: FrontendConfig) -> RequestLog | None:
    from minivllm.entrypoints.openai.request_log import RequestLog

    if not frontend.enable_log_requests:
        return None
    return RequestLog(
        outputs=frontend.enable_log_outputs, deltas=frontend.enable_log_deltas, max_len=frontend.max_log_len
    )


def _fingerprint(engine: AsyncLLM, name: str) -> str:
    """Changes when answers may change: with the version, the model, its type, the kernels' instruction family."""
    parts = [name, engine.ready.dtype, engine.ready.numerics_id, str(engine.config.model.seed)]
    return f"minivllm-{__version__}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]}"


def read_chat_template(value: str | None) -> str | None:
    """The template of --chat-template: the text itself, or a file (`validate_args` has checked that it is one)."""
    if value is None or "{" in value:
        return value
    return Path(value).read_text(encoding="utf-8")
