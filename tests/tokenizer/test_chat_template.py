"""Chat templates: transformers' text, bounded, and read for the form of messages they want."""

from __future__ import annotations

import pytest

from minivllm.exceptions import RequestError
from minivllm.tokenizer import template_process
from minivllm.tokenizer.chat_template import TemplateRefusal, content_format, render
from minivllm.tokenizer.tokenizer import Tokenizer
from minivllm.utils.box_model import box_model_path

MESSAGES = [{"role": "user", "content": "Hi <b>"}, {"role": "assistant", "content": " Well, "}]
PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[go]{% endif %}"
CONTINUABLE = [PLAIN, "{%- for m in messages %}\n  {{ m['content'] | trim }}\n{%- endfor %}"]
OTHERS = [
    "{{ messages | tojson }} {{ tools | tojson(indent=2) }} {{ bos_token }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}",
    "{{ documents }}{{ dict(a=1) }}{{ enable_thinking }}",
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "é <b>"}}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(box_model_path())


@pytest.mark.parametrize(
    ("template", "continues"),
    [(t, False) for t in (None, *CONTINUABLE, *OTHERS)] + [(t, True) for t in (None, *CONTINUABLE)],
)
def test_the_text_is_transformers_own(tokenizer: Tokenizer, template: str | None, continues: bool):
    options = {"add_generation_prompt": not continues, "continue_final_message": continues, "tools": TOOLS}
    theirs = tokenizer.hf.apply_chat_template(MESSAGES, chat_template=template, tokenize=False, **options)
    assert tokenizer.render_chat_template(MESSAGES, chat_template=template, **options) == theirs


def test_a_template_that_leaves_out_the_last_message_cannot_continue_it():
    with pytest.raises(TemplateRefusal, match="leaves out the end"):
        render("{{ messages[0].content }}", MESSAGES, max_chars=100, continue_final_message=True)


def test_what_a_template_makes_is_bounded():
    looping = "{% for i in range(100000) %}{{ 'x' * 1000 }}{% endfor %}"
    with pytest.raises(TemplateRefusal, match="more than 5000 characters"):
        render(looping, MESSAGES, max_chars=5000)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('no pirates') }}", "no pirates"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "namespace"),
        ("{{ lipsum(n=10) }}", "undefined"),
        ("{% if %}", "Expected an expression"),
        ("{{ 1 / 0 }}", "division"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ range(10000000) | list }}", "Range too big"),
    ],
)
def test_what_goes_wrong_in_a_template_is_the_requests_error(tokenizer: Tokenizer, template: str, says: str):
    for trusted in (True, False):
        with pytest.raises(RequestError, match=says) as error:
            tokenizer.render_chat_template(MESSAGES, chat_template=template, trusted=trusted)
        assert error.value.param == ("messages" if trusted else "chat_template")


def test_a_requests_template_is_rendered_apart_to_the_same_text(tokenizer: Tokenizer):
    texts = [tokenizer.render_chat_template(MESSAGES, chat_template=PLAIN, trusted=t) for t in (True, False)]
    assert texts[0] == texts[1] == "[user]Hi <b>[assistant] Well, [go]"


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set x = 'a' * 2000000000 %}{{ x | length }}",
    ],
)
def test_a_requests_template_that_takes_too_much_is_killed(monkeypatch, tokenizer: Tokenizer, template: str):
    monkeypatch.setattr(template_process, "WALL_S", 2.0)
    with pytest.raises(RequestError, match="takes (longer|more) than"):
        tokenizer.render_chat_template(MESSAGES, chat_template=template, trusted=False)


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (PLAIN, "string"),
        ("{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}", "openai"),
        ("{% for m in messages %}{% for part in m['content'] %}{{ part }}{% endfor %}{% endfor %}", "openai"),
        (
            "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
            "{% for part in m.content | list %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}",
            "openai",
        ),
        (
            "{% set rest = messages[1:] %}{% for m in rest %}{% set content = m.content %}"
            "{% for part in content %}{{ part }}{% endfor %}{% endfor %}",
            "openai",
        ),
        (
            "{% macro say(content) %}{% for part in content %}{{ part.text }}{% endfor %}{% endmacro %}"
            "{% for m in messages %}{{ say(m.content) }}{% endfor %}",
            "openai",
        ),
        ("{% for part in messages[0].content %}{{ part.text }}{% endfor %}", "openai"),
        ("{% for m in messages %}{% for call in m.tool_calls %}{{ call }}{% endfor %}{% endfor %}", "string"),
        ("{% for d in documents %}{% for part in d.content %}{{ part }}{% endfor %}{% endfor %}", "string"),
        ("{% if %}", "string"),
    ],
)
def test_a_template_that_loops_over_contents_wants_parts(template: str, form: str):
    assert content_format(template) == form


def test_the_tool_use_template_is_taken_when_there_are_tools(monkeypatch, tokenizer: Tokenizer):
    monkeypatch.setattr(tokenizer.hf, "chat_template", {"default": "plain", "tool_use": "tools"})
    assert (tokenizer.template_for(), tokenizer.template_for(TOOLS)) == ("plain", "tools")
    assert tokenizer.render_chat_template(MESSAGES, tools=TOOLS) == "tools"
