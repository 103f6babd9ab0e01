"""Small tokenizers of each kind, made on the spot."""

from __future__ import annotations

from functools import cache

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as RustTokenizer
from transformers import PreTrainedTokenizerFast

from minivllm.tokenizer.tokenizer import Tokenizer

TEXT = [
    "the quick brown fox jumps over the lazy dog",
    "stop here. and there!",
    "größer, 你好世界, 日本語, 👩‍👩‍👧 and 🙂 smile",
]
SPECIAL = AddedToken("<|end|>", special=True)


def _wrap(rust: RustTokenizer) -> Tokenizer:
    rust.add_special_tokens([SPECIAL])
    rust.add_tokens([AddedToken("<tool call>", special=False)])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=rust, eos_token="<|end|>"))


@cache
def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen: every token is a string of bytes."""
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    rust.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    return _wrap(rust)


@cache
def sentencepiece() -> Tokenizer:
    """As Llama 2 and Mistral: visible spaces, byte tokens for what has no piece."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz.,!"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "a"), ("n", "d"), ("▁a", "nd")]
    pieces += ["".join(pair) for pair in merges]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    rust = RustTokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    rust.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _wrap(rust)


@cache
def word_pieces() -> Tokenizer:
    """As BERT: of no kind we know the bytes of."""
    pieces = ["[UNK]", "the", "fox", "##es", "##y", "jump", "##s", "dog", "lazy", ".", "größer"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    rust = RustTokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    rust.pre_tokenizer = pre_tokenizers.Whitespace()
    rust.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return _wrap(rust)
