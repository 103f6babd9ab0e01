"""Every parser of tool calls: what models write, whole, cut anywhere, broken off and broken."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest

from minivllm.tool_parsers.pieces import Answer
from minivllm.tool_parsers.registry import TOOL_PARSERS
from tests.tool_parsers.splits import parse_every_way

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "deep": {"type": "object"},
                    "ok": {"type": ["boolean", "null"]},
                },
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
# Nested braces, quotes, escapes, characters of several bytes, marks of formats inside a string.
HARD = {"city": 'São "Paulo" {[\\ <b> 你好', "deep": {"a": [1, -2.5e3, {"b": None}], "c": "}]"}, "ok": True}
EASY = {"city": "Paris", "days": 3}


def dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def call_json(name: str, arguments: dict, key: str = "arguments") -> str:
    return dumps({"name": name, key: arguments})


def python_call(name: str, arguments: dict) -> str:
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"


def coder_call(name: str, arguments: dict) -> str:
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in arguments.items()}
    inner = "".join(f"<parameter={key}>\n{text}\n</parameter>\n" for key, text in texts.items())
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


def glm_call(name: str, arguments: dict) -> str:
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in arguments.items()}
    inner = "".join(
        f"<arg_key>{key}</arg_key>\n<arg_value>{text}</arg_value>\n" for key, text in texts.items()
    )
    return f"<tool_call>{name}\n{inner}</tool_call>"


def deepseek_calls(*calls: tuple[str, dict]) -> str:
    inner = "\n".join(
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{dumps(arguments)}\n```<｜tool▁call▁end｜>"
        for name, arguments in calls
    )
    return f"<｜tool▁calls▁begin｜>{inner}<｜tool▁calls▁end｜>"


def deepseek31_calls(*calls: tuple[str, dict]) -> str:
    inner = "".join(
        f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{dumps(arguments)}<｜tool▁call▁end｜>"
        for name, arguments in calls
    )
    return f"<｜tool▁calls▁begin｜>{inner}<｜tool▁calls▁end｜>"


def kimi_calls(*calls: tuple[str, dict]) -> str:
    inner = "".join(
        f"<|tool_call_begin|>functions.{name}:{i}<|tool_call_argument_begin|>{dumps(arguments)}<|tool_call_end|>"
        for i, (name, arguments) in enumerate(calls)
    )
    return f"<|tool_calls_section_begin|>{inner}<|tool_calls_section_end|>"


def harmony_calls(*calls: tuple[str, dict]) -> str:
    return "<|start|>assistant".join(
        f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{dumps(arguments)}<|call|>"
        for name, arguments in calls
    )


@dataclass
class Format:
    """How a model writes calls, with text before and after where the format has a place for it."""

    parser: str
    write: object
    before: str = ""
    after: str = ""
    malformed: list[str] = field(default_factory=list)


def tagged(*calls: tuple[str, dict]) -> str:
    return "\n".join(f"<tool_call>\n{call_json(*call)}\n</tool_call>" for call in calls)


def listed(begin: str):
    return lambda *calls: f"{begin}[{', '.join(call_json(*call) for call in calls)}]"


BAD_JSON = [
    "{",
    "{}",
    '{"name": 5, "arguments": {}}',
    '{"name": "f", "arguments": 7}',
    "not JSON",
    '{"nam',
    "[]",
    '{"name": "f" "x"}',
]
FORMATS = {
    "hermes": Format(
        "hermes", tagged, "Let me see.", "Done.", [f"<tool_call>\n{bad}\n</tool_call>" for bad in BAD_JSON]
    ),
    "llama3_json": Format(
        "llama3_json",
        lambda *calls: "; ".join(call_json(*call, "parameters") for call in calls),
        malformed=[*BAD_JSON, '{"name": "Anna", "age": 7}', "I think { is a brace"],
    ),
    "llama3_json_tagged": Format(
        "llama3_json",
        lambda *calls: "<|python_tag|>" + ";".join(call_json(*call, "parameters") for call in calls),
        "Let me see.",
        malformed=["<|python_tag|>print(1)"],
    ),
    "llama4_pythonic": Format(
        "llama4_pythonic",
        lambda *calls: f"<|python_start|>[{', '.join(python_call(*call) for call in calls)}]<|python_end|>",
        "Let me see.",
        "Done.",
        ["<|python_start|>[f(1)]<|python_end|>", "<|python_start|>f", "[1, 2]"],
    ),
    "pythonic": Format(
        "pythonic",
        lambda *calls: f"[{', '.join(python_call(*call) for call in calls)}]",
        malformed=[
            "[1, 2, 3]",
            "[see f(x)]",
            "[f(a=)]",
            "[f(a=b)]",
            "[f(a=1",
            "[f(",
            "[f(a=(]",
            "[",
            "[f(a='\\ud800')]",
            "[f(a=1e999)]",
            "[f(a=0777)]",
        ],
    ),
    "mistral_list": Format(
        "mistral",
        listed("[TOOL_CALLS]"),
        "Let me see.",
        malformed=[f"[TOOL_CALLS][{bad}]" for bad in BAD_JSON],
    ),
    "mistral": Format(
        "mistral",
        lambda *calls: "".join(f"[TOOL_CALLS]{n}{dumps(a)}" for n, a in calls),
        "Let me see.",
        malformed=["[TOOL_CALLS] ", "[TOOL_CALLS]f[1]", "[TOOL"],
    ),
    "mistral_args": Format(
        "mistral",
        lambda *calls: "".join(f"[TOOL_CALLS]{n}[CALL_ID]abcdef123[ARGS]{dumps(a)}" for n, a in calls),
    ),
    "qwen3_coder": Format(
        "qwen3_coder",
        lambda *calls: "\n".join(coder_call(*call) for call in calls),
        "Let me see.",
        "Done.",
        ["<tool_call>\n{}\n</tool_call>", "<function=>", "<tool_call><function=f\n", "a <funct"],
    ),
    "glm45": Format(
        "glm45",
        lambda *calls: "\n".join(glm_call(*call) for call in calls),
        "Let me see.",
        "Done.",
        ["<tool_call>", "<tool_call> \n </tool_call>", "<tool_call>f"],
    ),
    "deepseek_v3": Format(
        "deepseek_v3",
        deepseek_calls,
        "Let me see.",
        "Done.",
        ["<｜tool▁calls▁begin｜>hello", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function" + "x" * 300],
    ),
    "deepseek_v31": Format("deepseek_v31", deepseek31_calls, "Let me see.", "Done."),
    "granite": Format(
        "granite", listed("<|tool_call|>"), "Let me see.", "Done.", [f"<tool_call>{bad}" for bad in BAD_JSON]
    ),
    "phi4_mini_json": Format(
        "phi4_mini_json",
        listed("functools"),
        "Let me see.",
        "Done.",
        [f"functools[{bad}" for bad in BAD_JSON],
    ),
    "kimi_k2": Format(
        "kimi_k2",
        kimi_calls,
        "Let me see.",
        "Done.",
        ["<|tool_calls_section_begin|>hello", "<|tool_calls_section_begin|><|tool_call_begin|>f"],
    ),
    "openai": Format("openai", harmony_calls, malformed=["Hello <|mess", "no harmony at all"]),
}
NAMES = sorted(FORMATS)


def every_way(name: str, text: str) -> Answer:
    parser = TOOL_PARSERS.get(FORMATS[name].parser)
    return parse_every_way(lambda: parser(TOOLS), text)


def calls_of(answer: Answer) -> list[tuple[str, dict]]:
    return [(call.name, call.parsed_arguments()) for call in answer.calls]


def test_every_parser_is_tested_here():
    aliases = {"llama4_json", "qwen3_xml"}
    assert {FORMATS[name].parser for name in NAMES} == set(TOOL_PARSERS.names) - aliases


@pytest.mark.parametrize("name", NAMES)
def test_one_call_is_read_the_same_however_the_text_is_cut(name: str):
    answer = every_way(name, FORMATS[name].write(("get_weather", HARD)))
    assert calls_of(answer) == [("get_weather", HARD)]
    assert answer.content == ""
    assert answer.calls[0].complete


@pytest.mark.parametrize("name", NAMES)
def test_several_calls_keep_their_order(name: str):
    calls = [("get_weather", EASY), ("now", {}), ("get_weather", {"city": "Rome"})]
    answer = every_way(name, FORMATS[name].write(*calls))
    assert calls_of(answer) == calls
    assert answer.content == ""


@pytest.mark.parametrize("name", [name for name in NAMES if FORMATS[name].before])
def test_text_before_a_call_is_content(name: str):
    text = FORMATS[name].before + "\n\n" + FORMATS[name].write(("get_weather", EASY))
    answer = every_way(name, text)
    assert (answer.content, calls_of(answer)) == (FORMATS[name].before, [("get_weather", EASY)])


@pytest.mark.parametrize("name", [name for name in NAMES if FORMATS[name].after])
def test_text_behind_a_call_is_content(name: str):
    answer = every_way(name, FORMATS[name].write(("now", {})) + "\n" + FORMATS[name].after)
    assert (answer.content.strip(), calls_of(answer)) == (FORMATS[name].after, [("now", {})])


@pytest.mark.parametrize("name", NAMES)
def test_text_without_calls_is_untouched(name: str):
    text = "  A {list} [of] <things> f(x)\n\n at < last \n"
    assert every_way(name, text) == Answer(content=text)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_call_stays_content(name: str):
    for text in FORMATS[name].malformed:
        answer = every_way(name, text)
        if answer.calls:  # it had begun, and is marked
            assert not answer.calls[-1].complete, text
        else:
            assert answer.content == text


@pytest.mark.parametrize("name", NAMES)
def test_a_cut_call_is_marked_and_those_before_it_are_kept(name: str):
    """At every length: calls before are whole, the last is marked, and its arguments are the beginning of its own."""
    calls = [("get_weather", EASY), ("get_weather", HARD)]
    text = FORMATS[name].write(*calls)
    parser = TOOL_PARSERS.get(FORMATS[name].parser)
    wanted = parser(TOOLS).parse(text).calls
    seen_incomplete = False
    for length in range(len(text)):
        answer = parser(TOOLS).parse(text[:length])
        for got, want in zip(answer.calls, wanted):
            assert (got.name, got.complete) == (want.name, got.arguments == want.arguments)
            assert want.arguments.startswith(got.arguments)
            seen_incomplete |= not got.complete
        assert len(answer.calls) < 2 or not answer.calls[1].complete or answer.content == ""
        assert all(call.complete for call in answer.calls[:-1])
    assert seen_incomplete


def test_a_model_that_forgets_the_outer_mark_is_understood():
    text = coder_call("get_weather", EASY).removeprefix("<tool_call>\n")
    assert calls_of(every_way("qwen3_coder", text)) == [("get_weather", EASY)]


def test_tagged_values_take_the_type_of_the_schema():
    values = {"city": "\n12\n", "days": "\n12\n", "ok": "null", "new": "1"}
    inner = "".join(f"<parameter={key}>{value}</parameter>" for key, value in values.items())
    text = f"<function=get_weather>{inner}</function>"
    answer = every_way("qwen3_coder", text)
    assert calls_of(answer) == [("get_weather", {"city": "12", "days": 12, "ok": None, "new": "1"})]


def test_arguments_may_stand_before_the_name_and_unknown_keys_are_passed_over():
    call = '{"id": 3, "arguments": {"city": "Rome"}, "x": [null], "name": "get_weather", "y": "z"}'
    text = f"<tool_call>{call}</tool_call>"
    assert calls_of(every_way("hermes", text)) == [("get_weather", {"city": "Rome"})]


def test_a_name_alone_calls_a_function_without_arguments():
    assert calls_of(every_way("hermes", '<tool_call>{"name": "now"}</tool_call>')) == [("now", {})]


def test_line_breaks_inside_strings_are_escaped():
    text = '<tool_call>{"name": "f", "arguments": {"a": "x\n\ty"}}</tool_call>'
    assert calls_of(every_way("hermes", text)) == [("f", {"a": "x\n\ty"})]


def test_what_goes_wrong_within_arguments_ends_the_call_marked():
    answer = every_way("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1,, "b": 2}}</tool_call>')
    assert [(call.arguments, call.complete) for call in answer.calls] == [('{"a": 1,', False)]
    assert answer.content == ', "b": 2}}</tool_call>'


def test_a_second_call_of_a_list_that_is_none_is_content():
    answer = every_way("granite", '<|tool_call|>[{"name": "now", "arguments": {}}, {"nonsense": 1}] end')
    assert calls_of(answer) == [("now", {})]
    assert answer.content == ', {"nonsense": 1}] end'


def test_numbers_that_are_none_are_malformed():
    for bad in ("01", "1.", "1e", "-", "1.2.3", "+1", "NaN", "tru"):
        answer = every_way("hermes", f'<tool_call>{{"name": "f", "arguments": {{"a": {bad}}}}}</tool_call>')
        assert not answer.calls[0].complete, bad


def test_braces_a_thousand_deep_crash_nothing():
    text = '<tool_call>{"name": "f", "arguments": ' + '{"a": ' * 1000
    parser = TOOL_PARSERS.get("hermes")()
    assert not parser.parse(text).calls[0].complete
    assert TOOL_PARSERS.get("pythonic")().parse("[f(a=" + "[" * 3000 + "]" * 3000 + ")]").calls == []


def test_kimis_own_ids_are_kept_and_mistrals_have_nine_characters():
    assert [c.id for c in every_way("kimi_k2", kimi_calls(("now", {}), ("now", {}))).calls] == [
        "functions.now:0",
        "functions.now:1",
    ]
    assert [c.id for c in every_way("mistral_args", FORMATS["mistral_args"].write(("now", {}))).calls] == [
        "abcdef123"
    ]
    made = TOOL_PARSERS.get("mistral")().make_id()
    assert len(made) == 9 and made.isalnum()


def test_harmony_parts_reasoning_calls_and_the_final_answer():
    text = (
        "<|channel|>analysis<|message|>I must look.<|end|><|start|>assistant"
        + harmony_calls(("get_weather", EASY))
        + "<|start|>assistant<|channel|>final<|message|>It rains."
    )
    answer = every_way("openai", text)
    assert (answer.reasoning, answer.content, calls_of(answer)) == (
        "I must look.",
        "It rains.",
        [("get_weather", EASY)],
    )
