"""Tools and reasoning in /v1/chat/completions, on answers that the engine makes up."""

from __future__ import annotations

import json
from typing import Any

import llguidance
import pytest

from minivllm.entrypoints.answer_format import AnswerFormat
from minivllm.entrypoints.tool_use import JSON_LIST, read_tool_use
from minivllm.exceptions import ConfigError
from minivllm.sampling_params import StructuredOutputsParams
from minivllm.structured_output.grammar import to_grammar
from minivllm.tool_parsers.abstract import TaggedFormat
from minivllm.tool_parsers.pieces import Answer
from minivllm.tool_parsers.registry import TOOL_PARSERS
from tests.entrypoints.openai.conftest import Api
from tests.entrypoints.openai.fakes import ByteTokenizer, FakeEngine

CHAT = "/v1/chat/completions"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now"}},
]
ROME = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Róme"}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


def api_with(answer: str, **args: Any) -> Api:
    engine = FakeEngine()
    engine.answer = answer
    args = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes", **args}
    return Api(engine, **args)


def with_reasoning(answer: str, parser: str = "qwen3", **args: Any) -> Api:
    from minivllm.config.reasoning import ReasoningConfig

    engine = FakeEngine()
    engine.answer = answer
    engine.config = engine.config.__class__(
        **{**vars(engine.config), "reasoning": ReasoningConfig(reasoning_parser=parser)}
    )
    return Api(engine, **{"enable_auto_tool_choice": True, "tool_call_parser": "hermes", **args})


def joined(chunks: list[dict]) -> dict:
    """The message that a client joins of the deltas, as the openai library does it."""
    message: dict[str, Any] = {"content": "", "reasoning": "", "tool_calls": []}
    for chunk in chunks:
        for choice in chunk["choices"]:
            delta = choice["delta"]
            message["content"] += delta.get("content") or ""
            message["reasoning"] += delta.get("reasoning") or ""
            for call in delta.get("tool_calls", ()):
                if call["index"] == len(message["tool_calls"]):
                    assert call["id"] and call["type"] == "function"
                    message["tool_calls"].append({"name": call["function"]["name"], "arguments": ""})
                seen = message["tool_calls"][call["index"]]
                seen["arguments"] += call.get("function", {}).get("arguments", "")
                seen["incomplete"] = call.get("incomplete", False)
            message["finish_reason"] = choice["finish_reason"]
    return message


def test_calls_are_parsed_and_end_with_their_own_reason():
    body = api_with(f"Let me look.\n{ROME}\n{NOW}").chat(tools=TOOLS)
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me look."
    first, second = choice["message"]["tool_calls"]
    assert first["function"] == {"name": "get_weather", "arguments": '{"city": "Róme"}'}
    assert (second["type"], second["function"]) == ("function", {"name": "now", "arguments": "{}"})
    assert first["id"] != second["id"] and first["id"].startswith("chatcmpl-tool-")
    assert "incomplete" not in first


def test_a_tool_stands_in_the_prompt_in_one_order_whatever_the_client_and_the_route():
    """Node's client sends the parameters first, and clients of responses always say `strict`."""
    shown = []

    class Seeing(ByteTokenizer):
        def render_chat_template(self, messages: list[dict], **kwargs: Any) -> str:
            shown.append(json.dumps(kwargs["tools"]))
            return super().render_chat_template(messages, **kwargs)

    api = Api(FakeEngine(tokenizer=Seeing()), enable_auto_tool_choice=True, tool_call_parser="hermes")
    parts = {"parameters": PARAMETERS, "description": "d", "name": "f"}
    api.chat(tools=[{"function": parts, "type": "function"}])
    assert shown == [json.dumps([{"type": "function", "function": dict(reversed(parts.items()))}])]
    api.chat(tools=[{"type": "function", "function": dict(reversed(parts.items()))}])
    api.post("/v1/responses", {"input": "q", "tools": [{**parts, "type": "function", "strict": False}]})
    tool = {"input_schema": PARAMETERS, "description": "d", "name": "f"}
    ask = {"model": "fake", "max_tokens": 9, "messages": [{"role": "user", "content": "q"}]}
    assert api.post("/v1/messages", {**ask, "tools": [tool]}).status_code == 200
    assert len(shown) == 4 and len(set(shown)) == 1
    api.chat(tools=[{"type": "function", "function": {**parts, "strict": True}}])
    assert '"strict": true' in shown[-1]


def test_a_message_of_calls_alone_has_no_content():
    message = api_with(ROME).chat(tools=TOOLS)["choices"][0]["message"]
    assert message["content"] is None


@pytest.mark.parametrize("interval", [1, 3, 1000])
@pytest.mark.parametrize("answer", [f"Let me look.\n{ROME}\n{NOW}", ROME, "No calls <tool", ROME[:-20]])
def test_a_stream_joins_to_the_whole(answer: str, interval: int):
    api = api_with(answer)
    chunks = api.stream(CHAT, tools=TOOLS, stream_interval=interval)
    whole = api.chat(tools=TOOLS)["choices"][0]
    calls = [
        {**call["function"], "incomplete": call.get("incomplete", False)}
        for call in whole["message"].get("tool_calls", ())
    ]
    assert joined(chunks) == {
        "content": whole["message"]["content"] or "",
        "reasoning": "",
        "tool_calls": calls,
        "finish_reason": whole["finish_reason"],
    }


def test_a_call_that_the_length_cuts_is_marked_and_the_one_before_is_kept():
    api = api_with(f"{NOW}\n{ROME}")
    max_tokens = len(NOW.encode()) + 60
    (choice,) = api.chat(tools=TOOLS, max_tokens=max_tokens)["choices"]
    kept, cut = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "length"
    assert kept["function"]["arguments"] == "{}" and "incomplete" not in kept
    assert cut["incomplete"] is True
    assert '{"city": "Róme"}'.startswith(cut["function"]["arguments"])
    chunks = api.stream(CHAT, tools=TOOLS, max_tokens=max_tokens)
    assert joined(chunks)["tool_calls"][1]["incomplete"] is True


def test_one_call_at_most_without_parallel_calls():
    api = api_with(f"{ROME}\n{NOW}")
    (call,) = api.chat(tools=TOOLS, parallel_tool_calls=False)["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert len(joined(api.stream(CHAT, tools=TOOLS, parallel_tool_calls=False))["tool_calls"]) == 1


def test_n_answers_are_parsed_apart():
    choices = api_with(ROME).chat(tools=TOOLS, n=2)["choices"]
    ids = {choice["message"]["tool_calls"][0]["id"] for choice in choices}
    assert len(ids) == 2


def test_calls_that_may_not_be_made_are_text():
    choice = api_with(ROME).chat(tools=TOOLS, tool_choice="none")["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (ROME, "stop")


def test_tools_are_in_the_prompt_unless_the_server_hides_those_that_may_not_be_called():
    for hides, prompt in ((False, b"<tools>2"), (True, b"<user>")):
        api = api_with("no", exclude_tools_when_tool_choice_none=hides)
        api.chat(tools=TOOLS, tool_choice="none")
        assert bytes(api.engine.calls[-1].prompt["prompt_token_ids"]).startswith(prompt)


def test_special_tokens_are_shown_to_the_parser_alone():
    api = api_with(ROME)
    api.chat(tools=TOOLS)
    assert api.engine.calls[-1].params.skip_special_tokens is False
    api.chat()
    assert api.engine.calls[-1].params.skip_special_tokens is True


def test_tokenize_counts_the_tools_too(api: Api):
    ask = {"messages": [{"role": "user", "content": "Hi"}]}
    bare = api.post("/tokenize", ask).json()
    assert api.post("/tokenize", {**ask, "tools": TOOLS}).json()["count"] == bare["count"] + len("<tools>2\n")
    refused = api.post("/tokenize", {**ask, "tools": [{}]})
    assert refused.json()["error"]["param"] == "tools[0].function"


def test_a_server_that_does_not_know_how_its_model_calls_says_so(api: Api):
    response = api.post(CHAT, {"messages": [{"role": "user", "content": "Hi"}], "tools": TOOLS})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tool_choice")
    assert "--enable-auto-tool-choice" in response.json()["error"]["message"]


def tool(**function: Any) -> list[dict]:
    return [TOOLS[1], {"type": "function", "function": {"name": "f", **function}}]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": []}, "tools"),
        ({"tools": ["f"]}, "tools[0]"),
        ({"tools": [{"type": "code", "function": {"name": "f"}}]}, "tools[0]"),
        ({"tools": tool(name="")}, "tools[1].function.name"),
        ({"tools": tool(name=None)}, "tools[1].function.name"),
        ({"tools": tool(description=7)}, "tools[1].function.description"),
        ({"tools": tool(parameters=[])}, "tools[1].function.parameters"),
        ({"tools": tool(parameters={"type": "string"})}, "tools[1].function.parameters.type"),
        (
            {"tools": tool(parameters={"type": "object", "properties": {"a": {"type": "strng"}}})},
            "tools[1].function.parameters.properties.a.type",
        ),
        (
            {"tools": tool(parameters={"type": "object", "required": "a"})},
            "tools[1].function.parameters.required",
        ),
        ({"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"function": {"name": "other"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)
def test_wrong_tools_are_refused_with_the_path(change: dict, param: str):
    response = api_with("x").post(CHAT, {"messages": [{"role": "user", "content": "Hi"}], **change})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_reasoning_is_apart_and_can_be_left_out():
    api = with_reasoning("<think>\nHm, 2.\n</think>\n\nFour.")
    message = api.chat()["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("Hm, 2.", "Four.")
    message = api.chat(include_reasoning=False)["choices"][0]["message"]
    assert (message.get("reasoning"), message["content"]) == (None, "Four.")
    both = joined(api.stream(CHAT))
    assert (both["reasoning"], both["content"]) == ("Hm, 2.", "Four.")
    assert joined(api.stream(CHAT, include_reasoning=False))["reasoning"] == ""


def test_an_answer_that_is_all_thought_has_no_content():
    message = with_reasoning("hm", "deepseek_r1").chat()["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("hm", None)


def test_calls_behind_reasoning_are_found_and_those_within_are_not():
    api = with_reasoning(f"<think>I could say {NOW}</think>\n{ROME}")
    for message in (api.chat(tools=TOOLS)["choices"][0]["message"], joined(api.stream(CHAT, tools=TOOLS))):
        assert message["reasoning"] == f"I could say {NOW}"
        assert not message["content"]
        assert [json.dumps(c).count("get_weather") for c in message["tool_calls"]] == [1]


def test_harmony_is_read_by_one_parser_with_and_without_tools():
    final = "<|start|>assistant<|channel|>final<|message|>Done."
    call = '<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}<|call|>'
    api = with_reasoning(f"<|channel|>analysis<|message|>Hm.<|end|>{final}", "openai_gptoss")
    message = api.chat()["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("Hm.", "Done.")
    api = with_reasoning(f"{call}{final}", "openai_gptoss", tool_call_parser="openai")
    message = api.chat(tools=TOOLS)["choices"][0]["message"]
    assert (message["content"], message["tool_calls"][0]["function"]["name"]) == ("Done.", "now")


def test_an_unknown_parser_stops_the_start():
    with pytest.raises(ConfigError, match="--tool-call-parser hermets is unknown; did you mean hermes"):
        api_with("x", tool_call_parser="hermets")


def grammar_of(form: StructuredOutputsParams) -> str:
    """What the engine would hold an answer to, and that llguidance takes it."""
    grammar = to_grammar(form, {})
    assert not llguidance.LLMatcher.validate_grammar(grammar)
    return grammar


def last_grammar(api: Api) -> str:
    return grammar_of(api.engine.calls[-1].params.structured_outputs)


def byte_tokens() -> llguidance.LLTokenizer:
    return llguidance.LLTokenizer("byte")


NAMED = {"type": "function", "function": {"name": "get_weather"}}


def test_required_calls_are_held_to_the_models_own_way_of_calling():
    api = api_with(ROME)
    choice = api.chat(tools=TOOLS, tool_choice="required")["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    grammar = last_grammar(api)
    assert "get_weather" in grammar and "now" in grammar and "<tool_call>" in grammar


def test_a_named_call_is_held_to_its_function_and_ends_as_text_does():
    api = api_with(ROME)
    choice = api.chat(tools=TOOLS, tool_choice=NAMED)["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "get_weather"
    assert '\\"now\\"' not in last_grammar(api)


def test_without_a_parser_required_calls_are_a_json_list_and_a_named_one_its_arguments():
    listed = '[{"name": "now", "parameters": {}}, {"name": "get_weather", "parameters": {"city": "Rome"}}]'
    api = api_with(listed, tool_call_parser=None, enable_auto_tool_choice=False)
    choice = api.chat(tools=TOOLS, tool_choice="required")["choices"][0]
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["now", "get_weather"]
    assert "parameters" in last_grammar(api)
    api.engine.answer = '{"city": "Rome"}'
    choice = api.chat(tools=TOOLS, tool_choice=NAMED)["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"city": "Rome"}'}
    last_grammar(api)
    streamed = joined(api.stream(CHAT, tools=TOOLS, tool_choice=NAMED))
    assert streamed["tool_calls"] == [{"name": "get_weather", "arguments": '{"city": "Rome"}', "incomplete": False}]


@pytest.mark.parametrize("name", sorted(set(TOOL_PARSERS.names) - {"mine"}))
@pytest.mark.parametrize("choice", ["required", NAMED])
def test_what_a_grammar_makes_a_model_write_its_parser_reads(name: str, choice: Any):
    parser = TOOL_PARSERS.get(name)
    form = parser.call_format or JSON_LIST
    name = form.spelt("get_weather") + ":0" * bool(form.number)
    call = form.begin + name + form.middle + '{"city": "Rome"}' + form.end
    text = form.first + form.separator.join([call] if choice is NAMED else [call, call]) + form.last
    if choice is NAMED and parser.call_format is None:
        text = '{"city": "Rome"}'
    plan = AnswerFormat(parser).plan(read_tool_use(TOOLS, choice))
    reader = plan.parser("")
    answer = Answer.of([*reader.feed(text), *reader.finish()])
    assert {(call.name, call.arguments, call.complete) for call in answer.calls} == {
        ("get_weather", '{"city": "Rome"}', True)
    }
    assert answer.content == ""
    matcher = llguidance.LLMatcher(byte_tokens(), grammar_of(plan.form))
    assert matcher.consume_tokens(list(text.encode())) and matcher.is_accepting()


STRICT = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}, TOOLS[1]]
FREE = sorted(name for name in TOOL_PARSERS.names if (f := TOOL_PARSERS.get(name).call_format) and f.trigger)
TAGGED = sorted(name for name in TOOL_PARSERS.names if TOOL_PARSERS.get(name).tagged_format)


def accepts(form: StructuredOutputsParams, text: str) -> bool:
    """Whether an answer of this form can be this text."""
    matcher = llguidance.LLMatcher(byte_tokens(), grammar_of(form))
    data = list(text.encode())
    return matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()


def written(parser: str, *calls: tuple[str, str]) -> str:
    form = TOOL_PARSERS.get(parser).call_format
    if form is None:
        return "\n".join(tagged(TOOL_PARSERS.get(parser).tagged_format, name, arguments) for name, arguments in calls)
    texts = [
        form.begin + form.spelt(name) + f":{i}" * bool(form.number) + form.middle + arguments + form.end
        for i, (name, arguments) in enumerate(calls)
    ]
    return form.first + form.separator.join(texts) + form.last


def tagged(form: TaggedFormat, name: str, arguments: str) -> str:
    given = json.loads(arguments)
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in given.items()} if isinstance(given, dict) else {}
    inside = "".join(form.key + k + form.value + text + form.value_end for k, text in texts.items())
    return form.begin + name + form.name_end + inside + form.arguments_end + form.end


@pytest.mark.parametrize("name", FREE)
def test_strict_functions_are_enforced_where_the_model_calls_by_itself(name: str):
    """What begins as a call is one of a function there is; a strict one's arguments match its schema."""
    plan = AnswerFormat(TOOL_PARSERS.get(name), auto_tool_choice=True).plan(read_tool_use(STRICT, "auto"))
    rome, now = ("get_weather", '{"city": "Rome"}'), ("now", '{"x": [1]}')
    for text in ("It is sunny. {} < [", written(name, rome), f"Let me look.\n{written(name, rome)}", written(name, now),
                 f"{written(name, rome)}\nAnd:\n{written(name, now)}\nDone.", written(name, rome, now)):  # fmt: skip
        assert accepts(plan.form, text), text
    for call in (("get_weather", '{"town": "Rome"}'), ("get_weather", "{}"), ("get_weather", '{"city": 3}'),
                 ("get_wether", '{"city": "Rome"}'), ("now", "[]")):  # fmt: skip
        assert not accepts(plan.form, f"Well: {written(name, call)}"), call


TYPED = {
    "type": "object",
    "properties": {
        "city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}, "unit": {"enum": ["C", "F"]},
        "where": {"$ref": "#/$defs/place"}, "tags": {"type": ["array", "null"], "items": {"type": "string"}},
    },
    "required": ["city", "days"],
    "$defs": {"place": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}},
}  # fmt: skip


@pytest.mark.parametrize("name", TAGGED)
def test_strict_tagged_arguments_have_the_types_of_their_schemas(name: str):
    """And what the grammar lets through, the parser reads as what the schema says."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": TYPED, "strict": True}},
             {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}]  # fmt: skip
    parser = TOOL_PARSERS.get(name)
    form = AnswerFormat(parser, auto_tool_choice=True).plan(read_tool_use(tools, "auto")).form
    for given in ({"city": "<b>\nRome</b>", "days": 3}, {"city": "", "days": 1, "unit": "F", "where": {"x": 1.5}},
                  {"city": "Oslo", "days": 2, "tags": ["a"]}, {"city": "Oslo", "days": 2, "tags": None}):  # fmt: skip
        text = f"Hm.\n{written(name, ('f', json.dumps(given)))} Done."
        assert accepts(form, text), text
        [call] = parser(tools).parse(text).calls
        assert json.loads(call.arguments) == given
    for given in ({"city": "Rome"}, {"days": 1}, {"city": "Rome", "days": "many"}, {"city": "Rome", "days": 0}, {},
                  {"city": "Rome", "days": 1, "unit": "K"}, {"city": "Rome", "days": 1, "where": {"x": "?"}},
                  {"city": "Rome", "days": 1, "more": 1}):  # fmt: skip
        assert not accepts(form, written(name, ("f", json.dumps(given)))), given
    assert accepts(form, "Just text.") and accepts(form, written(name, ("now", '{"x": [1], "y": "z"}')))
    assert not accepts(form, written(name, ("then", "{}")))


@pytest.mark.parametrize("name", FREE)
def test_without_parallel_calls_a_strict_answer_ends_with_the_first(name: str):
    use = read_tool_use(STRICT, "auto", parallel_tool_calls=False)
    form = AnswerFormat(TOOL_PARSERS.get(name), auto_tool_choice=True).plan(use).form
    rome = written(name, ("get_weather", '{"city": "Rome"}'))
    assert accepts(form, "No.") and accepts(form, f"Look: {rome}")
    assert not accepts(form, f"{rome}\n{rome}")


def test_nothing_is_enforced_under_auto_unless_a_function_is_strict():
    api = api_with(ROME)
    api.chat(tools=TOOLS)
    assert api.engine.calls[-1].params.structured_outputs is None
    api.chat(tools=STRICT)
    assert "get_weather" in last_grammar(api)
    api.chat(tools=STRICT, response_format={"type": "json_object"})
    assert api.engine.calls[-1].params.structured_outputs.json_object
    api.chat(tools=STRICT, tool_choice="none")
    assert api.engine.calls[-1].params.structured_outputs is None


def test_the_strict_level_is_a_floor_for_all_functions():
    for level, city in (("function", True), ("parameter", False)):
        api = api_with(ROME, tool_strict_level=level)
        api.chat(tools=TOOLS)
        form = api.engine.calls[-1].params.structured_outputs
        assert accepts(form, written("hermes", ("get_weather", '{"town": 1}'))) is city
        assert not accepts(form, written("hermes", ("get_wether", "{}")))
    with pytest.raises(ConfigError, match="--tool-strict-level function needs"):
        api_with("x", tool_strict_level="function", tool_call_parser="pythonic")


def test_a_parser_without_such_a_grammar_leaves_strict_to_forced_calls(caplog: pytest.LogCaptureFixture):
    api = api_with("[now()]", tool_call_parser="pythonic")
    api.chat(tools=STRICT)
    assert api.engine.calls[-1].params.structured_outputs is None
    assert "function.strict is not enforced" in caplog.text


def test_an_answer_that_must_call_cannot_have_another_form_too():
    ask = {"messages": [{"role": "user", "content": "Hi"}], "tools": TOOLS, "tool_choice": "required"}
    api = api_with(ROME)
    for extra, param in (
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"use_beam_search": True}, "tool_choice"),
    ):
        response = api.post(CHAT, {**ask, **extra})
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("include_reasoning", [True, False])
def test_usage_tells_reasoning_tokens_shown_or_not(include_reasoning: bool):
    ask = {"include_reasoning": include_reasoning, "n": 2, "temperature": 1}
    api = with_reasoning("<think>why?</think>Four.")
    usage = api.chat(**ask)["usage"]
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 8}
    options = {"include_usage": True, "continuous_usage_stats": True}
    *_, before, last = api.stream(CHAT, stream_options=options, **ask)
    assert last["usage"] == usage
    assert before["usage"]["completion_tokens_details"] == {"reasoning_tokens": 4}  # of its own choice
    assert "completion_tokens_details" not in api_with("Four.").chat()["usage"]
