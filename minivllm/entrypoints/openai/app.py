"""The application: its routes, error bodies and middleware, as the server's arguments ask for them.

    build_app ─▶ app_state.init_app_state gives it an engine

What takes time to import is imported when it is called, while the engine core loads the model.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import fields
from typing import TYPE_CHECKING

from minivllm import envs
from minivllm.config.frontend import FrontendConfig
from minivllm.logger import init_logger
from minivllm.version import __version__

if TYPE_CHECKING:
    from fastapi import APIRouter, FastAPI
    from fastapi.routing import APIRoute

logger = init_logger(__name__)


def frontend_config(args: Namespace) -> FrontendConfig:
    """The server's own part of the arguments."""
    return FrontendConfig(
        **{f.name: getattr(args, f.name) for f in fields(FrontendConfig) if hasattr(args, f.name)}
    )


def api_keys(frontend: FrontendConfig) -> list[str]:
    """Keys that a request may carry; without any, none is needed. vLLM's variable counts when nothing else is said."""
    keys = [key for key in [*(frontend.api_key or []), envs.get("MINIVLLM_API_KEY")] if key]
    return keys or [key for key in [envs.get("VLLM_API_KEY")] if key]


def build_app(args: Namespace) -> FastAPI:
    """The application: routes, error bodies, middleware. It answers once `init_app_state` has given it an engine."""
    from fastapi import FastAPI

    from minivllm.entrypoints.openai.errors import install_error_handlers
    from minivllm.entrypoints.openai.ignored_fields import IgnoredFields
    from minivllm.entrypoints.openai.lifecycle import Lifecycle
    from minivllm.metrics.prometheus import make_registry

    frontend = frontend_config(args)
    docs = {"openapi_url": None, "docs_url": None, "redoc_url": None} if frontend.disable_fastapi_docs else {}
    app = FastAPI(title="minivllm", version=__version__, **docs)
    state = app.state
    state.lifecycle = Lifecycle()
    state.ignored_fields = IgnoredFields(strict=frontend.strict_fields)
    state.tracks_load = frontend.enable_server_load_tracking
    state.log_error_stack = frontend.log_error_stack
    state.registry = make_registry(multiprocess=frontend.api_server_count > 1)
    state.frontend = frontend
    for router in _routers(frontend, profiles=getattr(args, "profiler_config", None) is not None):
        app.include_router(router)
    install_error_handlers(app)
    _add_middleware(app, frontend, counts_requests=not getattr(args, "disable_log_stats", False))
    return app


def _routers(frontend: FrontendConfig, *, profiles: bool) -> list[APIRouter]:
    """Every endpoint there is, and those that the operator opens. profiles: --profiler-config is given."""
    from minivllm.entrypoints.openai.batch.router import router as batch_router
    from minivllm.entrypoints.openai.chat_completion.router import router as chat_router
    from minivllm.entrypoints.openai.completion.router import router as completion_router
    from minivllm.entrypoints.openai.dev import router as dev
    from minivllm.entrypoints.openai.health.router import router as health_router
    from minivllm.entrypoints.openai.invocations.router import router as invocations_router
    from minivllm.entrypoints.openai.lora.router import router as lora_router
    from minivllm.entrypoints.openai.messages.router import router as messages_router
    from minivllm.entrypoints.openai.metrics.router import router as metrics_router
    from minivllm.entrypoints.openai.models.router import router as models_router
    from minivllm.entrypoints.openai.playground.router import router as playground_router
    from minivllm.entrypoints.openai.profile.router import router as profile_router
    from minivllm.entrypoints.openai.responses.router import router as responses_router
    from minivllm.entrypoints.openai.tokenize import router as tokenize

    # Most requests first: paths are compared in this order.
    routers = [completion_router, chat_router, responses_router, messages_router, health_router, metrics_router]
    routers += [models_router, tokenize.router, batch_router, invocations_router, lora_router]
    is_dev = frontend.enable_dev_endpoints or envs.is_dev_mode()
    if is_dev or profiles:
        routers.append(profile_router)
    if not frontend.disable_playground:
        routers.append(playground_router)
    if frontend.enable_tokenizer_info_endpoint:
        routers.append(tokenize.info_router)
    if is_dev:
        logger.warning("the development endpoints are open: /server_info, /abort_requests, /collective_rpc, …")
        routers += [dev.router, dev.json_router]
    return routers


def _short_routes() -> list[APIRoute]:
    """Those that most requests are for."""
    from minivllm.entrypoints.openai.chat_completion.router import router as chat_router
    from minivllm.entrypoints.openai.completion.router import router as completion_router
    from minivllm.entrypoints.openai.messages.router import router as messages_router
    from minivllm.entrypoints.openai.responses.router import router as responses_router

    routers = (completion_router, chat_router, messages_router, responses_router)
    return [route for router in routers for route in router.routes if not route.param_convertors]


def _add_middleware(app: FastAPI, frontend: FrontendConfig, *, counts_requests: bool) -> None:
    """In the order that `middleware.py` draws, from its end: the last added is the first a request meets."""
    from fastapi.middleware.cors import CORSMiddleware

    from minivllm.entrypoints.openai import middleware as ours
    from minivllm.entrypoints.openai.errors import Failures
    from minivllm.entrypoints.openai.short_way import ShortWay
    from minivllm.metrics.http import HttpMetrics

    app.add_middleware(ShortWay, routes=_short_routes())
    app.add_middleware(ours.BodyLimit)
    app.add_middleware(ours.Admission, lifecycle=app.state.lifecycle)
    if keys := api_keys(frontend):
        app.add_middleware(ours.Authentication, keys=keys, open_paths=_open_paths(frontend))
    for import_path in frontend.middleware:
        middleware = ours.load_middleware(import_path)
        if isinstance(middleware, type):
            app.add_middleware(middleware)
        else:
            app.middleware("http")(middleware)
    app.add_middleware(Failures)
    if counts_requests:
        app.add_middleware(HttpMetrics, registry=app.state.registry)
    app.add_middleware(ours.RequestId, always=frontend.enable_request_id_headers)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=frontend.allowed_origins,
        allow_credentials=frontend.allow_credentials,
        allow_methods=frontend.allowed_methods,
        allow_headers=frontend.allowed_headers,
        expose_headers=["X-Request-Id", "X-Ignored-Fields"],
    )
    if frontend.root_path:
        app.add_middleware(ours.RootPath, path=frontend.root_path)


def _open_paths(frontend: FrontendConfig) -> frozenset[str]:
    """What needs no key: probes and scrapers have none, and a browser gets the page before its user can give one."""
    from minivllm.entrypoints.openai.middleware import OPEN_PATHS
    from minivllm.entrypoints.openai.playground.files import OPEN_PATHS as PAGE_PATHS

    closed = {"/metrics"} if frontend.protect_metrics else set()
    return OPEN_PATHS - closed | (frozenset() if frontend.disable_playground else PAGE_PATHS)
