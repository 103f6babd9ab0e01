"""What is written of a stream, byte by byte."""

from __future__ import annotations

import asyncio
import json

import msgspec
import pytest

from minivllm.entrypoints.openai.completion.protocol import Completion, CompletionChoice
from minivllm.entrypoints.openai.sse import EventWriter, TextEvent


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


def writes_of(*finishes: tuple[int, str | None], fails: bool = False) -> list[bytes]:
    """What is sent of two choices: a chunk for each (choice, finish_reason), then the usage and the end."""
    sent: list[bytes] = []

    async def send(message: dict) -> None:
        sent.append(message["body"])

    async def main() -> None:
        writer = EventWriter(send, 2)
        for index, reason in finishes:
            choice = CompletionChoice(index=index, text="x", finish_reason=reason)
            await writer.chunk(Completion(id="cmpl-1", created=7, model="m", choices=[choice]))
        await writer.chunk(Completion(id="cmpl-1", created=7, model="m", choices=[]))
        await (writer.fail(ValueError()) if fails else writer.finish())

    asyncio.run(main())
    return sent


@pytest.mark.parametrize("fails", [False, True])
def test_the_last_finish_and_all_behind_it_are_one_write(fails: bool):
    *before, last = writes_of((0, None), (1, None), (0, "stop"), (1, "length"), fails=fails)
    assert [write.count(b"data: ") for write in before] == [1, 1, 1]
    assert last.count(b"data: ") == (4 if fails else 3)
    assert b'"finish_reason":"length"' in last and last.endswith(b"data: [DONE]\n\n")


def test_a_finish_that_is_not_the_last_is_written_at_once():
    writes = writes_of((0, "stop"), (1, None), (1, "stop"))
    assert [write.count(b"data: ") for write in writes] == [1, 1, 3]
    assert b'"finish_reason":"stop"' in writes[0]
