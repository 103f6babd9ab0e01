"""The routes beside generation, keys, CORS, tokenizing, and the socket."""

from __future__ import annotations

import contextlib
import socket

import pytest

from minivllm.entrypoints.openai.api_server import create_server_socket
from minivllm.exceptions import ConfigError
from minivllm.version import __version__
from tests.entrypoints.openai.conftest import Api
from tests.entrypoints.openai.fakes import MAX_MODEL_LEN, FakeEngine


def test_the_version_is_told(api: Api):
    assert api.get("/version").json() == {"version": __version__}


def test_models_are_listed_under_their_served_names():
    api = Api(FakeEngine(served_model_name=["a", "org/b"]), model="some/model")
    cards = api.get("/v1/models").json()
    assert cards["object"] == "list"
    assert [card["id"] for card in cards["data"]] == ["a", "org/b"]
    for card in cards["data"]:
        assert (card["object"], card["root"], card["max_model_len"]) == ("model", "some/model", MAX_MODEL_LEN)
    assert api.get("/v1/models/org/b").json()["id"] == "org/b"
    assert api.get("/v1/models/c").status_code == 404
    assert api.get("/v1/models/").json() == cards
    assert api.complete(model="org/b")["model"] == "org/b"
    assert api.complete()["model"] == "a"


def test_every_route_but_the_probes_needs_the_key(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MINIVLLM_API_KEY", "third")
    api = Api(engine, api_key=["first", "second"])
    for path in ("/health", "/ping", "/metrics"):
        assert api.get(path).status_code == 200
    for path in (
        "/v1/models",
        "/version",
        "/docs",
        "/openapi.json",
        "/v1/completions",
        "/nothing",
        "http://test//health",
    ):
        response = api.get(path)
        assert response.status_code == response.json()["error"]["code"] == 401
    for header in ("first", "Bearer", "Bearer fourth", "Basic first", "Bearer first second"):
        assert api.get("/version", headers={"Authorization": header}).status_code == 401
    for key in ("first", "second", "third"):
        assert api.get("/version", headers={"Authorization": f"Bearer {key}"}).status_code == 200


def test_a_key_may_have_any_characters(engine: FakeEngine):
    api = Api(engine, api_key=["schlüssel-鍵à"])
    for key, status in (("schlüssel-鍵à", 200), ("schlüssel-鍵", 401), ("schlussel", 401)):
        header = f"Bearer {key}".encode()
        assert api.get("/version", headers={"Authorization": header}).status_code == status


def test_a_browser_may_ask_first_without_a_key(engine: FakeEngine):
    headers = {"Origin": "http://page", "Access-Control-Request-Method": "POST"}
    response = Api(engine, api_key=["k"]).request("OPTIONS", "/v1/completions", headers=headers)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "*"


def test_docs_can_be_turned_off(engine: FakeEngine):
    assert Api(engine).get("/openapi.json").status_code == 200
    assert Api(engine, disable_fastapi_docs=True).get("/openapi.json").status_code == 404


def test_tokenize_gives_the_ids_the_model_would_get(api: Api):
    text = api.post("/tokenize", {"prompt": "Hi", "return_token_strs": True}).json()
    assert text == {
        "count": 2,
        "max_model_len": MAX_MODEL_LEN,
        "tokens": [72, 105],
        "token_strs": ["<72>", "<105>"],
    }
    messages = [{"role": "user", "content": "Hi"}]
    chat = api.post("/tokenize", {"messages": messages}).json()
    api.chat(messages=messages)
    assert chat["tokens"] == api.engine.calls[-1].prompt["prompt_token_ids"]


def test_detokenize_turns_ids_back_and_refuses_strangers(api: Api):
    assert api.post("/detokenize", {"tokens": [72, 105]}).json() == {"prompt": "Hi"}
    for wrong in ([260], [-1], [1.5], ["1"], [True]):
        response = api.post("/detokenize", {"tokens": wrong})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "tokens")
    assert api.post("/tokenize", {}).status_code == api.post("/detokenize", {}).status_code == 400


def test_without_a_tokenizer_text_routes_say_so():
    api = Api(FakeEngine(skip_tokenizer_init=True))
    for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})):
        response = api.post(path, body)
        assert response.status_code == 400
        assert "--skip-tokenizer-init" in response.json()["error"]["message"]


def test_a_port_in_use_is_refused_by_number_and_holder():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} is in use by process \d+"):
            create_server_socket("127.0.0.1", port)


def test_a_port_that_another_server_is_about_to_serve_is_refused_too():
    with contextlib.closing(create_server_socket("127.0.0.1", 0)) as first:
        with pytest.raises(ConfigError, match="in use"):
            create_server_socket("127.0.0.1", first.getsockname()[1])


def test_an_address_that_is_not_ours_is_refused():
    with pytest.raises(ConfigError, match="--host"):
        create_server_socket("203.0.113.7", 0)
