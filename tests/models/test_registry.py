"""The table of architectures."""

from __future__ import annotations

import subprocess
import sys

import pytest

from minivllm.exceptions import ModelFilesError
from minivllm.models import registry
from minivllm.models.registry import ModelRegistry, load_class


def test_every_entry_leads_to_a_class_of_that_name():
    for architecture in ModelRegistry.supported_architectures():
        assert load_class(ModelRegistry.target(architecture)).__name__ == architecture


def test_an_unknown_architecture_is_refused_with_the_list_of_known_ones():
    with pytest.raises(ModelFilesError, match="GPT2LMHeadModel.*LlamaForCausalLM.*Qwen3ForCausalLM"):
        ModelRegistry.target("GPT2LMHeadModel")


def test_a_model_of_ones_own_joins_by_a_call(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))
    ModelRegistry.register_model("MineForCausalLM", "minivllm.models.llama:LlamaForCausalLM")
    assert load_class(ModelRegistry.target("MineForCausalLM")).__name__ == "LlamaForCausalLM"
    for target in ("minivllm.models.llama", "__main__:MineForCausalLM"):
        with pytest.raises(ValueError, match="module:Class"):
            ModelRegistry.register_model("OtherForCausalLM", target)


def test_a_target_that_cannot_be_imported_is_named():
    for target in ("no.such.module:Model", "minivllm.models.llama:NoSuchModel"):
        with pytest.raises(ModelFilesError, match=target):
            load_class(target)


def test_checking_a_name_imports_no_torch():
    code = (
        "import sys; from minivllm.models.registry import ModelRegistry as R; "
        "R.target('LlamaForCausalLM'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
