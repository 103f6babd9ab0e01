"""Everything arguments, config.json and file names can show is refused before anything is started."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minivllm.config.engine import EngineConfig
from minivllm.config.scheduler import step_limits
from minivllm.engine.arg_utils import EngineArgs
from minivllm.exceptions import ConfigError, ModelFilesError
from minivllm.messages.codec import Decoder, encode


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def remove(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).unlink()


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A checkpoint of one's own to break."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def config(model: Path, usage: str = "offline", **options: Any) -> EngineConfig:
    return EngineArgs(model, **options).create_engine_config(usage)


def test_the_config_has_local_directories_and_the_name_as_it_was_given(tiny_model: Path, monkeypatch):
    monkeypatch.chdir(tiny_model.parent)
    made = config(Path(tiny_model.name))
    assert made.model.model == made.model.tokenizer == str(tiny_model.resolve())
    assert made.model.served_model_name == [tiny_model.name]


def test_the_config_survives_the_handshake(tiny_model: Path):
    made = config(tiny_model, hf_overrides={"rope_theta": 5.0}, override_generation_config={"top_k": 3})
    assert Decoder(EngineConfig)(encode(made)) == made


def test_making_a_config_leaves_the_arguments_as_they_were(tiny_model: Path):
    args = EngineArgs(tiny_model, max_model_len="1k", dtype="half")
    first = args.create_engine_config()
    assert (args.max_model_len, args.dtype) == ("1k", "half")
    assert args.create_engine_config() == first
    assert (first.model.max_model_len, first.model.dtype) == (1000, "float16")


@pytest.mark.parametrize(
    ("usage", "options", "tokens", "seqs"),
    [
        ("serve", {}, 2048, 128),
        ("offline", {}, 4096, 256),
        ("serve", {"max_num_seqs": 4000}, 4000, 4000),
        ("serve", {"max_num_batched_tokens": 64}, 64, 64),
        ("serve", {"max_num_batched_tokens": 64, "max_num_seqs": 8}, 64, 8),
        ("serve", {"enable_chunked_prefill": False, "hf_overrides": {"max_position_embeddings": 9000}}, 9000, 128),
    ],
)
def test_a_default_gives_way_to_what_is_given(tiny_model: Path, usage: str, options: dict, tokens: int, seqs: int):
    made = config(tiny_model, usage, **options)
    assert step_limits(made.scheduler, made.usage, made.hf_config.max_context) == (tokens, seqs)


def test_with_auto_the_step_is_left_to_the_length_that_will_fit(tiny_model: Path):
    made = config(tiny_model, "serve", max_model_len="auto", enable_chunked_prefill=False, max_num_batched_tokens=512)
    assert made.scheduler.max_num_batched_tokens == 512
    made = config(tiny_model, "serve", max_model_len="auto", enable_chunked_prefill=False)
    assert made.scheduler.max_num_batched_tokens is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_num_active_seqs": 9, "max_num_seqs": 8}, "max_num_active_seqs=9 is more than max_num_seqs=8"),
        ({"max_num_active_seqs": 0}, "max_num_active_seqs=0 must be at least 1"),
        ({"max_num_queued_reqs": 0}, "max_num_queued_reqs=0"),
        ({"watermark": 1.0}, "watermark=1.0"),
        ({"long_prefill_token_threshold": -1}, "long_prefill_token_threshold=-1"),
        (
            {"long_prefill_token_threshold": 5, "enable_chunked_prefill": False},
            "long_prefill_token_threshold=5 cuts prompts",
        ),
        ({"max_num_mixed_prefill_tokens": -1}, "max_num_mixed_prefill_tokens=-1"),
        (
            {"max_num_mixed_prefill_tokens": 64, "enable_chunked_prefill": False},
            "max_num_mixed_prefill_tokens=64 cuts prompts",
        ),
        ({"prefix_caching_hash_algo": "sha256_cbor"}, "prefix_caching_hash_algo='sha256_cbor'"),
        ({"kv_events_config": {"endpont": "x"}}, "kv_events_config: .*endpont"),
        ({"kv_events_config": {"publisher": "kafka"}}, "kv_events_config: .*kafka"),
        ({"kv_events_config": {"hwm": 0}}, "hwm=0 is too small"),
        (
            {"kv_events_config": {"enable_kv_cache_events": True}, "enable_prefix_caching": False},
            "no events without the prefix cache",
        ),
        ({"scheduling_policy": "lifo"}, "scheduling_policy='lifo'"),
        ({"otlp_traces_endpoint": "http://127.0.0.1:4317"}, "only the OpenAI server sends traces"),
    ],
)
def test_limits_of_the_scheduler_that_make_no_sense_are_refused(tiny_model: Path, options: dict, says: str):
    with pytest.raises(ConfigError, match=says):
        config(tiny_model, **options)


def test_a_hash_whose_package_is_missing_is_refused_with_the_command(tiny_model: Path, monkeypatch):
    assert config(tiny_model, prefix_caching_hash_algo="xxhash").cache.prefix_caching_hash_algo == "xxhash"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install .minivllm\[xxhash\]"):
        config(tiny_model, prefix_caching_hash_algo="xxhash")


def test_the_length_is_left_open_for_the_worker(tiny_model: Path):
    assert config(tiny_model).model.max_model_len is None
    assert config(tiny_model, max_model_len=-1).model.max_model_len == "auto"
    assert config(tiny_model, max_model_len="auto").model.max_model_len == "auto"


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"block_size": 24}, ["block_size=24", "32"]),
        ({"block_size": 0}, ["block_size=0"]),
        ({"max_model_len": 999999}, ["999999", "2048"]),
        ({"max_model_len": 0}, ["max_model_len=0"]),
        ({"max_model_len": "long"}, ["max_model_len", "long"]),
        ({"max_num_seqs": 0}, ["max_num_seqs=0"]),
        ({"max_num_seqs": "8"}, ["max_num_seqs='8'", "int"]),
        ({"max_num_seqs": 9, "max_num_batched_tokens": 8}, ["max_num_seqs=9", "max_num_batched_tokens=8"]),
        ({"enable_chunked_prefill": False, "max_num_batched_tokens": 512}, ["512", "2048", "chunked"]),
        ({"gpu_memory_utilization": 1.2}, ["gpu_memory_utilization=1.2"]),
        ({"kv_cache_memory_bytes": "-1"}, ["kv_cache_memory_bytes=-1"]),
        ({"max_logprobs": -2}, ["max_logprobs=-2"]),
        ({"seed": 1 << 64}, ["seed"]),
        ({"stream_interval": 0}, ["stream_interval=0"]),
        ({"dtype": "int8"}, ["dtype='int8'", "int8"]),
        ({"load_format": "gguf"}, ["load_format='gguf'"]),
        ({"enable_prefix_caching": "yes"}, ["enable_prefix_caching='yes'", "bool"]),
        ({"distributed_executor_backend": "mp"}, ["distributed_executor_backend=mp", "uni"]),
        ({"hf_overrides": {"architectures": ["MambaForCausalLM"], "hidden_size": None}},
         ["MambaForCausalLM", "Qwen3ForCausalLM"]),
        ({"override_generation_config": {"temperature": 9}}, ["temperature", "9"]),
        ({"override_generation_config": {"eos_token_id": "</s>"}}, ["eos_token_id", "</s>"]),
        ({"tokenizer": "no/such/tokenizer"}, ["no/such/tokenizer"]),
        ({"generation_config": "no/such/directory"}, ["no/such/directory"]),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named_with_its_value(tiny_model: Path, options: dict, names: list[str]):
    with pytest.raises(ConfigError) as error:
        config(tiny_model, "serve", **options)
    assert [name for name in names if name not in str(error.value)] == []


@pytest.mark.parametrize(
    ("break_it", "names"),
    [
        (remove("config.json"), ["config.json", "missing"]),
        (lambda m: (m / "config.json").write_text("{"), ["config.json", "not JSON"]),
        (edit_config(architectures=["MambaForCausalLM"]), ["MambaForCausalLM", "Qwen3ForCausalLM"]),
        (edit_config(vocab_size=None), ["config.json", "vocab_size"]),
        (edit_config(hidden_act="gelu"), ["config.json", "hidden_act", "gelu", "silu"]),
        (edit_config(head_dim=24), ["config.json", "head_dim 24", "16"]),
        (edit_config(rope_parameters={"rope_type": "spiral"}), ["config.json", "spiral", "yarn"]),
        (edit_config(rope_parameters={"partial_rotary_factor": 0.5}), ["config.json", "partial_rotary_factor 0.5"]),
        (remove("model.safetensors"), ["safetensors"]),
        (lambda m: (m / "model.safetensors").write_bytes(b""), ["model.safetensors", "empty"]),
        (lambda m: (m / "generation_config.json").write_text("[]"), ["generation_config.json"]),
        (lambda m: [path.unlink() for path in m.glob("tokenizer*")], ["tokenizer"]),
    ],
)  # fmt: skip
def test_a_wrong_file_is_named(model: Path, break_it: Callable[[Path], Any], names: list[str]):
    break_it(model)
    with pytest.raises(ModelFilesError) as error:
        config(model)
    assert [name for name in names if name not in str(error.value)] == []


def test_random_weights_need_no_files_and_token_ids_no_tokenizer(model: Path):
    for path in [*model.glob("*.safetensors"), *model.glob("tokenizer*")]:
        path.unlink()
    assert config(model, load_format="dummy", skip_tokenizer_init=True).load.load_format == "dummy"


@pytest.mark.parametrize("name", ["no/such/model", "/no/such", "./nothing", "organisation/no-such-model", "a b"])
def test_a_model_that_is_nowhere_is_named_in_one_line(name: str):
    with pytest.raises(ModelFilesError, match="is neither a directory nor") as error:
        config(Path(name))
    assert str(Path(name)) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-has-this-name/model"])
def test_a_path_that_cannot_be_looked_at_is_no_internal_error(name: str):
    with pytest.raises(ModelFilesError, match="cannot be looked at"):
        config(Path(name))


def test_a_file_is_no_model(tiny_model: Path):
    with pytest.raises(ModelFilesError, match="give the directory"):
        config(tiny_model / "config.json")
