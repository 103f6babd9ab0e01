"""What the names and sizes of a checkpoint's files show, before anything is started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minivllm.config.model_files import (
    INDEX,
    check_tokenizer,
    find_shards,
    read_generation_config,
    read_json,
    why_no_template,
)
from minivllm.exceptions import ModelFilesError


def put(directory: Path, **files: str) -> Path:
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(text)
    return directory


def put_index(directory: Path, *names: str) -> None:
    weight_map = {f"tensor.{i}": name for i, name in enumerate(names)}
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_the_index_says_which_files_are_the_weights(tmp_path: Path):
    put_index(tmp_path, "b.safetensors", "a.safetensors", "b.safetensors")
    put(tmp_path, a__safetensors="x", b__safetensors="x", stray__safetensors="x")
    assert [path.name for path in find_shards(tmp_path)] == ["a.safetensors", "b.safetensors"]


def test_without_an_index_one_file_of_the_usual_name_is_the_model(tmp_path: Path):
    put(tmp_path, model__safetensors="x", consolidated__safetensors="x")
    assert [path.name for path in find_shards(tmp_path)] == ["model.safetensors"]


def test_a_missing_shard_is_named(tmp_path: Path):
    put_index(tmp_path, "a.safetensors", "b.safetensors")
    put(tmp_path, a__safetensors="x")
    with pytest.raises(ModelFilesError, match=r"b\.safetensors is missing"):
        find_shards(tmp_path)


def test_an_empty_shard_is_named(tmp_path: Path):
    put(tmp_path, model__safetensors="")
    with pytest.raises(ModelFilesError, match=r"model\.safetensors is empty"):
        find_shards(tmp_path)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/a.safetensors"])
def test_an_index_may_not_name_files_elsewhere(tmp_path: Path, name: str):
    put_index(tmp_path, name)
    with pytest.raises(ModelFilesError, match="plain name"):
        find_shards(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}'])
def test_an_index_that_is_none_is_named(tmp_path: Path, text: str):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ModelFilesError, match=INDEX):
        find_shards(tmp_path)


def test_pickles_are_refused_with_the_reason(tmp_path: Path):
    put(tmp_path, pytorch_model__bin="x")
    with pytest.raises(ModelFilesError, match=r"pytorch_model\.bin .* can run code"):
        find_shards(tmp_path)


def test_no_weights_at_all_names_the_remedy(tmp_path: Path):
    with pytest.raises(ModelFilesError, match="--load-format dummy"):
        find_shards(tmp_path)


@pytest.mark.parametrize(("text", "reason"), [("{", "not JSON"), ("[1]", "not an object"), ("\xff", "not JSON")])
def test_a_json_file_that_is_none_is_named(tmp_path: Path, text: str, reason: str):
    path = tmp_path / "config.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ModelFilesError, match=reason) as error:
        read_json(path)
    assert str(path) in str(error.value)


def test_a_missing_tokenizer_names_both_ways_out(tmp_path: Path):
    with pytest.raises(ModelFilesError, match="--tokenizer, or --skip-tokenizer-init"):
        check_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{", "not JSON"), ("[]", "not a tokenizer"), ("{}", "not a tokenizer"), ('{"model": 1}', "not a tokenizer"),
     ('{"model": {"a": 1}, "x": tru}', "not JSON"), ("", "not JSON"), ("[" * 100_000, "tokenizer.json")],
)  # fmt: skip
def test_a_tokenizer_that_is_none_is_named(tmp_path: Path, text: str, reason: str):
    put(tmp_path, tokenizer__json=text, tokenizer_config__json="{}")
    with pytest.raises(ModelFilesError, match=reason) as error:
        check_tokenizer(tmp_path)
    assert str(tmp_path / "tokenizer.json") in str(error.value)


def test_the_settings_of_a_tokenizer_are_none_unless_they_name_code(tmp_path: Path):
    put(tmp_path, tokenizer_config__json="{}")
    with pytest.raises(ModelFilesError, match=r"no tokenizer\.json"):
        check_tokenizer(tmp_path)
    put(tmp_path, tokenizer_config__json='{"auto_map": {"AutoTokenizer": ["own.Tokenizer", null]}}')
    check_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "config",
    [{"chat_template": "{% if %}"}, {"chat_template": [{"name": "default", "template": "{{ x | no_such_filter }}"}]}],
)
def test_a_broken_chat_template_is_named_with_the_reason(tmp_path: Path, config: dict):
    put(tmp_path, tokenizer__json='{"model": {}}', tokenizer_config__json=json.dumps(config))
    with pytest.raises(ModelFilesError, match=r"tokenizer_config\.json is not a Jinja template: .*line 1"):
        check_tokenizer(tmp_path)
    put(tmp_path, chat_template__jinja="{% endif %}")
    with pytest.raises(ModelFilesError, match=r"chat_template\.jinja is not a Jinja template"):
        check_tokenizer(tmp_path)


def test_what_transformers_adds_to_jinja_is_known():
    text = "{% for m in messages %}{% if not m %}{% continue %}{% endif %}{{ raise_exception('x') }}{{ m | tojson }}"
    assert why_no_template(text + "{% generation %}{{ strftime_now('%d') }}{% endgeneration %}{% endfor %}") is None


def test_the_generation_config_is_the_models_own_another_or_only_its_end_tokens(tmp_path: Path):
    model, other = tmp_path / "model", tmp_path / "other"
    model.mkdir(), other.mkdir()
    put(model, generation_config__json='{"temperature": 0.6, "eos_token_id": [1, 2]}')
    put(other, generation_config__json='{"temperature": 0.1}')
    assert read_generation_config(model, "auto", {}) == {"temperature": 0.6, "eos_token_id": [1, 2]}
    assert read_generation_config(model, "vllm", {}) == {"eos_token_id": [1, 2]}
    assert read_generation_config(model, str(other), {"top_k": 3}) == {"temperature": 0.1, "top_k": 3}
    assert read_generation_config(other, "auto", {"temperature": 1.0}) == {"temperature": 1.0}


def test_a_model_without_a_generation_config_is_fine_but_a_named_directory_must_have_one(tmp_path: Path):
    assert read_generation_config(tmp_path, "auto", {}) == {}
    with pytest.raises(ModelFilesError, match="missing"):
        read_generation_config(tmp_path, str(tmp_path), {})
