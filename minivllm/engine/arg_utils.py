"""From flat arguments (keywords or a command line) to a checked EngineConfig.

Owns the preflight: everything that the arguments, config.json and the names of the files show is refused here, in
well under two seconds, without torch and before any process is started. Headers of weight files, tensors and memory are
the worker's to check, and what is still `auto` or None is the worker's to resolve.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from dataclasses import field, fields, make_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from minivllm.config.cache import KV_TILE, CacheConfig
from minivllm.config.compilation import CompilationConfig, read_compilation
from minivllm.config.cpu import CpuConfig, read_cpu_bind
from minivllm.config.device import DeviceConfig
from minivllm.config.docs import field_docs, summary
from minivllm.config.engine import EngineConfig
from minivllm.config.hf_config import HFConfig, read_architecture, read_token_ids
from minivllm.config.kv_events import read_kv_events_config
from minivllm.config.load import LoadConfig
from minivllm.config.model import ModelConfig
from minivllm.config.model_files import (
    CONFIG,
    check_tokenizer,
    find_shards,
    read_generation_config,
    read_json,
)
from minivllm.config.not_yet import NOT_YET, asks_for_nothing, refusal
from minivllm.config.observability import ObservabilityConfig
from minivllm.config.parallel import ParallelConfig
from minivllm.config.profiler import read_profiler_config
from minivllm.config.reasoning import ReasoningConfig
from minivllm.config.scheduler import SchedulerConfig, Usage, step_limits
from minivllm.config.structured_outputs import StructuredOutputsConfig, read_structured_outputs_config
from minivllm.engine.processor import default_sampling_params
from minivllm.exceptions import ConfigError, ModelFilesError, RequestError
from minivllm.logits_processors import check_names, name_of
from minivllm.models.registry import ModelRegistry
from minivllm.reasoning.registry import reasoning_parser_class
from minivllm.sampling_params import SamplingParams
from minivllm.utils.argparse_utils import add_dataclass_arguments, default_of
from minivllm.utils.box_model import BOX_MODEL_NAME, box_model_path
from minivllm.utils.hub import TOKENIZER_FILES, resolve_directory
from minivllm.utils.text import nearest, parse_size

T = TypeVar("T")
Parser = TypeVar("Parser", bound=argparse.ArgumentParser)

# The slices of EngineConfig that arguments fill, by its field names.
PARTS = {
    "model": ModelConfig,
    "cache": CacheConfig,
    "scheduler": SchedulerConfig,
    "load": LoadConfig,
    "parallel": ParallelConfig,
    "observability": ObservabilityConfig,
    "reasoning": ReasoningConfig,
    "structured_outputs": StructuredOutputsConfig,
    "cpu": CpuConfig,
    "device": DeviceConfig,
    "compilation": CompilationConfig,
}
_DTYPE_ALIASES = {"half": "float16", "float": "float32"}
_AT_LEAST_ONE = (
    "block_size", "kv_cache_memory_bytes", "num_gpu_blocks_override", "max_num_batched_tokens", "max_num_seqs",
    "stream_interval", "max_model_len", "max_num_active_seqs", "max_num_queued_reqs", "max_num_queued_tokens",
    "cpu_threads",
)  # fmt: skip


def _flat_fields() -> list[tuple[str, Any, Any]]:
    return [
        (f.name, f.type, field(default_factory=lambda f=f: default_of(f)))
        for part in PARTS.values()
        for f in fields(part)
    ]


_Flat = make_dataclass("_Flat", _flat_fields())


class EngineArgs(_Flat):
    """Every option of the engine, flat: the fields of the classes in PARTS, with their defaults.

    Raises (on construction):
        ConfigError: a keyword is misspelt (the nearest is named) or not supported yet.
    """

    def __init__(self, model: str | os.PathLike[str] = "", **options: Any) -> None:
        known = {f.name for f in fields(_Flat)}
        super().__init__(model=os.fspath(model), **_without_foreign(options, known))

    @staticmethod
    def add_cli_args(parser: Parser) -> Parser:
        """Add every option, grouped by config class."""
        for part in PARTS.values():
            add_dataclass_arguments(
                parser, part, docs=field_docs(part), title=part.__name__, description=summary(part)
            )
        return parser

    @classmethod
    def from_cli_args(cls, namespace: argparse.Namespace) -> EngineArgs:
        """Take our options out of a parsed command line; others are left alone."""
        return cls(**{f.name: getattr(namespace, f.name) for f in fields(_Flat) if hasattr(namespace, f.name)})

    def create_engine_config(self, usage: Usage = "offline") -> EngineConfig:
        """Check everything and find the files.

        Raises:
            ConfigError: an argument is wrong, or two do not go together; the message names them.
            ModelFilesError: a file of the checkpoint is missing or wrong; the message names it.
        """
        values = self._values()
        parts = {
            name: _convert({f.name: values[f.name] for f in fields(part)}, part) for name, part in PARTS.items()
        }
        _check_ranges(values)
        _check_hash(parts["cache"])
        read_cpu_bind(values["cpu_bind"])
        read_compilation(parts["compilation"], enforce_eager=values["enforce_eager"])
        _check_kv_events(parts["observability"], parts["cache"])
        read_profiler_config(parts["observability"].profiler_config)
        _check_traces(parts["observability"], usage)
        _check_executor(parts["parallel"])
        reasoning_parser_class(parts["reasoning"])
        read_structured_outputs_config(parts["structured_outputs"].structured_outputs_config)
        check_names(values["logits_processors"] or ())
        model, load = parts["model"], parts["load"]
        if not model.model:
            named = model.served_model_name or [BOX_MODEL_NAME]
            model = replace(model, model=str(box_model_path()), served_model_name=named)
        directory = resolve_directory(model.model, revision=model.revision, download_dir=load.download_dir)
        hf_config = _read_hf_config(directory, model)
        if load.load_format != "dummy":
            find_shards(directory)
        _check_scheduler(parts["scheduler"], model.max_model_len, hf_config, usage)
        return EngineConfig(
            model=_resolve_model(model, load, directory),
            hf_config=hf_config,
            cache=parts["cache"],
            scheduler=parts["scheduler"],
            load=load,
            parallel=parts["parallel"],
            observability=parts["observability"],
            reasoning=parts["reasoning"],
            structured_outputs=parts["structured_outputs"],
            cpu=parts["cpu"],
            device=parts["device"],
            compilation=parts["compilation"],
            model_class=ModelRegistry.target(hf_config.architecture),
            generation_config=_read_generation_config(directory, model),
            usage=usage,
        )

    def _values(self) -> dict[str, Any]:
        """Our fields, other spellings of a value made one."""
        values = {f.name: getattr(self, f.name) for f in fields(_Flat)}
        values["max_model_len"] = _read_length(self.max_model_len)
        values["kv_cache_memory_bytes"] = _read_size("kv_cache_memory_bytes", self.kv_cache_memory_bytes)
        dtype = str(self.dtype).removeprefix("torch.")  # scripts pass torch.float16
        values["dtype"] = _DTYPE_ALIASES.get(dtype, dtype)
        if self.logits_processors is not None:
            given = self.logits_processors
            values["logits_processors"] = [name_of(one) for one in ([given] if isinstance(given, str) else given)]
        if isinstance(self.served_model_name, str):
            values["served_model_name"] = [self.served_model_name]
        return values


class AsyncEngineArgs(EngineArgs):
    """The same, for a server: vLLM's name for it."""


def _without_foreign(options: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """The options that are ours; those of vLLM that ask for nothing are left out, others refused."""
    ours = {}
    for name, value in options.items():
        if name in known:
            ours[name] = value
        elif name not in NOT_YET:
            guess = nearest(name, known)
            raise ConfigError(f"unknown argument {name}" + (f"; did you mean {guess}?" if guess else ""))
        elif not asks_for_nothing(name, value):
            raise ConfigError(refusal(name, f"{name}={value!r}"))
    return ours


def _convert(values: dict[str, Any], part: type[T]) -> T:
    """Make a config slice, its types checked.

    One field at a time, so that the error can name it.
    """
    for f in fields(part):
        try:
            msgspec.convert({f.name: values[f.name]}, part)
        except msgspec.ValidationError as error:
            reason = str(error).split(" - at ")[0].replace("`", "").replace("null", "None")
            raise ConfigError(f"{f.name}={values[f.name]!r}: {reason[:1].lower()}{reason[1:]}") from None
    return part(**values)


def _read_length(value: Any) -> Any:
    """max_model_len as a number, "auto" or None; what is none of these is left for the type check."""
    return "auto" if value in (-1, "-1", "auto") else _read_size("max_model_len", value)


def _read_size(name: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_size(value)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None


def _check_ranges(values: dict[str, Any]) -> None:
    """Single values, of the right type by now."""
    for name in _AT_LEAST_ONE:
        value = values[name]
        if isinstance(value, int) and value < 1:
            raise ConfigError(f"{name}={value} must be at least 1")
    block_size = values["block_size"]
    # Where a GPU is asked for, the worker checks: only it knows the kernels.
    if block_size is not None and block_size % KV_TILE and values["device"] != "cuda":
        raise ConfigError(
            f"block_size={block_size} must be a multiple of {KV_TILE}: attention reads the cache in tiles of "
            f"{KV_TILE} tokens; {-(-block_size // KV_TILE) * KV_TILE} is the next"
        )
    share = values["gpu_memory_utilization"]
    if share is not None and not 0 < share <= 1:
        raise ConfigError(f"gpu_memory_utilization={share} must be above 0 and at most 1")
    if not 0 <= values["watermark"] < 1:
        raise ConfigError(f"watermark={values['watermark']} must be at least 0 and below 1")
    threshold = values["long_prefill_token_threshold"]
    if threshold < 0:
        raise ConfigError(f"long_prefill_token_threshold={threshold} must be at least 0; 0 sets no limit")
    mixed = values["max_num_mixed_prefill_tokens"]
    if mixed < 0:
        raise ConfigError(f"max_num_mixed_prefill_tokens={mixed} must be at least 0; 0 sets no limit")
    if values["max_logprobs"] < -1:
        raise ConfigError(f"max_logprobs={values['max_logprobs']} must be at least 0, or -1 for the whole vocabulary")
    if not -(2**63) <= values["seed"] < 2**63:
        raise ConfigError(f"seed={values['seed']} does not fit into 64 bits")


def _check_hash(cache: CacheConfig) -> None:
    if cache.prefix_caching_hash_algo == "xxhash" and importlib.util.find_spec("xxhash") is None:
        raise ConfigError('prefix_caching_hash_algo=xxhash needs the package xxhash: pip install "minivllm[xxhash]"')


def _check_kv_events(observability: ObservabilityConfig, cache: CacheConfig) -> None:
    if read_kv_events_config(observability.kv_events_config).publishes and not cache.enable_prefix_caching:
        raise ConfigError("kv_events_config: there are no events without the prefix cache; drop one of the two")


def _check_traces(observability: ObservabilityConfig, usage: Usage) -> None:
    if observability.otlp_traces_endpoint is not None and usage == "offline":
        raise ConfigError("otlp_traces_endpoint: only the OpenAI server sends traces; leave it out")


def _check_executor(parallel: ParallelConfig) -> None:
    backend = parallel.distributed_executor_backend
    if backend == "ray" and importlib.util.find_spec("ray") is None:
        raise ConfigError('distributed_executor_backend=ray needs ray: pip install "minivllm[ray]"')
    if backend not in ("uni", "ray") and ":" not in backend:
        raise ConfigError(f"distributed_executor_backend={backend} is not supported yet; choose uni or ray")


def _read_hf_config(directory: Path, model: ModelConfig) -> HFConfig:
    path = directory / CONFIG
    raw = {**read_json(path), **model.hf_overrides}
    # Before the sizes: other families lack some of ours.
    ModelRegistry.target(read_architecture(raw, str(path)))
    hf_config = HFConfig.from_dict(raw, source=str(path))
    limit = hf_config.max_context
    if isinstance(model.max_model_len, int) and model.max_model_len > limit:
        raise ConfigError(
            f"max_model_len={model.max_model_len} is more than the {limit} positions of the model ({path}); lower it, "
            "or change the model's limit with --hf-overrides"
        )
    return hf_config


def _resolve_model(model: ModelConfig, load: LoadConfig, directory: Path) -> ModelConfig:
    """The model config with local directories, and the name the API uses kept as the user gave it."""
    tokenizer = directory
    if not model.skip_tokenizer_init:
        if model.tokenizer is not None:
            tokenizer = resolve_directory(
                model.tokenizer,
                revision=model.tokenizer_revision,
                download_dir=load.download_dir,
                files=TOKENIZER_FILES,
            )
        check_tokenizer(tokenizer)
    return replace(
        model,
        model=str(directory),
        tokenizer=str(tokenizer),
        served_model_name=model.served_model_name or [model.model],
    )


def _read_generation_config(directory: Path, model: ModelConfig) -> dict[str, Any]:
    """The generation config, its sampling defaults checked: a wrong one would fail every request."""
    found = read_generation_config(directory, model.generation_config, model.override_generation_config)
    read_token_ids(found, "eos_token_id", "the generation config")
    try:
        SamplingParams(**default_sampling_params(found))
    except RequestError as error:
        raise ModelFilesError(
            f"the generation config: {error}; correct it, or replace it with --override-generation-config"
        ) from error
    return found


def _check_scheduler(
    scheduler: SchedulerConfig, max_model_len: int | str | None, hf_config: HFConfig, usage: Usage
) -> None:
    """Refuse now what the worker, who knows the length that `auto` gives, would refuse in any case."""
    longest = {None: hf_config.max_context, "auto": 0}.get(max_model_len, max_model_len)
    _, seqs = step_limits(scheduler, usage, longest)
    active = scheduler.max_num_active_seqs
    if active is not None and active > seqs:
        raise ConfigError(
            f"max_num_active_seqs={active} is more than max_num_seqs={seqs}, which is the limit already; lower the "
            "first or raise the second"
        )
    if not scheduler.enable_chunked_prefill and scheduler.long_prefill_token_threshold:
        raise ConfigError(
            f"long_prefill_token_threshold={scheduler.long_prefill_token_threshold} cuts prompts, which needs chunked "
            "prefill; drop one of the two"
        )
    if not scheduler.enable_chunked_prefill and scheduler.max_num_mixed_prefill_tokens:
        raise ConfigError(
            f"max_num_mixed_prefill_tokens={scheduler.max_num_mixed_prefill_tokens} cuts prompts, which needs chunked "
            "prefill; drop one of the two"
        )
