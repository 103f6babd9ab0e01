"""Chat templates: compiled, rendered in a sandbox to a bounded size, and read for what form of messages they want.

The dialect is transformers', with the same text for the same conversation. Imports only jinja2: the
process that renders templates nobody vouches for starts from this file (see `template_process.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

END_OF_CONTINUED = "\ue000continue\ue001 "  # private characters; the space behind shows whether the template strips


class TemplateRefusal(Exception):
    """The template does not take these messages, or its text is too long."""


class Generation(Extension):
    """transformers' own tag, which marks what the assistant says."""

    tags = {"generation"}

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """Without names that would reach Python's own."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")
        super().__setitem__(name, value)


def _make_environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_Namespace, dict=_dict
    )
    del environment.globals["lipsum"]  # text without end
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes what HTML cannot have."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _dict(*args: Any, **kwargs: Any) -> dict:
    return dict(*args, **kwargs)


_ENVIRONMENT = _make_environment()


@lru_cache(maxsize=16)
def _compile(text: str) -> jinja2.Template:
    return _ENVIRONMENT.from_string(text)


def render(
    template: str,
    messages: list[dict[str, Any]],
    /,
    *,
    max_chars: int,
    continue_final_message: bool = False,
    **variables: Any,
) -> str:
    """The conversation as text.

    Raises:
        TemplateRefusal: the template fails on it, refuses it, or makes more than max_chars of it.
    """
    try:
        if not continue_final_message:
            return _render(template, max_chars, {**variables, "messages": messages})
        marked = [*messages[:-1], _with_mark(messages[-1])]
        text = _render(template, max_chars, {**variables, "messages": marked})
    except TemplateRefusal:
        raise
    except Exception as error:  # a template raises anything: jinja2's errors, TypeError, RecursionError
        raise TemplateRefusal(str(error) or type(error).__name__) from error
    place = text.rfind(END_OF_CONTINUED.rstrip())
    if place < 0:
        raise TemplateRefusal("it leaves out the end of the last message, which continue_final_message needs")
    if text.startswith(END_OF_CONTINUED, place):
        return text[:place]
    return text[:place].rstrip()  # it strips what is said, so nothing may be left behind it


def _render(template: str, max_chars: int, variables: dict[str, Any]) -> str:
    parts: list[str] = []
    room = max_chars
    for part in _compile(template).generate(variables):
        room -= len(part)
        if room < 0:
            raise TemplateRefusal(f"it makes more than {max_chars} characters of them; no context holds that")
        parts.append(part)
    return "".join(parts)


def _with_mark(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, list) and content and isinstance(content[-1].get("text"), str):
        last = {**content[-1], "text": content[-1]["text"] + END_OF_CONTINUED}
        return {**message, "content": [*content[:-1], last]}
    if not isinstance(content, str):
        raise TemplateRefusal("the last message has no text to continue")
    return {**message, "content": content + END_OF_CONTINUED}


# --- what a template wants ---


@lru_cache(maxsize=16)
def content_format(template: str) -> str:
    """"openai" if a message's content is to be a list of parts, for it is looped over; else "string".

    A template that cannot be parsed wants strings: rendering it will say what is wrong.
    """
    try:
        tree = _ENVIRONMENT.parse(template)
    except jinja2.TemplateError:
        return "string"
    return "openai" if _Contents(tree).are_looped_over() else "string"


class _Contents:
    """Which names of a template stand for all messages, for one, and for a message's content."""

    def __init__(self, tree: nodes.Template) -> None:
        self._tree = tree
        self._all, self._one, self._content = {"messages"}, set(), set()
        while self._follow_names():
            pass

    def are_looped_over(self) -> bool:
        return any(self._is_content(loop.iter) for loop in self._tree.find_all(nodes.For))

    def _follow_names(self) -> bool:
        """Learn what loops, assignments and macros call by new names; whether there was any."""
        before = (len(self._all), len(self._one), len(self._content))
        for name, value in self._bindings():
            if self._is_all(value):
                self._all.add(name)
            elif self._is_one(value):
                self._one.add(name)
            elif self._is_content(value):
                self._content.add(name)
        for loop in self._tree.find_all(nodes.For):
            if isinstance(loop.target, nodes.Name) and self._is_all(loop.iter):
                self._one.add(loop.target.name)
        return before != (len(self._all), len(self._one), len(self._content))

    def _bindings(self) -> Iterator[tuple[str, nodes.Node]]:
        for assignment in self._tree.find_all(nodes.Assign):
            if isinstance(assignment.target, nodes.Name):
                yield assignment.target.name, assignment.node
        macros = {macro.name: macro for macro in self._tree.find_all(nodes.Macro)}
        for call in self._tree.find_all(nodes.Call):
            macro = macros.get(call.node.name) if isinstance(call.node, nodes.Name) else None
            if macro is None:
                continue
            for parameter, value in zip(macro.args, call.args):
                yield parameter.name, value
            for keyword in call.kwargs:
                yield keyword.key, keyword.value

    def _is_all(self, node: nodes.Node) -> bool:
        if isinstance(node, nodes.Name):
            return node.name in self._all
        if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
            return self._is_all(node.node)
        return isinstance(node, nodes.Filter) and node.node is not None and self._is_all(node.node)

    def _is_one(self, node: nodes.Node) -> bool:
        if isinstance(node, nodes.Name):
            return node.name in self._one
        return isinstance(node, nodes.Getitem) and not isinstance(node.arg, nodes.Slice) and self._is_all(node.node)

    def _is_content(self, node: nodes.Node) -> bool:
        if isinstance(node, nodes.Name):
            return node.name in self._content
        if isinstance(node, nodes.Getattr):
            return node.attr == "content" and self._is_one(node.node)
        if isinstance(node, nodes.Getitem):
            return _is_constant(node.arg, "content") and self._is_one(node.node)
        if isinstance(node, nodes.CondExpr):
            return any(self._is_content(branch) for branch in (node.expr1, node.expr2) if branch is not None)
        return isinstance(node, nodes.Filter) and node.node is not None and self._is_content(node.node)


def _is_constant(node: nodes.Node, value: str) -> bool:
    return isinstance(node, nodes.Const) and node.value == value
