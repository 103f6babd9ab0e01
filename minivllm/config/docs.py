"""The string under a field of a config class is its documentation: what `--help` prints.

Python keeps no docstrings of fields, so they are read from the source, once, when help is made.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache


@cache
def field_docs(config_class: type) -> dict[str, str]:
    """Field name -> the string literal that follows it; {} where the source is not at hand."""
    try:
        source = textwrap.dedent(inspect.getsource(config_class))
    except (OSError, TypeError):
        return {}
    body = ast.parse(source).body[0].body
    return {
        field.target.id: " ".join(doc.value.value.split())
        for field, doc in zip(body, body[1:])
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(doc, ast.Expr)
        and isinstance(doc.value, ast.Constant)
        and isinstance(doc.value.value, str)
    }


def summary(config_class: type) -> str:
    """The first sentence of the module that defines the class: what the group of options is about."""
    module = inspect.getmodule(config_class)
    return (inspect.getdoc(module) or "").split("\n\n")[0].replace("\n", " ")
