"""The command line of the OpenAI server: which options there are, and what about them can be checked at once."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from minivllm import envs
from minivllm.config.docs import field_docs, summary
from minivllm.config.frontend import FrontendConfig
from minivllm.config.lora import read_lora_modules, read_prompt_adapters
from minivllm.config.model_files import why_no_template
from minivllm.config.not_yet import ALIASES, NOT_YET, refusal, words_to_ignore
from minivllm.engine.arg_utils import AsyncEngineArgs
from minivllm.entrypoints.chat_utils import RESERVED_TEMPLATE_KWARGS
from minivllm.entrypoints.openai.tls import check_tls
from minivllm.exceptions import ConfigError
from minivllm.logger import init_logger
from minivllm.tool_parsers.registry import TOOL_PARSERS
from minivllm.tracing import check_tracing
from minivllm.utils.argparse_utils import FlexibleArgumentParser, add_dataclass_arguments
from minivllm.utils.box_model import is_box_model
from minivllm.utils.text import nearest

logger = init_logger(__name__)

# What bare --help shows.
COMMON = (
    "--help", "--model", "--served-model-name", "--dtype", "--max-model-len", "--max-num-seqs",
    "--max-num-batched-tokens", "--kv-cache-memory-bytes", "--enable-prefix-caching", "--load-format",
    "--distributed-executor-backend", "--host", "--port", "--api-key", "--chat-template", "--log-level",
)  # fmt: skip


def make_arg_parser(parser: FlexibleArgumentParser | None = None) -> FlexibleArgumentParser:
    """The server's parser: the model, the front end's options, the engine's."""
    if parser is None:
        parser = FlexibleArgumentParser(prog="minivllm serve", description="Serve a model over the OpenAI API.")
    parser.refuse = refuse_option
    parser.common = COMMON
    parser.usage = "%(prog)s MODEL [options]"
    parser.epilog = environment_help()
    parser.formatter_class = type("_Raw", (parser.formatter_class, argparse.RawDescriptionHelpFormatter), {})
    parser.add_argument("model_tag", nargs="?", metavar="MODEL", help="A local directory or a hub id (or --model).")
    parser.add_argument("--config", metavar="FILE", help="YAML file with options, by their long names; others win.")
    add_dataclass_arguments(
        parser,
        FrontendConfig,
        docs=field_docs(FrontendConfig),
        title=FrontendConfig.__name__,
        description=summary(FrontendConfig),
    )
    AsyncEngineArgs.add_cli_args(parser)
    return parser


def environment_help() -> str:
    """The environment variables, as a block of text."""
    width = max(map(len, envs.VARIABLES))
    lines = [f"  {name:<{width}}  {meaning}" for name, meaning in envs.VARIABLES.items()]
    return "\n".join(["environment variables:", *lines])


def check_environment() -> None:
    """Raises ConfigError when a variable of ours is misspelt."""
    for name in sorted(os.environ):
        if name.startswith("MINIVLLM_") and name not in envs.VARIABLES:
            known = nearest(name, envs.VARIABLES)
            hint = f"did you mean {known}?" if known else f"there are {', '.join(envs.VARIABLES)}"
            raise ConfigError(f"the environment variable {name} is unknown; {hint}")


def refuse_option(option: str, value: str | None) -> str | int | None:
    """What to say about an option that is not ours (see FlexibleArgumentParser)."""
    name = ALIASES.get(option, "")
    if option.startswith("--"):
        name = option[2:].replace("-", "_").split(".")[0]  # vLLM has nested ones, --compilation-config.mode
    if name not in NOT_YET and name.removeprefix("no_") not in NOT_YET:
        return None
    ignored = words_to_ignore(name, value)
    return refusal(name, option) if ignored is None else ignored


def validate_args(args: argparse.Namespace) -> None:
    """Check what concerns the front end, and settle the model's name in `args.model`.

    Raises:
        ConfigError: an argument is wrong; the message names it.
    """
    check_environment()
    if args.model_tag:
        if args.model and args.model != args.model_tag and "--model" not in args.from_config:
            raise ConfigError(f"two models are named, {args.model_tag} and --model {args.model}; name one")
        args.model = args.model_tag
    if not 0 <= args.port <= 65535:
        raise ConfigError(f"--port {args.port} must be from 0 to 65535")
    if args.shutdown_timeout < 0:
        raise ConfigError(f"--shutdown-timeout {args.shutdown_timeout} must be 0 or more seconds")
    if args.disable_frontend_multiprocessing:
        # As vLLM does with its V1 engine: scripts that say so still start.
        logger.warning(
            "--disable-frontend-multiprocessing changes nothing here: the API server never loads the model itself; "
            "it is for LLM(...)"
        )
    if args.api_key and not all(args.api_key):
        raise ConfigError("--api-key holds an empty key; leave it out to serve without keys")
    if args.api_server_count < 1:
        raise ConfigError(f"--api-server-count {args.api_server_count} must be at least 1")
    if args.api_server_count > 1:
        for opens, name in (
            (args.enable_dev_endpoints, "--enable-dev-endpoints"),
            (envs.is_dev_mode(), "VLLM_SERVER_DEV_MODE"),
            (args.profiler_config, "--profiler-config"),
        ):
            if opens:
                raise ConfigError(f"{name} needs --api-server-count 1: its routes would reach one server only")
    if args.uds == "":
        raise ConfigError("--uds is empty; give a path, or leave it out for TCP")
    if args.enable_log_outputs and not args.enable_log_requests:
        raise ConfigError("--enable-log-outputs needs --enable-log-requests")
    for option in ("sse_keep_alive_interval", "max_log_len"):
        if (value := getattr(args, option)) is not None and value < 0:
            raise ConfigError(f"--{option.replace('_', '-')} {value} must be 0 or more")
    for option in ("h11_max_incomplete_event_size", "h11_max_header_count"):
        if (value := getattr(args, option)) < 1:
            raise ConfigError(f"--{option.replace('_', '-')} {value} must be at least 1")
    if args.root_path and not args.root_path.startswith("/"):
        raise ConfigError(f"--root-path {args.root_path} must start with /")
    _check_chat_template(args.chat_template)
    check_template_kwargs(args.default_chat_template_kwargs)
    _check_tool_parser(args)
    _check_adapters(args)
    check_tls(args)
    check_tracing(args.otlp_traces_endpoint)
    if args.middleware:
        from minivllm.entrypoints.openai.middleware import load_middleware

        for import_path in args.middleware:
            load_middleware(import_path)


def check_template_kwargs(given: dict[str, object] | None) -> None:
    """Raises ConfigError when a variable for the template is one that the server sets itself."""
    if given is not None and not isinstance(given, dict):
        raise ConfigError(f"--default-chat-template-kwargs must be a JSON object, got {given!r}")
    if reserved := RESERVED_TEMPLATE_KWARGS & (given or {}).keys():
        raise ConfigError(f"--default-chat-template-kwargs may not set {', '.join(sorted(reserved))}")


def _check_tool_parser(args: argparse.Namespace) -> None:
    """Raises ConfigError when there is no such parser, its plug-in fails, or tools are asked for without one."""
    if args.tool_parser_plugin:
        TOOL_PARSERS.import_plugin(args.tool_parser_plugin)
    if args.tool_call_parser is not None:
        TOOL_PARSERS.get(args.tool_call_parser)
    elif args.enable_auto_tool_choice and args.model and not is_box_model(args.model):
        raise ConfigError(
            f"--enable-auto-tool-choice needs --tool-call-parser, one of {', '.join(TOOL_PARSERS.names)}"
        )
    if args.tool_strict_level != "auto":
        _check_strict_level(args)


def _check_strict_level(args: argparse.Namespace) -> None:
    """Raises ConfigError when the level could hold no call; the server would only find out with the model loaded."""
    from minivllm.entrypoints.answer_format import AnswerFormat

    if args.tool_call_parser is not None:
        AnswerFormat(TOOL_PARSERS.get(args.tool_call_parser), strict_level=args.tool_strict_level)
    elif not args.model or is_box_model(args.model):
        return  # which calls tools when it likes, in a way that a grammar can hold
    if not args.enable_auto_tool_choice:
        raise ConfigError(
            f"--tool-strict-level {args.tool_strict_level} is about calls that the model makes when it likes; add "
            "--enable-auto-tool-choice"
        )


def _check_adapters(args: argparse.Namespace) -> None:
    """Raises ConfigError when adapters are named: for how, if that is wrong, and else because none is served yet."""
    served = args.served_model_name or [args.model]
    adapters = read_lora_modules(args.lora_modules, served)
    prompts = read_prompt_adapters(args.prompt_adapters, [*served, *(adapter.name for adapter in adapters)])
    if adapters:
        named = ", ".join(adapter.name for adapter in adapters)
        raise ConfigError(
            f"--lora-modules: LoRA adapters are not served yet ({named}); merge them into the model's weights, or "
            "leave them out"
        )
    if prompts:
        named = ", ".join(adapter.name for adapter in prompts)
        raise ConfigError(f"--prompt-adapters: prompt adapters are not served yet ({named}); leave them out")


def _check_chat_template(template: str | None) -> None:
    """A template is a file, or text with Jinja braces; anything else is a mistyped file name."""
    if template is None:
        return
    if any(brace in template for brace in ("{{", "{%", "{#")):
        text, source = template, "--chat-template"
    elif Path(template).is_file():
        text, source = _read_text(template), f"--chat-template {template}"
    else:
        raise ConfigError(f"--chat-template {template} is neither a file nor Jinja text; check the path")
    if reason := why_no_template(text):
        raise ConfigError(f"{source} is not a Jinja template: {reason}")


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--chat-template {path} cannot be read: {error}") from error
