"""The table of architectures."""

from __future__ import annotations

import subprocess
import sys

import pytest

from minivllm.exceptions import ModelFilesError
from minivllm.models import registry
from minivllm.models.registry import ModelRegistry


def test_every_entry_leads_to_a_class_of_that_name():
    for architecture in ModelRegistry.supported_architectures():
        assert ModelRegistry.load_class(architecture).__name__ == architecture


def test_an_unknown_architecture_is_refused_with_the_list_of_known_ones():
    with pytest.raises(ModelFilesError, match="GPT2LMHeadModel.*LlamaForCausalLM.*Qwen3ForCausalLM"):
        ModelRegistry.check("GPT2LMHeadModel")


def test_a_model_of_ones_own_joins_by_a_call(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))
    ModelRegistry.register_model("MineForCausalLM", "minivllm.models.llama:LlamaForCausalLM")
    ModelRegistry.check("MineForCausalLM")
    assert ModelRegistry.load_class("MineForCausalLM").__name__ == "LlamaForCausalLM"
    with pytest.raises(ValueError, match="module:Class"):
        ModelRegistry.register_model("OtherForCausalLM", "minivllm.models.llama")


def test_checking_a_name_imports_no_torch():
    code = (
        "import sys; from minivllm.models.registry import ModelRegistry as R; "
        "R.check('LlamaForCausalLM'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
