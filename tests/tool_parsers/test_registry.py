"""Parsers by name, and those of one's own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from minivllm.config.docs import field_docs
from minivllm.config.frontend import FrontendConfig
from minivllm.config.reasoning import ReasoningConfig
from minivllm.exceptions import ConfigError
from minivllm.reasoning import registry as reasoning_parsers
from minivllm.reasoning.registry import reasoning_parser_class
from minivllm.tool_parsers import registry as tool_parsers
from minivllm.tool_parsers.abstract import ToolParser
from minivllm.tool_parsers.registry import TOOL_PARSERS

PLUGIN = """
from minivllm.tool_parsers.abstract import ToolParser
from minivllm.tool_parsers.registry import TOOL_PARSERS

@TOOL_PARSERS.register("mine")
class Mine(ToolParser):
    def read(self):
        while (yield from self.source.until("CALL", emit=self.content))[1]:
            self.name("f")
            self.begin()
            self.arguments("{}")
            self.end()
"""


@pytest.mark.parametrize("name", TOOL_PARSERS.names)
def test_every_name_has_its_class(name: str):
    assert issubclass(TOOL_PARSERS.get(name), ToolParser)


@pytest.mark.parametrize(
    ("parsers", "field", "config"),
    [
        (tool_parsers._PARSERS, "tool_call_parser", FrontendConfig),
        (reasoning_parsers._PARSERS, "reasoning_parser", ReasoningConfig),
    ],
)
def test_help_and_docs_name_every_parser(parsers: dict[str, str], field: str, config: type):
    told = re.split(r"[^a-z0-9_]+", field_docs(config)[field])
    documented = (Path(__file__).parents[2] / "docs/tools.md").read_text()
    assert not set(parsers) - set(told)
    assert not [name for name in parsers if name not in documented]


def test_a_misspelt_name_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="--tool-call-parser hermess is unknown; did you mean hermes"):
        TOOL_PARSERS.get("hermess")
    with pytest.raises(ConfigError, match="--reasoning-parser qwen33 is unknown; did you mean qwen3"):
        reasoning_parser_class(ReasoningConfig("qwen33"))


def test_a_plugin_registers_a_parser(tmp_path):
    path = tmp_path / "plugin.py"
    path.write_text(PLUGIN)
    for _ in range(2):  # a second time changes nothing
        TOOL_PARSERS.import_plugin(str(path))
    assert [call.name for call in TOOL_PARSERS.get("mine")().parse("a CALL b").calls] == ["f"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [("x = 1", "registers no subclass"), ("1 / 0", "ZeroDivisionError"), (None, "is not a file")],
)
def test_a_plugin_that_is_none_stops_the_start(tmp_path, text: str | None, reason: str):
    path = tmp_path / "bad.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=reason):
        TOOL_PARSERS.import_plugin(str(path))
