"""Text to token ids and back, the same in every front end, without torch.

Owns the wrapper over transformers' fast tokenizer: encoding, chat templates, and what bytes each token
stands for. Knows nothing of requests or streaming (see engine/detokenizer.py).

All methods may be called from several threads at once: the Rust tokenizer is never reconfigured.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from minivllm.exceptions import ModelFilesError, RequestError

# Its thread pool would fight the event loop for cores.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

MAX_RENDERED_CHARS = 1 << 24  # of a conversation, where no context says less
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"  # SentencePiece's visible space

Kind = Literal["byte_level", "sentencepiece", "other"]


class Tokenizer:
    """A tokenizer whose text is, where its kind allows, the UTF-8 reading of its tokens' bytes.

    `kind` says how tokens become text: `byte_level` (GPT-2's alphabet of bytes), `sentencepiece` (visible
    spaces, byte tokens `<0xAB>`, one leading space stripped), `other` (whatever the library decodes).
    """

    def __init__(self, hf: Any) -> None:
        self.hf = hf
        self._rust = getattr(hf, "backend_tokenizer", None)
        if self._rust is not None:
            self._rust.no_truncation()
            self._rust.no_padding()
        self.kind: Kind = _kind_of(self._rust)
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        mode: str = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> Tokenizer:
        """Load from a directory (or hub id).

        mode "auto" reads tokenizer.json if the directory has one; "hf" lets transformers choose the class.

        Raises:
            ModelFilesError: no tokenizer can be made of what is there.
        """
        try:
            if mode == "auto" and (Path(path) / "tokenizer.json").is_file():
                from transformers import PreTrainedTokenizerFast

                return cls(PreTrainedTokenizerFast.from_pretrained(str(path)))
            from transformers import AutoTokenizer

            return cls(
                AutoTokenizer.from_pretrained(
                    str(path), revision=revision, trust_remote_code=trust_remote_code
                )
            )
        except Exception as error:  # the libraries raise anything, bare Exception included
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise ModelFilesError(
                f"cannot load a tokenizer from {path}: {reason}; pass --tokenizer, or --skip-tokenizer-init"
            ) from error

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        if self._rust is not None:
            return self._rust.encode(text, add_special_tokens=add_special_tokens).ids
        return self.hf.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD."""
        if self.kind == "other":
            return self._decode_by_library(ids, skip_special_tokens)
        data = b"".join(map(self.token_bytes, self.visible(ids) if skip_special_tokens else ids))
        if self.strips_leading_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", errors="replace")

    def _decode_by_library(self, ids: list[int], skip_special_tokens: bool) -> str:
        if self._rust is not None:
            return self._rust.decode(ids, skip_special_tokens=skip_special_tokens)
        return self.hf.decode(
            ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )

    def visible(self, ids: list[int]) -> list[int]:
        """The ids that are not special tokens."""
        hidden = self.special_ids
        return [token for token in ids if token not in hidden]

    def render_chat_template(
        self,
        messages: list[dict],
        /,
        *,
        chat_template: str | None = None,
        trusted: bool = True,
        max_chars: int = MAX_RENDERED_CHARS,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict] | None = None,
        documents: list[dict] | None = None,
        **variables: Any,
    ) -> str:
        """The conversation as text. The template writes the special tokens: when it is tokenized, none are added.

        trusted: whether the template is the model's or the operator's; others are rendered in a process of their own.

        Raises:
            RequestError: there is no template, or it refuses these messages.
        """
        template = chat_template or self.template_for(tools)
        if template is None:
            raise RequestError(
                "this model's tokenizer has no chat template; give one with --chat-template, or use completions",
                param="messages",
            )
        options = {
            **self._special_tokens,
            **variables,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "tools": tools,
            "documents": documents,
        }
        if trusted and self._renders_itself:
            return self._render_by_library(messages, chat_template, options)
        from minivllm.tokenizer.chat_template import TemplateRefusal, render
        from minivllm.tokenizer.template_process import render_apart

        try:
            return (render if trusted else render_apart)(template, messages, max_chars=max_chars, **options)
        except TemplateRefusal as error:
            raise RequestError(
                f"the chat template refuses these messages: {error}", param="messages" if trusted else "chat_template"
            ) from error

    @cached_property
    def _renders_itself(self) -> bool:
        """Whether this tokenizer has code of its own for it, in place of a template's."""
        return not type(self.hf).apply_chat_template.__module__.startswith("transformers.tokenization_utils")

    def _render_by_library(self, messages: list[dict], template: str | None, options: dict[str, Any]) -> str:
        try:
            return self.hf.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
        except Exception as error:  # whatever its code raises
            raise RequestError(
                f"the chat template refuses these messages: {error}", param="messages"
            ) from error

    @cached_property
    def _special_tokens(self) -> dict[str, Any]:
        """bos_token, eos_token, … as templates name them."""
        return {name: value for name, value in self.hf.special_tokens_map.items() if isinstance(value, str)}

    def template_for(self, tools: list[dict] | None = None) -> str | None:
        """The model's own template; some have another for conversations with tools."""
        templates = getattr(self.hf, "chat_template", None)
        if isinstance(templates, dict):
            return (tools and templates.get("tool_use")) or templates.get("default")
        return templates

    @property
    def chat_template(self) -> str | None:
        return self.template_for()

    @property
    def eos_token_id(self) -> int | None:
        return self.hf.eos_token_id

    @property
    def bos_token_id(self) -> int | None:
        return self.hf.bos_token_id

    @cached_property
    def vocab_size(self) -> int:
        """Tokens it can encode to, added ones included."""
        return len(self.hf)

    @property
    def all_special_ids(self) -> list[int]:
        return sorted(self.special_ids)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """What `skip_special_tokens` hides."""
        if self._rust is None:
            return frozenset(self.hf.all_special_ids)
        return frozenset(id for id, token in self._rust.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def added_ids(self) -> frozenset[int]:
        """Special tokens and others that were added to the vocabulary whole."""
        if self._rust is None:
            return frozenset(self.hf.get_added_vocab().values())
        return frozenset(self._rust.get_added_tokens_decoder())

    @cached_property
    def strips_leading_space(self) -> bool:
        """Whether a text that starts with a space loses it: SentencePiece put it there when it encoded."""
        return self.kind == "sentencepiece" and _strips_leading_space(self._rust)

    def id_to_token(self, token_id: int) -> str:
        """The token as the vocabulary spells it; "" for an id beyond it."""
        if self._rust is not None:
            return self._rust.id_to_token(token_id) or ""
        return self.hf.convert_ids_to_tokens(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text: bytes, perhaps of a part of a character; b"" beyond the vocabulary."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._make_bytes(token_id)
        return found

    def _make_bytes(self, token_id: int) -> bytes:
        if self.kind == "byte_level":
            return _byte_level(self.id_to_token(token_id))
        if self.kind == "sentencepiece":
            piece = self.id_to_token(token_id)
            byte = _BYTE_TOKEN.fullmatch(piece)
            return bytes([int(byte[1], 16)]) if byte else piece.replace(_SPACE, " ").encode()
        return self._decode_by_library([token_id], False).encode()

    @cached_property
    def whole_texts(self) -> WholeTexts:
        return WholeTexts(self)

    def token_text(self, token_id: int) -> str:
        """The token alone as text; bytes of a divided character become U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")


class WholeTexts(dict):
    """By token id: the text that a token adds wherever it follows a whole character; None where it has no such text.

    Those are tokens whose bytes are not whole characters, and special ones, which may be hidden. Made as they are met.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, token_id: int) -> str | None:
        text = None
        if token_id not in self._tokenizer.special_ids:
            with contextlib.suppress(UnicodeDecodeError):
                text = self._tokenizer.token_bytes(token_id).decode()
        self[token_id] = text
        return text


def _decoders(rust: Any) -> list[dict]:
    """The steps of a Rust tokenizer's decoder, as its JSON describes them."""
    if rust is None or rust.decoder is None:
        return []
    state = json.loads(rust.decoder.__getstate__())
    return state["decoders"] if state["type"] == "Sequence" else [state]


def _kind_of(rust: Any) -> Kind:
    types = [step["type"] for step in _decoders(rust)]
    if types == ["ByteLevel"]:
        return "byte_level"
    # Llama 2, Mistral, Gemma: Replace visible spaces, ByteFallback, Fuse, perhaps Strip; or Metaspace, which is
    # all of it but the bytes.
    if types in (["Replace", "ByteFallback", "Fuse"], ["Replace", "ByteFallback", "Fuse", "Strip"]):
        return "sentencepiece"
    if types in (["Metaspace"], ["ByteFallback", "Metaspace"], ["ByteFallback", "Fuse", "Metaspace"]):
        return "sentencepiece"
    return "other"


def _strips_leading_space(rust: Any) -> bool:
    last = _decoders(rust)[-1]
    if last["type"] == "Strip":
        return last.get("content") == " " and last.get("start", 0) >= 1
    return last["type"] == "Metaspace" and last.get("prepend_scheme", "always") != "never"


def _make_byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes (Radford et al. 2019, `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return alphabet


_BYTE_ALPHABET = _make_byte_alphabet()


def _byte_level(token: str) -> bytes:
    """A byte-level token's bytes. One with a character outside the alphabet (an added token) is its own UTF-8."""
    try:
        return bytes([_BYTE_ALPHABET[char] for char in token])
    except KeyError:
        return token.encode()
