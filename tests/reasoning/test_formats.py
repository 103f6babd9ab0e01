"""Every parser of reasoning: whole, cut anywhere, broken off; in text and in token ids."""

from __future__ import annotations

import pytest

from minivllm.reasoning.abstract import ReasoningParser
from minivllm.reasoning.registry import REASONING_PARSERS
from tests.tool_parsers.splits import cuts

# name -> the text of an answer that thinks "Let me <b> see.\n\nYes" and says "Four.\nYes."
THOUGHT, SAID = "Let me <b> see.\n\nYes", "Four.\n</b> Yes. "
ANSWERS = {
    "deepseek_r1": f"{THOUGHT}\n</think>\n\n{SAID}",
    "glm45": f"\n<think>{THOUGHT}</think>\n{SAID}",
    "granite": f"Here is my thought process: {THOUGHT}\nHere is my response: {SAID}",
    "mistral": f"[THINK]{THOUGHT}[/THINK]{SAID}",
    "openai_gptoss": f"<|channel|>analysis<|message|>{THOUGHT}<|end|>"
    f"<|start|>assistant<|channel|>final<|message|>{SAID}",
    "qwen3": f"<think>\n{THOUGHT}\n</think>\n\n{SAID}",
}
NAMES = sorted(ANSWERS)


def parse(parser: ReasoningParser, parts: list[str]) -> tuple[str, str]:
    found = [part for text in parts for part in parser.feed(text)] + parser.finish()
    assert all(part.text for part in found)
    return "".join(p.text for p in found if p.is_reasoning), "".join(
        p.text for p in found if not p.is_reasoning
    )


def every_way(name: str, text: str, **options: bool) -> tuple[str, str]:
    cls = REASONING_PARSERS.get(name)
    whole = parse(cls(**options), [text])
    for parts in cuts(text):
        assert parse(cls(**options), parts) == whole, parts
    return whole


def test_every_parser_is_tested_here():
    assert set(NAMES) == set(REASONING_PARSERS.names)


@pytest.mark.parametrize("name", NAMES)
def test_reasoning_and_answer_are_parted_the_same_however_the_text_is_cut(name: str):
    reasoning, answer = every_way(name, ANSWERS[name])
    assert (reasoning, answer.rstrip()) == (THOUGHT, SAID.rstrip())


@pytest.mark.parametrize("name", NAMES)
def test_reasoning_that_is_cut_has_no_answer(name: str):
    length = ANSWERS[name].index("see.") + 4
    assert every_way(name, ANSWERS[name][:length]) == ("Let me <b> see.", "")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("deepseek_r1", "openai_gptoss")])
def test_an_answer_without_reasoning_is_untouched(name: str):
    text = "\n Four. <thin \n"
    assert every_way(name, text) == ("", text)


def test_what_the_prompt_opened_is_reasoning_without_a_mark():
    assert every_way("qwen3", "Hm.\n</think>\n4", begins_open=True) == ("Hm.", "4")
    assert every_way("deepseek_r1", "<think>Hm.</think>4") == ("Hm.", "4")


def test_what_the_prompt_closed_is_answer():
    assert every_way("deepseek_r1", "4", begins_open=False) == ("", "4")


def test_mistral_thinks_again():
    assert every_way("mistral", "[THINK]a[/THINK] 1 [THINK]b[/THINK]2") == ("ab", "1 2")


def test_the_prompts_end_says_whether_an_answer_begins_with_reasoning():
    qwen, deepseek = REASONING_PARSERS.get("qwen3"), REASONING_PARSERS.get("deepseek_r1")
    turn = "<think>old</think>4<|im_end|><|im_start|>assistant\n"
    assert not qwen.open_after(turn) and deepseek.open_after(turn)
    for cls in (qwen, deepseek):
        assert cls.open_after(turn + "<think>\n")
        assert not cls.open_after(turn + "<think>\n\n</think>\n\n")
        assert cls.open_after(turn, "<think>\nso far")
        assert not cls.open_after(turn, "<think>\nso far</think> 4")
    assert deepseek.open_after(turn, "so far") and not qwen.open_after(turn, "so far")


def test_token_ids_say_the_same_as_text():
    marks = REASONING_PARSERS.get("qwen3").marks(lambda text: list(text.encode()))
    ids = lambda text: list(text.encode())  # noqa: E731
    assert marks.is_open_after(ids("assistant\n<think>\n"))
    assert not marks.is_open_after(ids("assistant\n<think></think>\n\n"))
    assert not marks.is_open_after(ids("<think>a</think>b<|im_start|>assistant\n"))


def encode(text: str) -> list[int]:
    return list(text.encode())


@pytest.mark.parametrize("name", NAMES)
def test_the_tokens_of_reasoning_are_counted_without_the_marks(name: str):
    """A token is a byte here."""
    cls = REASONING_PARSERS.get(name)
    text = ANSWERS[name]
    counter = cls.counter(encode, is_open=cls.open_after("<user>2 + 2?"))
    counter.follow(encode(text))
    marked = cls.start_text and cls.start_text in text
    start = text.index(cls.start_text) + len(cls.start_text) if marked else text.index(THOUGHT)
    end = text.index("<|end|>" if name == "openai_gptoss" else cls.end_text)
    assert counter.num_tokens == end - start


def test_a_mark_within_an_answer_opens_no_reasoning_unless_the_format_has_it_anywhere():
    text = "A thought stands between <think> and </think>."
    for name, count in {"qwen3": 0, "mistral": 5}.items():
        cls = REASONING_PARSERS.get(name)
        counter = cls.counter(encode, is_open=False)
        counter.follow(encode(text.replace("<think>", cls.start_text).replace("</think>", cls.end_text)))
        assert counter.num_tokens == count


def test_a_prompt_that_opens_reasoning_has_it_counted_from_the_first_token():
    cls = REASONING_PARSERS.get("qwen3")
    counter = cls.counter(encode, is_open=cls.open_after("<user>2 + 2?<assistant><think>\n"))
    flags = counter.follow(encode("hm</think>Four"))
    assert (counter.num_tokens, flags.count(True)) == (2, len("hm</think>"))
