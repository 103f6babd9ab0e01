"""Answers that must have a form, from the official client to the model in the box and back."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jsonschema
import openai
import pytest
from openai import OpenAI

from minivllm import LLM, SamplingParams
from minivllm.exceptions import RequestError
from tests.e2e.server import Server

MODEL = "minnow"
ASK = [{"role": "user", "content": "Describe somebody in JSON."}]


@pytest.fixture(scope="module")
def client(box_server: Server) -> OpenAI:
    return OpenAI(base_url=f"{box_server.url}/v1", api_key="none", max_retries=0)


def chat(client: OpenAI, **options):
    # Without whitespace to dwell on, every schema below ends within these tokens.
    options = {"max_tokens": 400, "seed": 1, "temperature": 0.7} | options
    return client.chat.completions.create(model=MODEL, messages=ASK, **options)


def schema_format(schema: dict) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}


def closed(**properties: dict) -> dict:
    """An object with all of these properties and no others."""
    return {
        "type": "object", "properties": properties, "required": [*properties], "additionalProperties": False
    }  # fmt: skip


def between(low: int, high: int) -> dict:
    return {"type": "integer", "minimum": low, "maximum": high}


SHORT = {"type": "string", "maxLength": 12}
SCHEMAS = {
    "flat": closed(name=SHORT, age=between(0, 120), ok={"type": "boolean"}),
    "nested": closed(who=closed(first=SHORT, home=closed(zip={"pattern": "^[0-9]{5}$", "type": "string"}))),
    "array": {"type": "array", "items": {"enum": ["red", "green", 3, None]}, "minItems": 2, "maxItems": 5},
    "tuple": {"type": "array", "prefixItems": [{"const": "x"}, between(-1, 1)], "items": False, "minItems": 2},
    "refs": {
        "$defs": {"leaf": closed(v=between(1, 9))},
        **closed(a={"$ref": "#/$defs/leaf"}, b={"$ref": "#/$defs/leaf"}),
    },
    "any of": {"anyOf": [between(5, 7), {"type": "null"}, closed(k={"const": 1})]},
    "pattern": {"type": "string", "pattern": "^[A-Z][a-z]{2,6}-[0-9]{2}$"},
    "format": closed(day={"type": "string", "format": "date"}),
}


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_json_is_of_its_schema_streamed_and_whole(client: OpenAI, name: str, temperature: float):
    asked = {
        "response_format": schema_format(SCHEMAS[name]),
        "temperature": temperature,
        "extra_body": {"structured_outputs": {"disable_any_whitespace": True}},
    }
    whole = chat(client, **asked).choices[0]
    jsonschema.validate(json.loads(whole.message.content), SCHEMAS[name])
    assert whole.finish_reason == "stop"
    chunks = list(chat(client, stream=True, **asked))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_any_object_will_do_for_json_object(client: OpenAI):
    for seed in range(4):
        answer = chat(client, response_format={"type": "json_object"}, seed=seed, temperature=1.0).choices[0]
        assert answer.message.content.startswith("{")
        if answer.finish_reason == "stop":
            assert isinstance(json.loads(answer.message.content), dict)


@pytest.mark.parametrize(
    ("asked", "pattern"),
    [
        ({"regex": "[0-9]{3}-[a-z]{2,4}"}, "[0-9]{3}-[a-z]{2,4}"),
        ({"choice": ["red", "green", "blue"]}, "red|green|blue"),
        ({"grammar": 'start: "so" (" and" | " or") END\nEND: /[!?]/'}, "so (and|or)[!?]"),
        ({"grammar": 'root ::= "yes" | "no" tail\ntail ::= " way"'}, "yes|no way"),
        ({"json": SCHEMAS["pattern"]}, '"[A-Z][a-z]{2,6}-[0-9]{2}"'),
    ],
)
def test_other_constraints_on_both_endpoints(client: OpenAI, asked: dict, pattern: str):
    extra = {"extra_body": {"structured_outputs": asked}, "temperature": 1.2, "seed": 3}
    answer = chat(client, **extra).choices[0]
    assert re.fullmatch(pattern, answer.message.content), answer.message.content
    text = client.completions.create(model=MODEL, prompt="Tell me:", max_tokens=60, n=3, logprobs=2, **extra)
    assert all(re.fullmatch(pattern, choice.text) for choice in text.choices)
    assert all(choice.finish_reason == "stop" and len(choice.logprobs.tokens) > 0 for choice in text.choices)


def test_structural_tags_hold_the_tagged_parts_to_their_schema(client: OpenAI):
    number = {"type": "json_schema", "json_schema": {"type": "integer", "minimum": 1, "maximum": 99}}
    tag = {"type": "tag", "begin": "<n>", "content": number, "end": "</n>"}
    elements = [{"type": "const_string", "value": "It is "}, tag]
    format = {"type": "structural_tag", "format": {"type": "sequence", "elements": elements}}
    answer = chat(client, response_format=format).choices[0]
    assert re.fullmatch("It is <n>[1-9][0-9]?</n>", answer.message.content), answer
    tags = {"structures": [{"begin": "<n>", "schema": number["json_schema"], "end": "</n>"}], "triggers": ["<n"]}
    free = chat(client, response_format={"type": "structural_tag", **tags}, max_tokens=60, temperature=0).choices[0]
    assert free.message.content == chat(client, max_tokens=60, temperature=0).choices[0].message.content


def test_the_old_names_mean_what_they_meant(client: OpenAI):
    for old, value, pattern in (
        ("guided_regex", "[xyz]{4}", "[xyz]{4}"),
        ("guided_choice", ["tea", "milk"], "tea|milk"),
        ("guided_grammar", 'start: "q"', "q"),
        ("guided_json", {"const": 5}, "5"),
    ):
        answer = chat(client, extra_body={old: value}).choices[0]
        assert re.fullmatch(pattern, answer.message.content), old


@pytest.mark.parametrize(
    ("options", "param", "names"),
    [
        ({"response_format": schema_format({"type": "array", "uniqueItems": True})}, "response_format", "uniqueItems"),
        ({"response_format": schema_format({"if": {}, "then": {}})}, "response_format", "if"),
        ({"extra_body": {"structured_outputs": {"json": {"not": {}}}}}, "structured_outputs", "not"),
        ({"extra_body": {"structured_outputs": {"regex": "(?!a)"}}}, "structured_outputs", "look-around"),
        ({"extra_body": {"structured_outputs": {"grammar": "start: x"}}}, "structured_outputs", "unknown name"),
        ({"extra_body": {"structured_outputs": {"backend": "x"}}}, "structured_outputs", "backend"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_done_is_a_400_that_names_it(
    client: OpenAI, options: dict, param: str, names: str, stream: bool
):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, stream=stream, **options)
    assert caught.value.param == param and names in caught.value.message


def test_a_bad_constraint_holds_up_no_other_request(client: OpenAI):
    endless = "start: A\nA: " + " & ".join(f"/(.|\\n)*b{i}(.|\\n)*/" for i in range(30))
    with ThreadPoolExecutor() as pool:
        bad = pool.submit(chat, client, extra_body={"structured_outputs": {"grammar": endless}})
        plain = [chat(client, max_tokens=20).choices[0].message.content for _ in range(3)]
        known = chat(client, extra_body={"structured_outputs": {"choice": ["known"]}}, max_tokens=5)
        with pytest.raises(openai.BadRequestError, match="takes more than"):
            bad.result()
    assert len(set(plain)) == 1 and known.choices[0].message.content == "known"


def test_others_in_the_batch_change_nothing_for_either(client: OpenAI):
    story = [{"role": "user", "content": "Tell me a story."}]
    plain = {"messages": story, "max_tokens": 60, "seed": 7, "logprobs": True}
    constrained = {
        "messages": ASK, "max_tokens": 200, "seed": 8, "logprobs": True, "temperature": 1.1,
        "response_format": schema_format(SCHEMAS["flat"]),
    }  # fmt: skip

    def rows(options: dict) -> tuple:
        choice = client.chat.completions.create(model=MODEL, **options).choices[0]
        return choice.finish_reason, [(row.token, row.logprob) for row in choice.logprobs.content]

    alone = rows(plain), rows(constrained)
    with ThreadPoolExecutor(12) as pool:
        mixed = [pool.submit(rows, plain if i % 2 else constrained) for i in range(12)]
    assert {str(future.result()) for future in mixed[1::2]} == {str(alone[0])}
    assert {str(future.result()) for future in mixed[::2]} == {str(alone[1])}


# Offline, and a model that knows no JSON


def test_a_random_model_is_held_to_json(tiny_model: Path):
    params = [
        SamplingParams(
            max_tokens=300, temperature=2.0, seed=seed,
            structured_outputs={"json": schema, "disable_any_whitespace": True},
        )
        for seed in range(3)
        for schema in SCHEMAS.values()
    ]  # fmt: skip
    with LLM(str(tiny_model), kv_cache_memory_bytes=64 << 20, max_model_len=512) as llm:
        outputs = llm.generate([[5, 6, 7]] * len(params), params, use_tqdm=False)
    answers = [output.outputs[0] for output in outputs]
    assert {answer.finish_reason for answer in answers} == {"stop"}
    for answer, asked in zip(answers, params):
        jsonschema.validate(json.loads(answer.text), json.loads(asked.structured_outputs.json))


def test_penalties_stops_and_the_rest_of_sampling_go_together_with_a_grammar():
    options = [
        {"n": 3, "temperature": 1.0},
        {"repetition_penalty": 1.4, "frequency_penalty": 1.0},
        {"min_tokens": 30},
        {"ignore_eos": True},
        {"top_k": 3, "top_p": 0.8, "min_p": 0.01},
        {"temperature": 0},
        {"logprobs": 3},
        {"stop": ["-9"]},
    ]
    common = {"seed": 1, "max_tokens": 50, "structured_outputs": {"regex": "[a-z]{2,5}-[0-9]{2}"}}
    params = [
        SamplingParams(**(common | option))
        for option in options
    ]
    with LLM(kv_cache_memory_bytes=64 << 20) as llm:
        outputs = llm.generate(["Say it:"] * len(params), params, use_tqdm=False)
        with pytest.raises(RequestError, match="uniqueItems"):
            llm.generate("x", SamplingParams(structured_outputs={"json": {"uniqueItems": True}}), use_tqdm=False)
    for output in outputs:
        for answer in output.outputs:
            assert re.fullmatch("[a-z]{2,5}-([0-9]{2})?", answer.text), answer
            assert answer.finish_reason == "stop"


def test_a_budget_ends_thinking_and_the_grammar_begins_behind_it():
    with LLM(kv_cache_memory_bytes=64 << 20, reasoning_parser="qwen3") as llm:
        encode = llm.get_tokenizer().encode
        prompt = encode("Say it:", add_special_tokens=False)
        thinking = prompt + encode("<think>", add_special_tokens=False)
        end = encode("</think>", add_special_tokens=False)
        for budget in (0, 6):
            params = SamplingParams(
                max_tokens=40, min_tokens=8, seed=1, thinking_token_budget=budget,
                structured_outputs={"choice": ["yes", "no"]},
            )
            open_one, plain = llm.generate([thinking, prompt], params, use_tqdm=False)
            assert plain.outputs[0].text in ("yes", "no")
            answer = open_one.outputs[0]
            assert answer.token_ids[budget : budget + len(end)] == end
            assert answer.text.split("</think>")[-1] in ("yes", "no") and answer.finish_reason == "stop"
    with LLM(kv_cache_memory_bytes=64 << 20) as llm, pytest.raises(RequestError, match="--reasoning-parser"):
        llm.generate("x", SamplingParams(thinking_token_budget=3), use_tqdm=False)


def test_a_model_that_would_end_while_it_thinks_goes_on_to_the_form():
    with LLM(kv_cache_memory_bytes=64 << 20, reasoning_parser="qwen3") as llm:
        tokenizer = llm.get_tokenizer()
        thinking = tokenizer.encode("Say it:<think>", add_special_tokens=False)
        wants_to_end = {"logit_bias": {tokenizer.eos_token_id: 100.0}, "temperature": 0, "max_tokens": 40}
        params = [
            SamplingParams(**wants_to_end),
            SamplingParams(**wants_to_end, structured_outputs={"choice": ["yes", "no"]}),
            SamplingParams(**wants_to_end, structured_outputs={"choice": ["yes", "no"]}, thinking_token_budget=9),
            SamplingParams(**wants_to_end, structured_outputs={"choice": ["yes", "no"]}, ignore_eos=True),
        ]
        outputs = llm.generate([thinking] * 4, params, use_tqdm=False)
    free, cut, formed, ignoring = [output.outputs[0] for output in outputs]
    assert free.token_ids == [tokenizer.eos_token_id] and free.finish_reason == "stop"
    assert len(cut.token_ids) == 40 and cut.finish_reason == "length" and tokenizer.eos_token_id not in cut.token_ids
    assert formed.token_ids[:9] == cut.token_ids[:9] and formed.finish_reason == "stop"
    assert formed.text.split("</think>")[-1] in ("yes", "no")
    assert set(ignoring.token_ids) == {tokenizer.eos_token_id} and ignoring.finish_reason == "length"


def test_no_whitespace_for_all_requests_is_the_servers_option():
    config = {"backend": "guidance", "disable_any_whitespace": True}
    with LLM(kv_cache_memory_bytes=64 << 20, structured_outputs_config=config) as llm:
        params = SamplingParams(max_tokens=100, temperature=0, structured_outputs={"json": SCHEMAS["refs"]})
        [output] = llm.generate("Say it:", params, use_tqdm=False)
    assert re.fullmatch(r'\{"a":\{"v":[1-9]\},"b":\{"v":[1-9]\}\}', output.outputs[0].text)
