"""The model maker: what it writes is a checkpoint to transformers, repeatable, and not boring."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from make_random_model import DEFAULT_TEXT, FAMILIES, SPECIAL_TOKENS, make_model
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

PROMPTS = ["Hello, how are you today?", "def add(", "1, 2, 3"]
AWKWARD = "Hello 😀 123 e\u0301 <|im_end|>\n\n  x = 1  \n I'll"


def _files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("style", ["classic", "v5"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("arch", FAMILIES)
def test_transformers_loads_every_family_with_no_tensor_missing_or_left_over(tmp_path, arch, tied, style):
    directory = make_model(tmp_path, arch=arch, tie_word_embeddings=tied, config_style=style)
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.float32


@pytest.mark.parametrize("arch", FAMILIES)
def test_both_config_styles_mean_the_same_model(tmp_path, arch):
    logits = []
    for style in ("classic", "v5"):
        directory = make_model(tmp_path / style, arch=arch, config_style=style)
        model = AutoModelForCausalLM.from_pretrained(directory)
        logits.append(model(torch.arange(300)[None]).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("arch", FAMILIES)
def test_greedy_output_is_varied_and_its_choices_are_clear(tmp_path, arch):
    directory = make_model(tmp_path, arch=arch)
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    whole = {"output_logits": True, "return_dict_in_generate": True}
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        result = model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=[], **whole)
        top = torch.cat(result.logits).topk(2).values
        assert len(set(result.sequences[0, ids.shape[1] :].tolist())) >= 10
        assert (top[:, 0] - top[:, 1]).median() > 0.1


@pytest.mark.parametrize("arch", FAMILIES)
def test_every_way_to_load_the_tokenizer_gives_the_same_ids(tmp_path, arch):
    directory = make_model(tmp_path, arch=arch)
    plain = Tokenizer.from_file(str(directory / "tokenizer.json"))
    for cls in (AutoTokenizer, PreTrainedTokenizerFast):
        tokenizer = cls.from_pretrained(directory)
        assert tokenizer(AWKWARD).input_ids == plain.encode(AWKWARD).ids
        assert len(tokenizer) == plain.get_vocab_size() == 512


def test_the_same_arguments_give_the_same_bytes_and_another_seed_other_weights(tmp_path):
    first, second, other = (make_model(tmp_path / str(i), seed=seed) for i, seed in enumerate((7, 7, 8)))
    assert _files(first) == _files(second)
    weights = "model.safetensors"
    assert _files(first)[weights] != _files(other)[weights]


def test_shards_hold_the_same_tensors_as_one_file(tmp_path):
    whole = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "whole"))
    directory = make_model(tmp_path / "shards", num_shards=4)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(list(directory.glob("*.safetensors"))) == 4
    split = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    assert all(torch.equal(tensor, split[name]) for name, tensor in whole.state_dict().items())


def test_making_a_model_again_leaves_no_file_of_the_former(tmp_path):
    make_model(tmp_path, num_shards=3)
    make_model(tmp_path, num_shards=1)
    assert [path.name for path in tmp_path.glob("*safetensors*")] == ["model.safetensors"]


@pytest.mark.parametrize("vocab_size", [300, 512, 5000])
def test_every_id_of_the_vocabulary_decodes_to_something(tmp_path, vocab_size):
    tokenizer = Tokenizer.from_file(str(make_model(tmp_path, vocab_size=vocab_size) / "tokenizer.json"))
    texts = [tokenizer.decode([token], skip_special_tokens=False) for token in range(vocab_size)]
    assert all(texts)
    assert texts[: len(SPECIAL_TOKENS)] == SPECIAL_TOKENS


def test_text_comes_back_as_it_went_in(tmp_path):
    tokenizer = Tokenizer.from_file(str(make_model(tmp_path, arch="llama") / "tokenizer.json"))
    text = DEFAULT_TEXT + AWKWARD.replace("<|im_end|>", "") + "\x00\x7f"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


@pytest.mark.parametrize(("arch", "opens_with_bos"), [("llama", True), ("mistral", True), ("qwen3", False)])
def test_the_chat_template_opens_with_bos_where_the_family_has_one(tmp_path, arch, opens_with_bos):
    tokenizer = AutoTokenizer.from_pretrained(make_model(tmp_path, arch=arch))
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    opening = "<|bos|>" if opens_with_bos else ""
    turns = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert rendered == opening + turns
    with pytest.raises(Exception, match="unknown role: pirate"):
        tokenizer.apply_chat_template([{"role": "pirate", "content": "Arr"}], tokenize=False)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"arch": "gpt2"}, "gpt2"),
        ({"dtype": "int8"}, "int8"),
        ({"vocab_size": 100}, "too small"),
        ({"num_heads": 3, "num_kv_heads": 2}, "not a multiple"),
        ({"head_dim": 15}, "odd"),
        ({"arch": "mistral", "attention_bias": True}, "no attention_bias"),
        ({"arch": "llama", "sliding_window": 64}, "no sliding window"),
        ({"num_shards": 1000}, "num_shards"),
    ],
)
def test_what_cannot_be_made_is_refused_with_the_reason(tmp_path, options, reason):
    with pytest.raises(ValueError, match=reason):
        make_model(tmp_path / "model", **options)
