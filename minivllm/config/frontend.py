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
    uds: str | None = None
    """Listen on this Unix socket instead; host and port are then not used."""
    api_server_count: int = field(default=1, metadata={"short": "-asc"})
    """API server processes that share the address and one engine core; each has its own share of the queue limits."""
    uvicorn_log_level: Literal["critical", "error", "warning", "info", "debug", "trace"] = "info"
    """Severity of uvicorn's log."""
    disable_uvicorn_access_log: bool = False
    """No access log line per request."""
    disable_access_log_for_endpoints: str | None = None
    """Paths without access log lines, with commas: /health,/metrics."""
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
    protect_metrics: bool = False
    """Ask for a key on /metrics too."""
    ssl_keyfile: str | None = None
    """TLS: the private key's file."""
    ssl_certfile: str | None = None
    """TLS: the certificate's file; with it the server speaks https."""
    ssl_ca_certs: str | None = None
    """TLS: file of authorities that sign clients' certificates."""
    enable_ssl_refresh: bool = False
    """TLS: read the files again when they change; open connections keep what they have."""
    ssl_cert_reqs: int = 0
    """TLS: whether clients need a certificate: 0 no, 1 it is checked if there is one, 2 yes."""
    ssl_ciphers: str | None = None
    """TLS: cipher list for TLS 1.2, in OpenSSL's format."""
    chat_template: str | None = None
    """File with, or text of, the Jinja chat template; default: the tokenizer's."""
    chat_template_content_format: Literal["auto", "string", "openai"] = "auto"
    """What templates get as a message's content: its text, or OpenAI's list of parts; auto: what the template reads."""
    trust_request_chat_template: bool = False
    """Take chat templates from requests; they are rendered in a process of their own, with little time and memory."""
    default_chat_template_kwargs: dict[str, Any] | None = None
    """Variables for the chat template, a JSON object; a request's chat_template_kwargs win."""
    lora_modules: list[str] | None = None
    """LoRA adapters to serve beside the model, each name=path or a JSON object with name, path and base_model_name.
    Read and checked; none is served yet, so naming one stops the start."""
    prompt_adapters: list[str] | None = None
    """Prompt adapters, each name=path. As for LoRA adapters, none is served yet."""
    enable_auto_tool_choice: bool = False
    """Let the model call tools when it likes (tool_choice auto); needs --tool-call-parser."""
    tool_call_parser: str | None = None
    """How the model writes calls of tools: deepseek_v3, deepseek_v31, glm45, granite, hermes, kimi_k2, llama3_json,
    llama4_json, llama4_pythonic, mistral, openai, phi4_mini_json, pythonic, qwen3_coder, qwen3_xml, or a plug-in's
    name."""
    tool_parser_plugin: str = ""
    """Python file that registers parsers: minivllm.tool_parsers.registry.TOOL_PARSERS.register(NAME)."""
    tool_strict_level: Literal["auto", "function", "parameter"] = "auto"
    """How far a grammar holds calls that the model makes when it likes: auto, if a function says strict; function,
    always to the functions there are; parameter, always to their schemas too."""
    exclude_tools_when_tool_choice_none: bool = False
    """Leave tools out of the prompt when tool_choice is none."""
    response_role: str = "assistant"
    """Role of the answer in chat."""
    root_path: str | None = None
    """Path prefix behind a proxy."""
    middleware: list[str] = field(default_factory=list, metadata={"repeatable": True})
    """ASGI middleware by import path, module.Class or module.function (request, call_next); may be given several
    times, the last is the outermost."""
    disable_fastapi_docs: bool = False
    """No /docs, /redoc and /openapi.json."""
    disable_playground: bool = False
    """No page at /, where one chats with the model and watches the engine."""
    enable_dev_endpoints: bool = False
    """Routes for development: /server_info, /reset_prefix_cache, /pause, /abort_requests, … Not for the public."""
    enable_tokenizer_info_endpoint: bool = False
    """GET /tokenizer_info: the tokenizer's configuration and chat template."""
    strict_fields: bool = False
    """Refuse a request with fields that nobody defines; otherwise they are ignored, and X-Ignored-Fields names them."""
    return_tokens_as_token_ids: bool = False
    """Show logprob tokens as token_id:N."""
    enable_force_include_usage: bool = False
    """Send usage at the end of every stream."""
    enable_prompt_tokens_details: bool = False
    """Tell in usage how many prompt tokens came from the prefix cache."""
    enable_request_id_headers: bool = False
    """Send X-Request-Id with every response, the request's own or a new one; errors have it anyway."""
    enable_server_load_tracking: bool = False
    """Count requests being answered, for GET /load."""
    sse_keep_alive_interval: int = 0
    """Seconds without a token after which a stream sends a comment line; 0: never."""
    enable_log_requests: bool = False
    """Log each request's id and parameters, and at --log-level DEBUG its prompt."""
    enable_log_outputs: bool = False
    """Log what is generated; needs --enable-log-requests."""
    enable_log_deltas: bool = True
    """With --enable-log-outputs: log each piece of a stream, not only the whole."""
    max_log_len: int | None = None
    """Characters of a prompt or output, and token ids, to log at most; default: all."""
    log_config_file: str | None = None
    """JSON file for logging.config.dictConfig; default: MINIVLLM_LOGGING_CONFIG_PATH."""
    log_error_stack: bool = False
    """Log a traceback with every error response."""
    h11_max_incomplete_event_size: int = 4 << 20
    """Bytes of a request's head, at most (with httptools as with h11)."""
    h11_max_header_count: int = 256
    """Header lines of a request, at most."""
    shutdown_timeout: int = 0
    """Seconds that open requests get to finish after SIGTERM; 0 ends them at once with an error event."""
