"""Schemathesis over a running server's OpenAPI schema. Not part of the suite, which has no schemathesis:

    python -m minivllm.entrypoints.openai.api_server --host 127.0.0.1 --api-key example \\
        --enable-auto-tool-choice --tool-call-parser hermes --max-model-len 512 --enable-tokenizer-info-endpoint
    python -m venv fuzz && fuzz/bin/python -m pip install schemathesis
    fuzz/bin/python tests/entrypoints/openai/fuzz_openapi.py http://127.0.0.1:8000 example --max-examples 300

The server's own schema says little about what it reads itself (messages, tools, formats): most of what is drawn from it
is refused at the first field. Here these fields have schemas of their own, so that cases get as far as the engine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

SMALL = {"type": "string", "maxLength": 12}
TALK = [{"role": "user", "content": "Hello"}]
ANYTHING: dict[str, Any] = {}
NAME = {"enum": ["f", "get_weather", "a-b", "", "no such", "f" * 300]}
SCHEMA = {
    "anyOf": [
        {"enum": [
            {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
            {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", 1, None]}}},
            {"type": "array", "items": {"type": "number"}, "maxItems": 2},
            {"not": {}}, {"type": "strin"}, {},
            {"type": "string", "pattern": "a("}, {"oneOf": [{"type": "null"}, {"type": "string", "maxLength": 3}]},
        ]},
        {"type": "object", "properties": {"type": {"enum": ["object", "string", 3]}, "properties": {"type": "object"}}},
    ]
}  # fmt: skip
FUNCTION = {
    "type": "object",
    "properties": {"name": NAME, "description": SMALL, "parameters": SCHEMA, "strict": {"enum": [True, False, None]}},
    "required": ["name"],
}


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required}


def _list(items: dict[str, Any], most: int = 3, least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": items, "maxItems": most, "minItems": least}


def _usually(good: Any, *others: dict[str, Any]) -> dict[str, Any]:
    """One good value as often as something else."""
    return {"anyOf": [{"const": good}] * max(1, len(others)) + [*others]}


def _mostly(*usual: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [*usual, ANYTHING]}


TOOL = _mostly(_object(["type", "function"], type={"const": "function"}, function=FUNCTION), FUNCTION)
TOOLS = _mostly(_list(TOOL))
PART = _mostly(
    _object(["type", "text"], type={"enum": ["text", "input_text", "output_text"]}, text=SMALL),
    _object(
        ["type"], type={"enum": ["image_url", "input_audio", "file", "refusal"]}, image_url=ANYTHING, refusal=SMALL
    ),
)
CONTENT = _mostly(SMALL, _list(PART), {"type": "null"})
CALL = _mostly(
    _object(["id", "type", "function"], id=SMALL, type={"const": "function"},
            function=_object(["name", "arguments"], name=NAME,
                             arguments={"enum": ["{}", '{"city": "Oslo"}', "{", "[]", "3", None, {"a": 1}]}))
)  # fmt: skip
MESSAGE = _mostly(
    _object(["role", "content"], role={"enum": ["user", "system", "developer", "assistant", "tool"]}, content=CONTENT,
            name=SMALL, tool_call_id=SMALL, reasoning=SMALL, tool_calls=_mostly(_list(CALL)))
)  # fmt: skip
TOOL_CHOICE = _mostly(
    {"enum": ["auto", "none", "required", None]},
    _object(["type", "function"], type={"const": "function"}, function=_object(["name"], name=NAME)),
    _object(["type", "name"], type={"enum": ["function", "tool", "any", "auto"]}, name=NAME),
)
FORMAT = _mostly(
    {"enum": [{"type": "text"}, {"type": "json_object"}, None]},
    _object(["type", "json_schema"], type={"const": "json_schema"}, json_schema=_mostly(
        _object(["name", "schema"], name=NAME, schema=SCHEMA, strict={"type": "boolean"}))),
    _object(["type", "name", "schema"], type={"const": "json_schema"}, name=NAME, schema=SCHEMA),
    _object(["type", "structures", "triggers"], type={"const": "structural_tag"}, structures=_list(
        _mostly(_object(["begin", "schema", "end"], begin=SMALL, schema=SCHEMA, end=SMALL))), triggers=_list(SMALL)),
)  # fmt: skip
STRUCTURED = _mostly(
    _object(["json"], json=SCHEMA),
    _object(["regex"], regex={"enum": ["a+", "[0-9]{3}", "(", "(?=a)", "", "x{1,100000}"]}),
    _object(["choice"], choice=_list(SMALL)),
    _object(["grammar"], grammar={"enum": ["start: \"a\"", "root ::= \"b\"+", "start:", "", "?"]}),
    {"type": "null"},
)
NUMBER = _mostly({"type": "number", "minimum": -3, "maximum": 3}, {"enum": [0, 1, 1e308, -1, None, "1"]})
COUNT = _mostly({"type": "integer", "minimum": -1, "maximum": 3}, {"enum": [0, 1, 20, 21, 10**20, None, 1.5]})
BLOCK = _mostly(
    _object(["type", "text"], type={"const": "text"}, text=SMALL),
    _object(["type", "tool_use_id"], type={"const": "tool_result"}, tool_use_id=SMALL, content=CONTENT),
    _object(["type", "id", "name", "input"], type={"const": "tool_use"}, id=SMALL, name=NAME, input=_mostly(SCHEMA)),
    _object(["type", "thinking"], type={"const": "thinking"}, thinking=SMALL, signature=SMALL),
)
ITEM = _mostly(
    _object(["role", "content"], type={"const": "message"}, role={"enum": ["user", "system", "assistant"]},
            content=CONTENT),
    _object(["type", "call_id", "output"], type={"const": "function_call_output"}, call_id=SMALL, output=CONTENT),
    _object(["type", "call_id", "name", "arguments"], type={"const": "function_call"}, call_id=SMALL, name=NAME,
            arguments=SMALL),
    _object(["type", "summary"], type={"const": "reasoning"}, summary=_list(PART), content=_list(PART)),
)  # fmt: skip
FEW = {"type": "integer", "minimum": 1, "maximum": 6}  # tokens, lest a case takes long
BOOLEAN = {"enum": [True, False, None]}

COMMON = {
    "temperature": NUMBER, "top_p": NUMBER, "min_p": NUMBER, "top_k": COUNT, "seed": COUNT, "n": COUNT,
    "presence_penalty": NUMBER, "repetition_penalty": NUMBER, "stream": BOOLEAN,
    "stop": _mostly(SMALL, _list(SMALL, 5)),
    "logit_bias": _mostly(_object([], **{"5": NUMBER, "-1": NUMBER, "x": NUMBER, "999999": NUMBER})),
    "stop_token_ids": _mostly(_list(COUNT)), "allowed_token_ids": _mostly(_list(COUNT)),
    "bad_words": _mostly(_list(SMALL)), "min_tokens": COUNT, "prompt_logprobs": COUNT, "ignore_eos": BOOLEAN,
    "priority": COUNT, "truncate_prompt_tokens": COUNT,
    "stream_options": _mostly(_object([], include_usage=BOOLEAN, continuous_usage_stats=BOOLEAN)),
    "structured_outputs": STRUCTURED, "response_format": FORMAT, "use_beam_search": BOOLEAN,
    "return_token_ids": BOOLEAN, "return_tokens_as_token_ids": BOOLEAN, "guided_json": SCHEMA,
    "guided_choice": _list(SMALL),
    "vllm_xargs": _mostly({"type": "object"}), "cache_salt": _mostly(SMALL), "thinking_token_budget": COUNT,
}  # fmt: skip
CHAT = {
    **COMMON, "tools": TOOLS, "tool_choice": TOOL_CHOICE, "parallel_tool_calls": BOOLEAN, "logprobs": BOOLEAN,
    "top_logprobs": COUNT, "echo": BOOLEAN, "add_generation_prompt": BOOLEAN, "continue_final_message": BOOLEAN,
    "chat_template_kwargs": _mostly({"type": "object"}), "reasoning_effort": _mostly({"enum": ["low", "none", "max"]}),
    "documents": _mostly(_list({"type": "object"})),
}  # fmt: skip
# path -> the fields that get another schema; those of the second are always there
RICH: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "/v1/chat/completions": (CHAT, {"messages": _usually(TALK, _list(MESSAGE, least=1)), "max_tokens": FEW}),
    "/v1/chat/completions/batch": (
        CHAT, {"messages": _usually([TALK] * 2, _list(_list(MESSAGE), least=1)), "max_tokens": FEW}),
    "/v1/completions": ({**COMMON, "logprobs": COUNT, "echo": BOOLEAN, "suffix": SMALL}, {
        "prompt": _usually("Hello", _list(SMALL), _list(COUNT), _list(_list(COUNT))), "max_tokens": FEW}),
    "/v1/responses": ({**COMMON, "tools": TOOLS, "tool_choice": TOOL_CHOICE, "top_logprobs": COUNT, "text": _mostly(
        _object(["format"], format=FORMAT, verbosity=SMALL)), "reasoning": _mostly(_object([], effort=SMALL)),
        "include": _mostly(_list({"enum": ["message.output_text.logprobs", "x", 3]})), "store": BOOLEAN,
        "instructions": SMALL, "previous_response_id": SMALL, "metadata": _mostly({"type": "object"})}, {
        "input": _usually("Hello", _list(ITEM)), "max_output_tokens": FEW}),
    "/v1/messages": ({**COMMON, "tools": _mostly(_list(_mostly(_object(
        ["name", "input_schema"], name=NAME, input_schema=SCHEMA, description=SMALL)))), "tool_choice": TOOL_CHOICE,
        "system": CONTENT, "thinking": _mostly(_object(["type"], type={"enum": ["enabled", "disabled"]},
        budget_tokens=COUNT)), "stop_sequences": _mostly(_list(SMALL, 5)), "output_config": _mostly(
        _object([], effort=SMALL, format=FORMAT))}, {
        "messages": _usually(TALK, _list(_mostly(_object(
            ["role", "content"], role={"enum": ["user", "assistant", "system"]},
            content=_mostly(SMALL, _list(BLOCK)))), least=1)), "max_tokens": FEW}),
    "/v1/messages/count_tokens": ({"system": CONTENT, "tools": TOOLS}, {"messages": _mostly(_list(_mostly(_object(
        ["role", "content"], role={"enum": ["user", "assistant"]}, content=_mostly(SMALL, _list(BLOCK))))))}),
    "/tokenize": ({"messages": _mostly(_list(MESSAGE)), "tools": TOOLS, "prompt": _mostly(SMALL)}, {}),
    "/detokenize": ({}, {"tokens": _mostly(_list(COUNT))}),
}  # fmt: skip


def enriched(schema: dict[str, Any], paths: list[str]) -> dict[str, Any]:
    """Of these routes alone, each with a body of its own: what must be there, and few of the other fields at a time."""
    for path in paths:
        optional, required = RICH[path]
        names = [*optional]
        some = [dict.fromkeys(names[i : i + 2]) for i in range(0, len(names), 2)]
        some += [dict.fromkeys([a, b]) for a, b in zip(names, names[len(names) // 2 :])]
        bodies = [
            {"type": "object", "properties": {**{name: optional[name] for name in few}, **required},
             "required": [*few, *required], "additionalProperties": False}
            for few in some or [{}]
        ]  # fmt: skip
        operation = schema["paths"][path]["post"]
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": {"anyOf": bodies}}}}
    schema["paths"] = {path: schema["paths"][path] for path in paths}
    return schema


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("url")
    parser.add_argument("key")
    parser.add_argument("--max-examples", type=int, default=300, help="cases of each route and phase")
    parser.add_argument("--path", action="append", help=f"default: {', '.join(RICH)}")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    key = {"Authorization": f"Bearer {args.key}"}
    with urllib.request.urlopen(urllib.request.Request(f"{args.url}/openapi.json", headers=key)) as answer:
        schema = enriched(json.load(answer), args.path or list(RICH))
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "openapi.json"
        file.write_text(json.dumps(schema))
        command = [
            str(Path(sys.executable).with_name("st")), "run", str(file), "--url", args.url,
            "--checks", "not_a_server_error",
            "--phases", "coverage,fuzzing", "--max-examples", str(args.max_examples), "--seed", str(args.seed),
            "--header", f"Authorization: Bearer {args.key}", "--continue-on-failure", "--request-timeout", "60",
        ]  # fmt: skip
        return subprocess.call([*command, "--suppress-health-check", "all"])


if __name__ == "__main__":
    raise SystemExit(main())
