"""What is written of a stream, byte by byte."""

from __future__ import annotations

import json

import msgspec
import pytest

from minivllm.entrypoints.openai.completion.protocol import Completion, CompletionChoice
from minivllm.entrypoints.openai.sse import TextEvent


def chunk(text: str) -> Completion:
    return Completion(id="cmpl-1", created=7, model='a "model"', choices=[CompletionChoice(index=3, text=text)])


@pytest.mark.parametrize(
    "text", ["", " word", 'quo"te\\ and \n\t\x00\x1f', "é日本🙂", "\ue000text\ue000", '","text":"']
)
def test_a_text_event_is_the_whole_chunks(text: str):
    event = TextEvent(chunk)(text)
    assert event == b"data: %b\n\n" % msgspec.json.encode(chunk(text))
    assert json.loads(event.removeprefix(b"data: "))["choices"][0]["text"] == text


def test_a_chunk_without_the_text_cannot_make_a_text_event():
    with pytest.raises(AssertionError, match="the text is not in its chunk"):
        TextEvent(lambda text: chunk(""))
