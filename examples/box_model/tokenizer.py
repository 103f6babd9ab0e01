"""The tokenizer: byte-level BPE with single digits, trained on the generator's own text.

Owns tokenizer.json and tokenizer_config.json. Any bytes can be encoded, though what is rare costs a token a byte.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from examples.box_model import chat
from examples.box_model.data import documents, text_of

# Words with their leading space, single digits, runs of signs, line ends.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(vocab_size: int, num_documents: int, seed: int) -> Tokenizer:
    """A tokenizer of exactly `vocab_size` ids; special tokens first, markers last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(chat.MARKERS),
        special_tokens=chat.SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(map(_without_marks, islice(documents(seed), num_documents)), trainer)
    tokenizer.add_tokens([AddedToken(marker, normalized=False) for marker in chat.MARKERS])
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"the text gives {tokenizer.get_vocab_size()} ids, not {vocab_size}; train on more documents"
        )
    return tokenizer


def _without_marks(document: list[tuple[str, bool]]) -> str:
    text = text_of(document)
    for mark in (*chat.SPECIAL_TOKENS, *chat.MARKERS):
        text = text.replace(mark, "\n")
    return text


def save_tokenizer(tokenizer: Tokenizer, directory: Path, max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": chat.TURN_END,
        "pad_token": chat.PAD,
        "additional_special_tokens": [chat.END_OF_TEXT, chat.TURN_START],
        "chat_template": chat.CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
