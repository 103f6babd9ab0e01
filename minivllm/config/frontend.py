"""The HTTP server: where it listens and how it behaves. Never seen by the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class FrontendConfig:
    host: str | None = None
    """Address to bind; default: all interfaces."""
    port: int = 8000
    """Port to bind; 0 takes a free one and prints it."""
    uvicorn_log_level: Literal["critical", "error", "warning", "info", "debug", "trace"] = "info"
    """Severity of uvicorn's log."""
    disable_uvicorn_access_log: bool = False
    """No access log line per request."""
    allow_credentials: bool = False
    """CORS: allow credentials."""
    allowed_origins: list[str] = field(default_factory=lambda: ["*"])
    """CORS: allowed origins, a JSON list."""
    allowed_methods: list[str] = field(default_factory=lambda: ["*"])
    """CORS: allowed methods, a JSON list."""
    allowed_headers: list[str] = field(default_factory=lambda: ["*"])
    """CORS: allowed headers, a JSON list."""
    api_key: list[str] | None = None
    """Bearer keys; a request must carry one of them. Never printed."""
    chat_template: str | None = None
    """File with, or text of, the Jinja chat template; default: the tokenizer's."""
    chat_template_content_format: Literal["auto", "string", "openai"] = "auto"
    """What templates get as a message's content: its text, or OpenAI's list of parts; auto: what the template reads."""
    trust_request_chat_template: bool = False
    """Take chat templates from requests; they are rendered in a process of their own, with little time and memory."""
    default_chat_template_kwargs: dict[str, Any] | None = None
    """Variables for the chat template, a JSON object; a request's chat_template_kwargs win."""
    enable_auto_tool_choice: bool = False
    """Let the model call tools when it likes (tool_choice auto); needs --tool-call-parser."""
    tool_call_parser: str | None = None
    """How the model writes calls of tools: deepseek_v3, glm45, granite, hermes, kimi_k2, llama3_json, llama4_pythonic,
    mistral, openai, phi4_mini_json, pythonic, qwen3_coder, or a plug-in's name."""
    tool_parser_plugin: str = ""
    """Python file that registers parsers: minivllm.tool_parsers.registry.TOOL_PARSERS.register(NAME)."""
    exclude_tools_when_tool_choice_none: bool = False
    """Leave tools out of the prompt when tool_choice is none."""
    response_role: str = "assistant"
    """Role of the answer in chat."""
    root_path: str | None = None
    """Path prefix behind a proxy."""
    disable_fastapi_docs: bool = False
    """No /docs, /redoc and /openapi.json."""
    return_tokens_as_token_ids: bool = False
    """Show logprob tokens as token_id:N."""
    enable_force_include_usage: bool = False
    """Send usage at the end of every stream."""
    shutdown_timeout: int = 0
    """Seconds that open requests get to finish after SIGTERM; 0 ends them at once with an error event."""
