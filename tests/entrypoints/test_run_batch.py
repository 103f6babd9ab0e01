"""`minivllm run-batch`: a line of output for each line of input, in order, failures included."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import httpx
import pytest

from minivllm.entrypoints.cli import run_batch
from minivllm.entrypoints.cli.main import main
from minivllm.entrypoints.cli.run_batch import answer_lines, check_no_listening, make_parser, read_lines
from minivllm.exceptions import ConfigError
from tests.entrypoints.openai.conftest import Api
from tests.entrypoints.openai.fakes import ANSWER, FakeEngine


def line(custom_id: str, url: str = "/v1/completions", **body) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


def test_every_line_is_answered_in_its_order():
    api = Api(FakeEngine(), api_key=["k"])
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 50}
    lines = read_lines("\n".join([
        line("a", prompt="Hi", max_tokens=50), line("b", "/v1/chat/completions", **chat), "",
        line("c", prompt="Hi", max_tokens=-1), line("d", "/v1/responses", input="Hi"),
    ]))  # fmt: skip
    answers = asyncio.run(answer_lines(api.app, lines, concurrency=2, keys=["k"]))
    assert [answer["custom_id"] for answer in answers] == ["a", "b", "c", "d"]
    assert [answer["response"]["status_code"] for answer in answers] == [200, 200, 400, 200]
    assert answers[0]["response"]["body"]["choices"][0]["text"] == ANSWER
    assert answers[1]["response"]["body"]["choices"][0]["message"]["content"] == ANSWER
    assert answers[2]["error"]["param"] == "max_tokens"
    assert [answer["error"] for answer in answers].count(None) == 3
    assert len({answer["id"] for answer in answers}) == 4


def test_a_line_that_no_text_can_carry_fails_alone():
    api = Api(FakeEngine())
    lines = read_lines("\n".join([
        line("a", prompt="Hi", max_tokens=50), line("b", prompt="\ud800"),
        line("c", prompt="Hi", temperature=float("nan")),
    ]))  # fmt: skip
    answers = asyncio.run(answer_lines(api.app, lines, concurrency=2))
    assert [answer["response"]["status_code"] for answer in answers] == [200, 400, 400]
    assert [answer["error"]["param"] for answer in answers[1:]] == ["prompt", "temperature"]


def test_a_line_ends_only_where_jsonl_says():
    body = {"prompt": "x\u2028y\u0085z"}
    written = json.dumps({"custom_id": "a", "url": "/v1/completions", "body": body}, ensure_ascii=False)
    (one,) = read_lines(f"{written}\r\n")
    assert one.body == body


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path):
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + line("a", prompt="x").encode())
    assert [one.custom_id for one in read_lines(run_batch._read(str(tmp_path / "in.jsonl")))] == ["a"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no request"),
        ("[" * 100_000, "line 1 is not JSON"),
        (line("\udfff", prompt="x"), "custom_id"),
        ("{", "line 1 is not JSON"),
        (line("a", prompt="x") + "\n[1]", "line 2"),
        (line("a", prompt="x") + "\n" + line("a", prompt="x"), "line 2: custom_id 'a'"),
        (line("a", "/v1/files"), "url '/v1/files'"),
        (line("a", prompt="x", stream=True), "stream"),
        (line("a").replace("POST", "GET"), "method"),
        (line("a").replace('"a"', "1"), "custom_id"),
        (line("a").replace("{}", "[]"), "body"),
    ],
)
def test_a_wrong_file_is_refused_before_a_model_is_loaded(text: str, reason: str):
    with pytest.raises(ConfigError) as refused:
        read_lines(text)
    assert reason in str(refused.value)


def test_the_command_answers_a_file(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(line(str(i), prompt=[i + 1], max_tokens=3, ignore_eos=True) for i in range(5)))
    main([
        "run-batch", "-i", str(source), "-o", str(target), "--model", str(tiny_model), "--max-model-len", "64",
        "--kv-cache-memory-bytes", "16Mi",
    ])  # fmt: skip
    answers = [json.loads(answer) for answer in target.read_text().splitlines()]
    assert [answer["custom_id"] for answer in answers] == list("01234")
    assert {answer["response"]["body"]["usage"]["completion_tokens"] for answer in answers} == {3}
    assert "5 requests in" in capsys.readouterr().out
    assert list(tmp_path.glob("tmp*")) == []
    with pytest.raises(SystemExit):
        main(["run-batch", "-i", str(tmp_path / "nowhere"), "-o", str(target), "--model", str(tiny_model)])
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--api-server-count", "2"], ["--uds", "x.sock"], ["--ssl-certfile", "x.pem"]])
def test_what_only_a_listening_server_could_heed_is_refused(option: list[str]):
    args = make_parser().parse_args(["-i", "in", "-o", "out", "--model", "m", *option])
    with pytest.raises(ConfigError, match=f"{option[0]} is for a server"):
        check_no_listening(args)


def test_without_such_an_option_nothing_is_refused():
    check_no_listening(make_parser().parse_args(["-i", "in", "-o", "out", "--model", "m", "--port", "1"]))


def test_an_upload_is_tried_again_and_then_given_up(monkeypatch: pytest.MonkeyPatch):
    waits, statuses = [], [500, 500, 201]
    monkeypatch.setattr(run_batch.time, "sleep", waits.append)
    monkeypatch.setattr(
        httpx, "put", lambda url, **_: httpx.Response(statuses.pop(0), request=httpx.Request("PUT", url))
    )
    run_batch._upload("http://x/out", "text")
    assert (waits, statuses) == ([1, 2], [])
    waits[:], statuses[:] = [], [500] * 5
    with pytest.raises(ConfigError, match="cannot be written: .*500"):
        run_batch._upload("http://x/out", "text")
    assert (waits, statuses) == ([1, 2, 4, 8], [])
