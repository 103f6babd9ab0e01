"""The `minivllm` command: it finds its commands, talks to servers, and says in one line what went wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from minivllm.entrypoints.cli.main import main
from minivllm.entrypoints.errors import exit_on_error
from minivllm.exceptions import ConfigError, EngineStartError, ModelFilesError
from minivllm.version import __version__
from tests.entrypoints.stub_server import MODEL, StubServer, stub_server


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubServer]:
    monkeypatch.delenv("MINIVLLM_API_KEY", raising=False)
    with stub_server() as server:
        yield server


def type_in(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    """Lines, or exceptions, that input() gives; then end of file."""
    rest = iter([*lines, EOFError])

    def read(prompt: str = "") -> str:
        line = next(rest)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)


def failed(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str]:
    """The exit code and the last line of a command that fails."""
    with pytest.raises(SystemExit) as exit_:
        main(list(args))
    return exit_.value.code, capsys.readouterr().err.splitlines()[-1]


def test_version_and_help_are_printed(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"{__version__}\n"
    main([])
    overview = capsys.readouterr().out
    assert "serve" in overview and "collect-env" in overview
    main(["bench", "--help"])
    assert "throughput" in capsys.readouterr().out


def test_a_misspelt_command_is_answered_with_the_nearest(capsys):
    assert failed(capsys, "srve") == (2, "minivllm: error: minivllm has no command 'srve'; did you mean serve?")
    assert "did you mean latency" in failed(capsys, "bench", "latenci")[1]


def test_a_command_of_vllm_that_is_not_here_yet_is_refused_by_name(capsys):
    assert "snapshot" in failed(capsys, "snapshot", "create")[1]
    assert "sweep" in failed(capsys, "bench", "sweep")[1]


def test_serve_checks_its_arguments_before_anything_else(capsys):
    assert failed(capsys, "serve", "--port", "65536")[0] == 2
    assert "--tensor-parallel-size" in failed(capsys, "serve", "m", "--tensor-parallel-size", "2")[1]


def test_a_quick_chat_prints_the_streamed_answer(server: StubServer, capsys):
    main(["chat", "--url", f"{server.url}/v1", "--system-prompt", "Be brief.", "-q", "Hello", "--stats"])
    answer, stats = capsys.readouterr().out.splitlines()
    assert answer == "Bonjour."
    assert stats.startswith("[4 tokens in, 3 out;")
    (asked,) = server.asked
    assert asked["model"] == MODEL
    assert asked["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
    ]


def test_a_conversation_remembers_what_was_said_until_exit(server: StubServer, monkeypatch, capsys):
    type_in(monkeypatch, "one", "", "two", "/exit", "never")
    main(["chat", "--url", f"{server.url}/v1", "--model-name", "named"])
    assert [message["content"] for message in server.asked[-1]["messages"]] == ["one", "Bonjour.", "two"]
    assert len(server.asked) == 2
    assert server.asked[0]["model"] == "named"


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_end_of_file_and_ctrl_c_end_the_conversation_without_an_error(server: StubServer, monkeypatch, end):
    type_in(monkeypatch, end)
    main(["chat", "--url", f"{server.url}/v1"])
    assert server.asked == []


def test_a_turn_that_failed_is_forgotten(server: StubServer, monkeypatch, capsys):
    server.refusal = (400, "too long")
    type_in(monkeypatch, "a novel")
    main(["chat", "--url", f"{server.url}/v1"])
    assert "400: too long" in capsys.readouterr().out
    server.refusal = None
    type_in(monkeypatch, "short")
    main(["chat", "--url", f"{server.url}/v1"])
    assert [message["content"] for message in server.asked[-1]["messages"]] == ["short"]


def test_a_quick_completion_asks_for_as_much_as_told(server: StubServer, capsys):
    main(["complete", "--url", f"{server.url}/v1/", "-q", "Hello", "--max-tokens", "7"])
    assert capsys.readouterr().out == "Bonjour.\n"
    assert (server.asked[0]["prompt"], server.asked[0]["max_tokens"]) == ("Hello", 7)


def test_the_key_is_sent_from_the_option_or_the_environment(server: StubServer, monkeypatch):
    main(["complete", "--url", f"{server.url}/v1", "-q", "x", "--api-key", "k1"])
    monkeypatch.setenv("MINIVLLM_API_KEY", "k2")
    main(["complete", "--url", f"{server.url}/v1", "-q", "x"])
    assert [headers["authorization"] for headers in server.headers] == ["Bearer k1", "Bearer k2"]


def test_a_key_need_not_be_ascii(server: StubServer):
    main(["complete", "--url", f"{server.url}/v1", "-q", "x", "--api-key", "schlüssel"])
    sent = server.headers[0]["authorization"]
    assert sent.encode("latin-1").decode() == "Bearer schlüssel"


def test_a_program_whose_standard_streams_are_closed_gives_their_numbers_to_nothing_else():
    script = (
        "import os, sys; from minivllm.entrypoints.errors import exit_on_error\n"
        "with exit_on_error():\n"
        "    os._exit(7) if os.open('/', os.O_RDONLY) <= 2 else print('to nobody', file=sys.stderr)\n"
        "    raise KeyboardInterrupt"
    )
    command = ["/bin/sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, script]
    assert subprocess.run(command, timeout=60).returncode == 130


def test_no_server_is_said_with_the_remedy(capsys):
    code, line = failed(capsys, "chat", "-q", "x", "--url", "http://127.0.0.1:1/v1")
    assert code == 2
    assert "http://127.0.0.1:1/v1" in line and "minivllm serve" in line
    assert failed(capsys, "chat", "-q", "x", "--url", "localhost:8000")[0] == 2


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"refusal": (404, "The model does not exist")}, "404: The model does not exist"),
        ({"refusal": (401, "no key")}, "--api-key"),
        ({"error": "the engine core died"}, "the engine core died"),
        ({"broken": True}, "before the answer was finished"),
    ],
)
def test_a_server_that_fails_is_quoted(server: StubServer, capsys, fault: dict, reason: str):
    vars(server).update(fault)
    code, line = failed(capsys, "complete", "-q", "x", "--url", f"{server.url}/v1")
    assert code == 1
    assert line.startswith("minivllm: error: ") and reason in line


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("bad\nargument"), 2),
        (ModelFilesError("bad file"), 3),
        (EngineStartError("no core", exit_code=3), 3),
        (KeyboardInterrupt(), 130),
        (ZeroDivisionError("oops"), 1),
    ],
)
def test_every_end_has_a_last_line_and_a_code(capsys, error: BaseException, code: int):
    with pytest.raises(SystemExit) as exit_, exit_on_error():
        raise error
    lines = capsys.readouterr().err.splitlines()
    assert exit_.value.code == code
    assert lines[-1].startswith("minivllm: error: ")
    # A traceback is for errors nobody foresaw.
    assert any("Traceback" in line for line in lines) == isinstance(error, ZeroDivisionError)


def test_an_exit_on_purpose_passes_through():
    with pytest.raises(SystemExit) as exit_, exit_on_error():
        raise SystemExit(0)
    assert exit_.value.code == 0
