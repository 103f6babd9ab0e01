"""The page in a headless Chromium, on a real server. Not part of the suite, which must not need a browser:

    apt install chromium-headless-shell        # or chromium; or any that CHROMIUM= names
    .venv/bin/python -m pip install playwright
    .venv/bin/python -m pytest tests/browser/check_playground.py [--basetemp DIR]

Pictures of the page, wide and narrow, dark and light, idle and with 64 streams, are left in DIR/shots0.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.server import Server, serving

sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ["chromium-headless-shell", "chromium", "google-chrome"])), None
)
WIDE, NARROW = (1280, 820), (390, 844)
KEY = "a key of this test"
ARGUMENTS = ["--kv-cache-memory-bytes", "40000000", "--max-num-seqs", "48"]  # 101 blocks: 64 streams must wait


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(None, *ARGUMENTS, run_dir=tmp_path_factory.mktemp("run")) as running:
        yield running


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shots")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@contextmanager
def page_of(browser: Any, url: str, size: tuple[int, int] = WIDE, scheme: str = "light") -> Iterator[Any]:
    """The page in a context of its own. That it logs no error, a refused script or style among them, is checked."""
    context = browser.new_context(viewport=dict(zip(("width", "height"), size)), color_scheme=scheme)
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.goto(url)
    page.set_default_timeout(20_000)
    yield page
    context.close()
    assert [text for text in wrong if "Failed to load resource" not in text] == []  # as the browser logs each 400


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    with page_of(browser, server.url) as page:
        yield page


def say(page: Any, text: str) -> None:
    page.fill("#chat-input", text)
    page.press("#chat-input", "Enter")


def answer(page: Any, index: int = -1) -> str:
    """The text of an answer that has ended."""
    page.wait_for_selector("#chat-send:visible")
    return page.locator(".message.assistant .text").nth(index).inner_text()


def until(question: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not question():
        assert time.monotonic() < deadline, "it did not become so"
        time.sleep(0.05)


def running(server: Server) -> int:
    lines = urllib.request.urlopen(f"{server.url}/metrics").read().decode().splitlines()
    (value,) = [line.rsplit(" ", 1)[1] for line in lines if line.startswith("vllm:num_requests_running{")]
    return int(float(value))


@contextmanager
def load(server: Server, num_streams: int) -> Iterator[None]:
    """So many streams at once, half of them with a long prefix in common."""
    ends = threading.Event()
    story = "Once upon a time there was a little fox who lived in a wood near the river and liked to play. " * 16

    def stream(index: int) -> None:
        for turn in range(1000):
            prompt = f"{story if index % 2 else ''}Tell me a story, {index} {turn}"
            body = {"prompt": prompt, "max_tokens": 200, "stream": True, "ignore_eos": True, "seed": index}
            request = urllib.request.Request(
                f"{server.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request) as response:
                for _ in response:
                    if ends.is_set():
                        return

    threads = [threading.Thread(target=stream, args=(index,), daemon=True) for index in range(num_streams)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ends.set()
        for thread in threads:
            thread.join(30)


# Asking


def test_a_conversation_streams_and_is_remembered(page: Any):
    say(page, "What is 3 + 4?")
    assert "7" in answer(page)
    assert re.match(r"\d+ tokens · .*stop$", page.locator(".about").inner_text())
    asked = []
    page.on("request", lambda request: asked.append(request.post_data_json) if request.method == "POST" else None)
    say(page, "Hello!")
    answer(page)
    assert [message["role"] for message in asked[0]["messages"]] == ["user", "assistant", "user"]
    page.click("#knobs summary")
    page.click("#chat-clear")
    assert page.locator(".message").count() == 0


def test_the_fields_that_are_filled_are_sent_and_no_others(page: Any):
    page.click("#knobs summary")
    knobs = {"temperature": "0.3", "top_k": "5", "seed": "7", "stop": "one\ntwo", "system": "Be brief."}
    for name, value in knobs.items():
        page.fill(f"#knob-{name}", value)
    with page.expect_request("**/v1/chat/completions") as sent:
        say(page, "Hello!")
    body = sent.value.post_data_json
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    kept = {name: body[name] for name in body if name not in ("messages", "model", "stream", "stream_options")}
    assert kept == {"temperature": 0.3, "top_k": 5, "seed": 7, "stop": ["one", "two"], "max_tokens": 512}
    answer(page)
    page.fill("#knob-temperature", "9")
    say(page, "Hello!")
    assert "Temperature" in page.locator(".problem").inner_text()


def test_stop_ends_the_request_in_the_engine(page: Any, server: Server):
    page.click("#tab-completion")
    page.click("#knobs summary")
    page.fill("#knob-max_tokens", "1900")
    page.fill("#knob-stop", "a text that nobody writes")
    page.route(
        "**/v1/completions",
        lambda route: route.continue_(post_data={**route.request.post_data_json, "ignore_eos": True}),
    )
    page.click("#completion-send")
    until(lambda: running(server) == 1)
    page.click("#completion-stop")
    until(lambda: running(server) == 0, 5)
    assert "stopped by you" in page.locator("#completion-output .about").inner_text()
    page.click("#completion-more")
    assert len(page.input_value("#completion-input")) > len("Once upon a time")


def test_an_error_is_shown_as_the_server_words_it(page: Any):
    page.click("#knobs summary")
    page.fill("#knob-max_tokens", "100000")
    say(page, "Hello!")
    words = page.locator(".problem").inner_text()
    assert words.startswith("400 ") and "100000" in words and "2048" in words
    assert page.input_value("#chat-input") == "Hello!"  # to be sent again


def test_what_the_model_says_is_text_whatever_it_says(page: Any):
    evil = '<img src=x onerror="document.title=\'owned\'"><script>document.title="owned"</script>'
    chunk = {"choices": [{"index": 0, "delta": {"content": evil}, "finish_reason": "stop"}]}
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(
            content_type="text/event-stream", body=f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
        ),
    )
    say(page, "Hello!")
    assert answer(page) == evil
    assert page.locator("#log img, #log script").count() == 0 and page.title() == "minivllm"


def test_a_connection_that_breaks_is_said(page: Any):
    page.route("**/v1/chat/completions", lambda route: route.abort())
    say(page, "Hello!")
    assert "cannot be reached" in page.locator(".problem").inner_text()


# Access


def test_it_asks_for_the_key_and_sends_it(browser: Any, tmp_path: Path):
    with serving(None, "--api-key", KEY, *ARGUMENTS, run_dir=tmp_path) as server, page_of(browser, server.url) as page:
        page.wait_for_selector("#key-dialog[open]")
        assert "needs a key" in page.locator("#key-words").inner_text()
        page.fill("#key-input", "wrong")
        page.press("#key-input", "Enter")
        page.wait_for_selector("#key-dialog[open]")
        page.fill("#key-input", KEY)
        page.press("#key-input", "Enter")
        page.wait_for_selector("#watch-state.live")
        say(page, "What is 3 + 4?")
        assert "7" in answer(page)
        page.reload()
        page.wait_for_selector("#watch-state.live")  # it stays in the tab


def test_it_works_behind_a_prefix(browser: Any, tmp_path: Path):
    with serving(None, "--root-path", "/gate", *ARGUMENTS, run_dir=tmp_path) as server:
        for path in ("/gate/", "/gate"):
            with page_of(browser, server.url + path) as page:
                page.wait_for_selector("#watch-state.live")
                say(page, "What is 3 + 4?")
                assert "7" in answer(page)


def test_all_of_it_is_reached_by_keyboard(page: Any):
    page.focus("#tab-chat")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-completion"
    assert page.is_visible("#panel-completion") and not page.is_visible("#panel-chat")
    page.keyboard.press("Home")
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    assert {"log", "chat-input", "chat-send", "watch", "theme", "show-key", "model", "Hello!", "API"} <= reached


def test_every_field_and_button_has_a_name(page: Any):
    page.click("#knobs summary")
    nameless = page.evaluate(
        """[...document.querySelectorAll("input, textarea, select, button")]
           .filter((e) => !e.ariaHidden && !e.labels?.length && !e.ariaLabel && !e.textContent.trim()).map((e) =>
           e.id)"""
    )
    assert nameless == []


def test_the_theme_follows_the_system_until_one_is_chosen(browser: Any, server: Server):
    def is_dark(page: Any) -> bool:
        red, *_ = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
        return red < 128

    with page_of(browser, server.url, scheme="dark") as page:
        assert is_dark(page)
        page.click("#theme")
        assert not is_dark(page)
        page.reload()
        assert not is_dark(page)


@pytest.mark.parametrize("tab", ["chat", "completion", "engine"])
def test_nothing_sticks_out_on_a_phone(browser: Any, server: Server, tab: str):
    with page_of(browser, server.url, NARROW) as page:
        page.click(f"#tab-{tab}")
        if tab == "completion":
            page.click("#completion-send")
        if tab == "chat":
            say(page, "x" * 300)
        if tab != "engine":
            page.click("#knobs summary")
        time.sleep(0.5)
        for selector in ("html", "#log", "#completion-output", "#panel-engine", "#knobs"):
            sizes = page.evaluate(f"(e => [e.scrollWidth, e.clientWidth])(document.querySelector('{selector}'))")
            assert sizes[0] <= sizes[1], selector


# The live view


def test_it_is_read_only_while_it_is_seen(browser: Any, server: Server):
    with page_of(browser, server.url, NARROW) as page:
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        time.sleep(0.5)
        assert not [url for url in asked if "playground/state" in url]
        page.click("#tab-engine")
        page.wait_for_selector("#watch-state.live")
        page.click("#watch")
        assert page.inner_text("#watch-state") == "paused"
        page.click("#tab-chat")
        page.click("#tab-engine")
        assert page.inner_text("#watch-state") == "paused"
        assert len([url for url in asked if "playground/state" in url]) == 1


def test_it_comes_back_when_the_server_does(browser: Any, tmp_path: Path):
    with serving(None, *ARGUMENTS, run_dir=tmp_path) as server, page_of(browser, server.url) as page:
        page.wait_for_selector("#watch-state.live")
        page.route("**/playground/state", lambda route: route.fulfill(status=503, body='{"error":{"message":"gone"}}'))
        page.click("#watch")
        page.click("#watch")
        page.wait_for_selector("#watch-state.lost")
        assert page.inner_text("#watch-state") == "gone"
        page.unroute("**/playground/state")
        page.wait_for_selector("#watch-state.live")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_pictures(browser: Any, server: Server, shots: Path, size: tuple[int, int], scheme: str):
    name = f"{'wide' if size == WIDE else 'narrow'}-{scheme}"
    with page_of(browser, server.url, size, scheme) as page:
        time.sleep(1)
        page.screenshot(path=shots / f"{name}-idle.png")
        with load(server, 64):
            time.sleep(12 if size == WIDE else 2)
            say(page, "Tell me a story about a fox.")
            answer(page)
            if size == NARROW:
                page.screenshot(path=shots / f"{name}-chat.png")
                page.click("#tab-engine")
                time.sleep(12)
            page.screenshot(path=shots / f"{name}-load.png")
            until(lambda: int(page.inner_text("#n-running")) > 8)
            until(lambda: float(page.inner_text("#n-generated").replace(",", "")) > 0)
            until(lambda: int(page.inner_text("#n-waiting")) > 0)
            until(lambda: int(page.inner_text("#n-block3")) > 0)  # the prefix is shared
