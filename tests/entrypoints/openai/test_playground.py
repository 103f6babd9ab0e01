"""The page at `/`: where it is, what may be in it, and the stream that its live view reads."""

from __future__ import annotations

import asyncio
import json
import re

import pytest

from minivllm.entrypoints.openai.playground.feed import MAX_WATCHERS, PERIOD_S, EngineFeed
from minivllm.entrypoints.openai.playground.files import OPEN_PATHS, page_file
from minivllm.exceptions import EngineDeadError, QueueFullError
from tests.entrypoints.openai.conftest import Api
from tests.entrypoints.openai.fakes import FakeEngine

STATE = "/playground/state"
FILES = sorted(OPEN_PATHS - {"/"})


class Watcher:
    """A client of the live view, spoken to in ASGI, so that it can leave."""

    def __init__(self, api: Api, headers: dict[str, str] | None = None) -> None:
        self.sent: list[dict] = []
        self._left = asyncio.Event()
        raw = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
        scope = {"type": "http", "method": "GET", "path": STATE, "headers": raw, "query_string": b""}
        self.done = asyncio.ensure_future(api.app(scope, self._receive, self._send))

    async def _receive(self) -> dict:
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict) -> None:
        self.sent.append(message)

    async def leave(self) -> None:
        self._left.set()
        await self.done

    async def until(self, num_events: int) -> list[dict]:
        while len(self.events) < num_events and not self.done.done():
            await asyncio.sleep(0.01)
        return self.events

    @property
    def events(self) -> list[dict]:
        text = b"".join(message.get("body", b"") for message in self.sent).decode()
        return [json.loads(line.removeprefix("data: ")) for line in text.split("\n") if line.startswith("data: ")]


# The page


def test_the_page_and_each_of_its_files_are_there(api: Api):
    page = api.get("/")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    for path in FILES:
        assert api.get(path).status_code == 200, path
    assert api.get("/playground/router.py").status_code == 404
    assert api.get("/playground/..%2frouter.py").status_code == 404


def test_it_loads_nothing_from_elsewhere_and_runs_no_inline_code(api: Api):
    policy = api.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    for path in ["/", *FILES]:
        response = api.get(path)
        assert response.headers["content-security-policy"] == policy
        assert response.headers["x-content-type-options"] == "nosniff"
        addresses = set(re.findall(r"(?:https?:)?//[\w.]+\.\w+[^\s\"']*", response.text))
        assert addresses <= {"http://www.w3.org/2000/svg"}, path
    page = api.get("/").text
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\bstyle=|\son\w+=", page)


def test_every_address_in_it_is_relative_so_that_a_prefix_stays_in_front(api: Api):
    addresses = re.findall(r"""(?:src|href)="([^"]*)\"""", api.get("/").text)
    assert addresses and not [address for address in addresses if address.startswith("/")]
    script = "".join(api.get(path).text for path in FILES if path.endswith(".js"))
    assert not re.search(r"""["'`]/(?:v1|playground)""", script)


def test_what_a_model_says_is_never_put_in_as_html():
    for path in FILES:
        text = page_file(path.rpartition("/")[2]).content.decode()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\(", text), path


def test_without_a_key_the_page_is_open_and_all_it_asks_for_is_not(engine: FakeEngine):
    api = Api(engine, api_key=["secret"])
    for path in ["/", *FILES]:
        assert api.get(path).status_code == 200, path
    for path in (STATE, "/v1/models", "/playground/none.js"):
        assert api.get(path).status_code == 401, path
    key = {"Authorization": "Bearer secret"}
    assert api.get("/v1/models", headers=key).status_code == 200


def test_it_is_open_behind_a_root_path_with_and_without_the_last_slash(engine: FakeEngine):
    api = Api(engine, api_key=["secret"], root_path="/gate")
    assert api.get("/gate/").status_code == 200
    assert api.get("/gate/playground/app.js").status_code == 200
    bare = api.get("/gate")
    assert bare.status_code in (301, 307) and bare.headers["location"].endswith("/gate/")
    assert api.get("/gate/v1/models").status_code == 401


def test_it_can_be_left_out(engine: FakeEngine):
    api = Api(engine, disable_playground=True)
    for path in ("/", STATE, *FILES):
        assert api.get(path).status_code == 404, path
    assert Api(engine, disable_playground=True, api_key=["k"]).get("/").status_code == 401


# The live view


def test_the_state_is_told_in_numbers_and_says_nothing_of_any_prompt(api: Api):
    async def talk(client) -> None:
        secret = "the prompt nobody else may see"
        await client.post("/v1/completions", json={"prompt": secret, "max_tokens": 4})
        watcher = Watcher(api)
        first, *_ = await watcher.until(2)
        await watcher.leave()
        (engine,) = first["engines"]
        assert (first["type"], first["block_size"], first["max_num_seqs"]) == ("state", 32, 8)
        assert (engine["num_running_reqs"], engine["num_waiting_reqs"], engine["num_blocks"]) == (2, 1, 10)
        assert engine["blocks"] == "s2hce6"
        start, *rest = watcher.sent
        headers = dict(start["headers"])
        assert (start["status"], headers[b"cache-control"]) == (200, b"no-cache")
        assert secret.encode() not in b"".join(message["body"] for message in rest)

    api.run(talk)


def test_the_stream_needs_a_key(engine: FakeEngine):
    api = Api(engine, api_key=["secret"])

    async def talk(_client) -> None:
        refused = Watcher(api)
        await refused.done
        assert refused.sent[0]["status"] == 401
        assert engine.num_snapshots == 0
        admitted = Watcher(api, {"Authorization": "Bearer secret"})
        await admitted.until(1)
        await admitted.leave()
        assert admitted.sent[0]["status"] == 200

    api.run(talk)


def test_the_engine_is_asked_once_for_all_and_only_while_somebody_watches(engine: FakeEngine):
    api = Api(engine)
    api.app.state.engine_feed = EngineFeed(engine, api.lifecycle, period_s=0.02)

    async def talk(_client) -> None:
        watchers = [Watcher(api) for _ in range(5)]
        for watcher in watchers:
            await watcher.until(3)
        assert engine.num_snapshots <= max(len(watcher.events) for watcher in watchers) + 1
        for watcher in watchers:
            await watcher.leave()
        before = engine.num_snapshots
        await asyncio.sleep(0.1)
        assert engine.num_snapshots == before
        again = Watcher(api)
        await again.until(1)
        await again.leave()
        assert engine.num_snapshots > before

    api.run(talk)


def test_it_is_asked_no_more_than_four_times_a_second():
    assert PERIOD_S >= 0.25


def test_a_watcher_that_comes_as_the_last_one_leaves_waits_for_nobody(engine: FakeEngine):
    async def scenario() -> None:
        feed = EngineFeed(engine, Api(engine).lifecycle, period_s=30)
        first = feed.watch()
        await anext(first)
        await first.aclose()
        second = feed.watch()
        await asyncio.wait_for(anext(second), 20)  # less than the period
        await second.aclose()

    asyncio.run(scenario())


def test_too_many_watchers_are_refused(engine: FakeEngine):
    async def scenario() -> None:
        feed = EngineFeed(engine, Api(engine).lifecycle, period_s=0.001)
        watchers = [feed.watch() for _ in range(MAX_WATCHERS)]
        for watcher in watchers:
            await anext(watcher)
        with pytest.raises(QueueFullError, match="watch the engine already"):
            await feed.stream("id")
        await watchers.pop().aclose()
        response = await feed.stream("id")
        await response._close()
        for watcher in watchers:
            await watcher.aclose()

    asyncio.run(scenario())


def test_a_dead_engine_is_told_and_ends_the_stream(engine: FakeEngine):
    api = Api(engine)
    api.app.state.engine_feed = EngineFeed(engine, api.lifecycle, period_s=0.01)

    async def talk(_client) -> None:
        watcher = Watcher(api)
        await watcher.until(1)
        engine.die()
        await asyncio.wait_for(watcher.done, 30)
        assert watcher.events[-1]["error"]["code"] == EngineDeadError.status
        late = Watcher(api)
        await late.done
        assert late.sent[0]["status"] == EngineDeadError.status

    api.run(talk)


def test_a_closing_server_ends_the_stream(api: Api):
    async def talk(_client) -> None:
        watcher = Watcher(api)
        await watcher.until(1)
        api.lifecycle.close()
        await asyncio.wait_for(watcher.done, 30)
        assert watcher.events[-1]["error"]["code"] == 503

    api.run(talk)
