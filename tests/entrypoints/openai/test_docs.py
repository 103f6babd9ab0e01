"""docs/server.md names every flag and every route, and the tests it names are there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from minivllm.config.frontend import FrontendConfig
from tests.entrypoints.openai.conftest import Api
from tests.entrypoints.openai.fakes import FakeEngine
from tests.entrypoints.openai.test_limits import rows

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "server.md").read_text()
WORDS = set(re.findall(r"[\w/.{}-]+", PAGE))


@pytest.mark.parametrize("name", [field.name for field in fields(FrontendConfig)])
def test_every_flag_is_in_the_table(name: str):
    assert "--" + name.replace("_", "-") in WORDS


def test_every_route_is_in_the_table(engine: FakeEngine):
    app = Api(engine, enable_dev_endpoints=True, enable_tokenizer_info_endpoint=True).app
    routes = [route for route in flat(app.routes) if hasattr(route, "methods")]
    paths = {route.path.rstrip("/").replace(":path", "") or "/" for route in routes}
    shown = {re.sub(r"{\w+}", "{id}", path) for path in paths}
    shown -= {"/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"}  # FastAPI's own
    assert [path for path in sorted(shown) if path not in WORDS] == []


def flat(routes: Iterable[Any]) -> Iterator[Any]:
    for route in routes:
        inner = getattr(route, "original_router", None)
        yield from [route] if inner is None else flat(inner.routes)


@pytest.mark.parametrize("title", ["Flags of the server", "Routes"])
def test_every_row_names_a_test(title: str):
    for row in rows(title):
        assert re.search(r"`(tests/[\w/]+/|[\w/]*test_\w+\.py)", row[-1]), row


def test_the_tests_it_names_are_there():
    here = ROOT / "tests" / "entrypoints" / "openai"
    for name in re.findall(r"`((?:tests/[\w/]+/)?(?:test_\w+\.py)?)(?:::(\w+))?`", PAGE):
        path, test = name
        if not path:
            continue
        file = ROOT / path if path.startswith("tests/") else here / path
        assert file.exists(), path
        assert not test or f"def {test}(" in file.read_text(), name
