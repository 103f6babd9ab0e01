"""Make a model directory with seeded random weights, for tests, benchmarks and trying the server.

Owns the files of a Hugging Face style checkpoint (config, generation config, tokenizer, weights) for the
architectures minivllm serves. The model says nothing sensible; its outputs are varied and repeatable: the
same arguments give the same bytes. Needs torch, safetensors and tokenizers, and nothing of minivllm.
"""

from __future__ import annotations

import argparse
import json
import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

PAD, BOS, EOS, TURN_START, TURN_END = "<|pad|>", "<|bos|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = [PAD, BOS, EOS, TURN_START, TURN_END]
NUM_BYTES = 256

# Words with their leading space, single digits, runs of punctuation, line ends: as Qwen's tokenizers split.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The template of a family that adds BOS opens with it, as Llama's do: who encodes the rendered chat must not
# add a second one.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('unknown role: ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Fixed, so that a small model's tokenizer never changes; `--text` trains on something larger.
DEFAULT_TEXT = """\
The quick brown fox jumps over the lazy dog. A server answers every request exactly once: finished,
aborted or failed. What is the capital of France? The capital of France is Paris, and the river that
runs through it is the Seine. Once upon a time, in a small town by the sea, there lived an old
clockmaker who could not sleep. Every night he listened to the waves, and every morning he wrote down
how many he had counted. "You should rest," said his daughter, "the sea will still be there tomorrow."
He smiled, because she was right, and because she was not. People ask many things of a language model:
to explain why the sky is blue, to translate a sentence, to write a short story about a robot that
learns to paint, or to count from 1 to 100 without making a mistake. Numbers such as 3, 14, 159, 2653
and 1000000 should be there too, with times like 12:30 and dates like 2024-05-17. Hello, how are you
today? I am fine, thank you. Please tell me a little more about yourself and your work.
def add(first, second):
    return first + second
for index in range(10):
    print(index, add(index, 1))  # prints the index and the next number
{"name": "value", "list": [1, 2, 3], "nested": {"true": false, "null": null}}
Où est la bibliothèque ? Das Wetter ist heute schön. ¿Qué hora es?
Быстрая лиса прыгает. 你好，世界。今日はいい天気です。 😀🚀
"""


@dataclass(frozen=True)
class Family:
    """What sets one architecture's checkpoint apart from the others."""

    architecture: str
    model_type: str
    rms_norm_eps: float
    rope_theta: float
    adds_bos: bool = True
    qk_norm: bool = False
    has_bias: bool = False  # on q, k and v, always; nothing in the config says so
    takes_bias: bool = False  # on q, k, v and o, when the config's `attention_bias` is true
    normalizes: bool = False  # the tokenizer composes Unicode first (NFC)
    sandwiches: bool = False  # norms after attention and MLP as well as before; norm weights are kept less 1


LLAMA = Family("LlamaForCausalLM", "llama", 1e-5, 10000.0, takes_bias=True)
MISTRAL = Family("MistralForCausalLM", "mistral", 1e-5, 10000.0)
QWEN2 = Family("Qwen2ForCausalLM", "qwen2", 1e-6, 1000000.0, adds_bos=False, normalizes=True, has_bias=True)
QWEN3 = Family(
    "Qwen3ForCausalLM",
    "qwen3",
    1e-6,
    1000000.0,
    adds_bos=False,
    normalizes=True,
    qk_norm=True,
    takes_bias=True,
)
GEMMA2 = Family("Gemma2ForCausalLM", "gemma2", 1e-6, 10000.0, sandwiches=True)
GEMMA3 = Family("Gemma3ForCausalLM", "gemma3_text", 1e-6, 1000000.0, qk_norm=True, sandwiches=True)
FAMILIES = {
    "llama": LLAMA,
    "llama3": replace(LLAMA, rope_theta=500000.0),
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "small": {
        "arch": "qwen3", "hidden_size": 256, "intermediate_size": 768, "num_layers": 4, "num_heads": 8,
        "num_kv_heads": 4, "head_dim": 32, "vocab_size": 4096, "max_position_embeddings": 4096,
        "dtype": "bfloat16",
    },
    # Small enough that what is not a kernel is most of a step's cost: for measuring that.
    "tiny-llama": {
        "arch": "llama", "hidden_size": 256, "intermediate_size": 688, "num_layers": 4, "num_heads": 4,
        "num_kv_heads": 2, "head_dim": 64, "vocab_size": 32000, "max_position_embeddings": 4096,
        "dtype": "bfloat16",
    },
    "qwen3-0.6b": {
        "arch": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_layers": 28, "num_heads": 16,
        "num_kv_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
        "dtype": "bfloat16",
    },
    "gemma-3-1b": {
        "arch": "gemma3", "hidden_size": 1152, "intermediate_size": 6912, "num_layers": 26, "num_heads": 4,
        "num_kv_heads": 1, "head_dim": 256, "vocab_size": 262144, "max_position_embeddings": 32768,
        "sliding_window": 512, "dtype": "bfloat16",
    },
    "llama-3.2-1b": {
        "arch": "llama3", "hidden_size": 2048, "intermediate_size": 8192, "num_layers": 16, "num_heads": 32,
        "num_kv_heads": 8, "head_dim": 64, "vocab_size": 128256, "max_position_embeddings": 131072,
        "dtype": "bfloat16",
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    },
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """The sizes of one model, checked; everything written derives from these."""

    family: Family
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    dtype: str
    rope_parameters: dict[str, Any]
    sliding_window: int | None
    attention_bias: bool
    sliding_window_pattern: int
    first_window_layer: int

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embeddings turn pairs")
        if self.vocab_size < NUM_BYTES + len(SPECIAL_TOKENS):
            raise ValueError(
                f"vocab_size {self.vocab_size} is too small: a byte-level tokenizer needs "
                f"{NUM_BYTES + len(SPECIAL_TOKENS)}"
            )
        if self.attention_bias and not (self.family.takes_bias or self.family.has_bias):
            raise ValueError(f"{self.family.architecture} has no attention_bias; use llama, qwen2 or qwen3")
        if not self.attention_bias and self.family.has_bias:
            raise ValueError(f"{self.family.architecture} always has an attention bias; use qwen3 or llama")


def make_model(
    out: str | Path,
    *,
    arch: str = "qwen3",
    hidden_size: int = 64,
    intermediate_size: int = 128,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    vocab_size: int = 512,
    max_position_embeddings: int = 2048,
    tie_word_embeddings: bool = True,
    dtype: str = "float32",
    seed: int = 0,
    num_shards: int = 1,
    rope_parameters: dict[str, Any] | None = None,
    sliding_window: int | None = None,
    attention_bias: bool | None = None,
    sliding_window_pattern: int | None = None,
    first_window_layer: int = 0,
    config_style: str = "classic",
    text: str = DEFAULT_TEXT,
) -> Path:
    """Write a model directory at `out` and return it.

    rope_parameters: as transformers 5 names them ({"rope_type": ..., "rope_theta": ..., ...}); None is the
    family's own, which for "llama3" includes its scaling. config_style: "classic" (torch_dtype, rope_theta,
    rope_scaling) or "v5" (dtype, rope_parameters). sliding_window_pattern: gemma2 (2) and gemma3 (6); of so many
    layers, the last has no window. first_window_layer: qwen2 and qwen3, with a sliding_window.
    text: what the tokenizer is trained on.

    Raises:
        ValueError: sizes that do not fit together, or a name that is not known.
    """
    if arch not in FAMILIES:
        raise ValueError(f"arch {arch!r} is not one of {', '.join(FAMILIES)}")
    family = FAMILIES[arch]
    shape = Shape(
        family=family,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=tie_word_embeddings,
        dtype=dtype,
        rope_parameters=rope_parameters or default_rope(arch, max_position_embeddings),
        sliding_window=sliding_window,
        attention_bias=family.has_bias if attention_bias is None else attention_bias,
        sliding_window_pattern=sliding_window_pattern or (2 if arch == "gemma2" else 6),
        first_window_layer=first_window_layer,
    )
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(vocab_size, text, family)
    tokenizer.save(str(out / "tokenizer.json"))
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    _write_json(out / "config.json", model_config(shape, ids, config_style))
    _write_json(out / "generation_config.json", generation_config(ids))
    _write_json(out / "tokenizer_config.json", tokenizer_config(shape))
    write_weights(out, shape, seed, num_shards)
    return out


def default_rope(arch: str, max_position_embeddings: int) -> dict[str, Any]:
    """A family's rotary parameters, in the names of transformers 5."""
    theta = FAMILIES[arch].rope_theta
    if arch != "llama3":
        return {"rope_type": "default", "rope_theta": theta}
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": max(max_position_embeddings // 8, 1),
    }


def model_config(shape: Shape, ids: dict[str, int], style: str) -> dict[str, Any]:
    """config.json, in the "classic" key names of most published checkpoints or those of transformers "v5"."""
    config: dict[str, Any] = {
        "architectures": [shape.family.architecture],
        "model_type": shape.family.model_type,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "rms_norm_eps": shape.family.rms_norm_eps,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": ids[BOS],
        "eos_token_id": ids[EOS],
        "pad_token_id": ids[PAD],
    }
    if shape.family.takes_bias:
        config["attention_bias"] = shape.attention_bias
    if shape.family.model_type == "llama":
        config["mlp_bias"] = False
    config |= _sliding_window_keys(shape)
    if shape.family in (GEMMA2, GEMMA3):
        config |= _gemma_keys(shape, style)
    if shape.family is GEMMA3:
        return config | _gemma3_rope_keys(shape, style)
    if style == "v5":
        return config | {"dtype": shape.dtype, "rope_parameters": shape.rope_parameters}
    if style == "classic":
        return config | {"torch_dtype": shape.dtype} | _classic_rope_keys(shape.rope_parameters)
    raise ValueError(f"config_style {style!r} is not one of classic, v5")


def _sliding_window_keys(shape: Shape) -> dict[str, Any]:
    if shape.family.model_type == "mistral":
        return {"sliding_window": shape.sliding_window}
    if shape.family.model_type in ("qwen2", "qwen3"):
        on = shape.sliding_window is not None
        # Layers from `max_window_layers` on have the window.
        first = shape.first_window_layer if on else shape.num_layers
        return {"use_sliding_window": on, "sliding_window": shape.sliding_window, "max_window_layers": first}
    if shape.family in (GEMMA2, GEMMA3):
        return {"sliding_window": shape.sliding_window or 32}
    if shape.sliding_window is not None:
        raise ValueError(f"{shape.family.architecture} has no sliding window; use mistral, qwen2, qwen3 or gemma")
    return {}


def _gemma_keys(shape: Shape, style: str) -> dict[str, Any]:
    """What a Gemma's config.json has beside the others', or in their place."""
    pattern = shape.sliding_window_pattern
    keys = {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 2 * shape.head_dim,  # not head_dim, so that nobody can take the one for the other
        "attention_bias": False,
        "final_logit_softcapping": 30.0 if shape.family is GEMMA2 else None,
        "attn_logit_softcapping": 5.0 if shape.family is GEMMA2 else None,  # 50 would hardly be felt
    }
    if style == "v5" or shape.family is GEMMA2 and pattern != 2:
        kinds = ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(shape.num_layers)]
        return keys | {"layer_types": kinds}
    return keys if shape.family is GEMMA2 else keys | {"sliding_window_pattern": pattern}


def _gemma3_rope_keys(shape: Shape, style: str) -> dict[str, Any]:
    """Two bases: one for layers that see everything, one for those with a window."""
    if style == "classic":
        return {"torch_dtype": shape.dtype, "rope_local_base_freq": 10000} | _classic_rope_keys(shape.rope_parameters)
    local = {"rope_type": "default", "rope_theta": 10000.0}
    return {
        "dtype": shape.dtype,
        "rope_parameters": {"full_attention": shape.rope_parameters, "sliding_attention": local},
    }


def _classic_rope_keys(rope: dict[str, Any]) -> dict[str, Any]:
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    is_plain = scaling.get("rope_type", "default") == "default"
    return {"rope_theta": rope["rope_theta"], "rope_scaling": None if is_plain else scaling}


def generation_config(ids: dict[str, int]) -> dict[str, Any]:
    """generation_config.json: a chat turn's end also ends the output; the pad token never matters."""
    return {"bos_token_id": ids[BOS], "eos_token_id": [ids[EOS], ids[TURN_END]], "pad_token_id": ids[PAD]}


def tokenizer_config(shape: Shape) -> dict[str, Any]:
    """tokenizer_config.json, chat template included."""
    opening = "{{ bos_token }}" if shape.family.adds_bos else ""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "additional_special_tokens": [TURN_START, TURN_END],
        "chat_template": opening + CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": shape.max_position_embeddings,
    }


def train_tokenizer(vocab_size: int, text: str, family: Family) -> Tokenizer:
    """A byte-level BPE tokenizer with exactly `vocab_size` ids, each of which decodes to something."""
    tokenizer = Tokenizer(models.BPE())
    if family.normalizes:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        tokenizer = _fill_vocabulary(tokenizer, vocab_size)
    if family.adds_bos:
        bos = (BOS, tokenizer.token_to_id(BOS))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[bos])
    return tokenizer


def _fill_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    """Go on with merges of the tokens there are, once the text has no more pairs to offer."""
    state = json.loads(tokenizer.to_str())
    vocab, merges = state["model"]["vocab"], state["model"]["merges"]
    learned = ["".join(pair) for pair in merges]
    parts = learned or sorted(set(vocab) - set(SPECIAL_TOKENS))
    for left, right in product(parts, repeat=2):
        if len(vocab) >= vocab_size:
            return Tokenizer.from_str(json.dumps(state))
        if left + right not in vocab:
            vocab[left + right] = len(vocab)
            merges.append([left, right])
    raise ValueError(
        f"the text is too short for vocab_size {vocab_size}: it gives {len(vocab)}; give more of it"
    )


def tensor_shapes(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the checkpoint in file order, by name and shape."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    yield "model.embed_tokens.weight", (shape.vocab_size, hidden)
    for index in range(shape.num_layers):
        layer = f"model.layers.{index}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        for name, size in (("q_proj", q_size), ("k_proj", kv_size), ("v_proj", kv_size)):
            yield f"{layer}.self_attn.{name}.weight", (size, hidden)
            if shape.attention_bias:
                yield f"{layer}.self_attn.{name}.bias", (size,)
        if shape.family.qk_norm:
            yield f"{layer}.self_attn.q_norm.weight", (shape.head_dim,)
            yield f"{layer}.self_attn.k_norm.weight", (shape.head_dim,)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, q_size)
        if shape.attention_bias and shape.family.takes_bias:
            yield f"{layer}.self_attn.o_proj.bias", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        if shape.family.sandwiches:
            yield f"{layer}.pre_feedforward_layernorm.weight", (hidden,)
            yield f"{layer}.post_feedforward_layernorm.weight", (hidden,)
        yield f"{layer}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.up_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    if not shape.tie_word_embeddings:
        yield "lm_head.weight", (shape.vocab_size, hidden)


def random_tensor(
    name: str, size: tuple[int, ...], dtype: torch.dtype, seed: int, *, less_one: bool = False
) -> torch.Tensor:
    """A tensor's values: a function of (seed, name, size) alone, so that sharding changes nothing.

    less_one: norm weights are kept less 1.

    The scales keep greedy output lively: what the layers add is large beside the embedding, or a tied head
    would repeat the last token for ever.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    noise = torch.randn(size, generator=generator)
    if name.endswith("norm.weight"):
        mean = 2.0 if "q_norm" in name or "k_norm" in name else 1.0
        if less_one:  # of Gemma, whose embeddings are scaled up, and what a layer adds is normed
            mean = (9.0 if ".post_" in name else mean) - 1.0
        noise.mul_(0.1).add_(mean)
    elif name.endswith(".bias"):
        noise.mul_(0.2)
    else:
        gain = 4.0 if "o_proj" in name or "down_proj" in name else 2.0
        noise.mul_(gain / math.sqrt(size[-1]))
    return noise.to(dtype)


def write_weights(out: Path, shape: Shape, seed: int, num_shards: int) -> None:
    """model.safetensors, or `num_shards` of them with their index; one shard in memory at a time."""
    entries = list(tensor_shapes(shape))
    if not 1 <= num_shards <= len(entries):
        raise ValueError(f"num_shards {num_shards} is not between 1 and the {len(entries)} tensors")
    dtype, less_one = DTYPES[shape.dtype], shape.family.sandwiches
    for stale in out.glob("model*.safetensors*"):
        stale.unlink()
    if num_shards == 1:
        return _save(out / "model.safetensors", entries, dtype, seed, less_one)
    weight_map = {}
    for number, shard in enumerate(_split(entries, num_shards), start=1):
        file_name = f"model-{number:05}-of-{num_shards:05}.safetensors"
        _save(out / file_name, shard, dtype, seed, less_one)
        weight_map |= {name: file_name for name, _ in shard}
    total_size = sum(math.prod(size) for _, size in entries) * dtype.itemsize
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    _write_json(out / "model.safetensors.index.json", index)


def _split(
    entries: list[tuple[str, tuple[int, ...]]], num_shards: int
) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    """Consecutive runs of tensors, each at least one, of roughly equal bytes."""
    begin = 0
    remaining = sum(math.prod(size) for _, size in entries)
    for shards_left in range(num_shards, 0, -1):
        last_end = len(entries) - (shards_left - 1)
        end, taken = begin, 0
        while end < last_end and (end == begin or shards_left == 1 or taken < remaining / shards_left):
            taken += math.prod(entries[end][1])
            end += 1
        yield entries[begin:end]
        begin, remaining = end, remaining - taken


def _save(
    path: Path, entries: Iterable[tuple[str, tuple[int, ...]]], dtype: torch.dtype, seed: int, less_one: bool
) -> None:
    tensors = {name: random_tensor(name, size, dtype, seed, less_one=less_one) for name, size in entries}
    save_file(tensors, str(path), metadata={"format": "pt"})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


SIZE_OPTIONS = (
    "hidden-size",
    "intermediate-size",
    "layers",
    "heads",
    "kv-heads",
    "head-dim",
    "vocab-size",
    "max-position-embeddings",
    "sliding-window",
)


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="directory to write the model in"
    )
    parser.add_argument(
        "--preset", choices=PRESETS, default="tiny", help="sizes to start from; options override"
    )
    parser.add_argument("--arch", choices=FAMILIES, default=None)
    for option in SIZE_OPTIONS:
        parser.add_argument(f"--{option}", type=int, default=None, metavar="N")
    parser.add_argument("--dtype", choices=DTYPES, default=None)
    parser.add_argument("--tie", action=argparse.BooleanOptionalAction, default=None, help="tied embeddings")
    parser.add_argument("--attention-bias", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--config-style", choices=("classic", "v5"), default="classic")
    parser.add_argument("--shards", type=int, default=1, metavar="N", help="number of safetensors files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="files to train the tokenizer on")
    return parser.parse_args()


def main() -> None:
    args = _parse_args()
    given = {
        "arch": args.arch,
        "hidden_size": args.hidden_size,
        "intermediate_size": args.intermediate_size,
        "num_layers": args.layers,
        "num_heads": args.heads,
        "num_kv_heads": args.kv_heads,
        "head_dim": args.head_dim,
        "vocab_size": args.vocab_size,
        "max_position_embeddings": args.max_position_embeddings,
        "tie_word_embeddings": args.tie,
        "dtype": args.dtype,
        "sliding_window": args.sliding_window,
        "attention_bias": args.attention_bias,
    }
    options = PRESETS[args.preset] | {key: value for key, value in given.items() if value is not None}
    text = "".join(path.read_text(encoding="utf-8") for path in args.text) or DEFAULT_TEXT
    out = make_model(
        args.out, **options, seed=args.seed, num_shards=args.shards, config_style=args.config_style, text=text
    )
    print(f"{out}: {sum(file.stat().st_size for file in out.iterdir()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
