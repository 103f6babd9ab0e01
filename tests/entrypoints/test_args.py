"""The command line: made from the config classes, and helpful when it is wrong."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from minivllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from minivllm.entrypoints.openai.cli_args import make_arg_parser, validate_args
from minivllm.exceptions import ConfigError
from minivllm.utils.box_model import box_model_path

ROOT = Path(__file__).resolve().parents[2]


def parse(*args: str) -> Namespace:
    return make_arg_parser().parse_args(["some/model", *args])


def last_line(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What is printed when these arguments end the program with code 2."""
    with pytest.raises(SystemExit) as exit_:
        parse(*args)
    assert exit_.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_the_defaults_are_those_of_the_config_classes():
    assert AsyncEngineArgs.from_cli_args(parse()) == AsyncEngineArgs()


def test_types_follow_the_fields():
    args = parse(
        "--max-model-len", "1k", "--kv-cache-memory-bytes", "64Mi", "--gpu-memory-utilization", "0.5",
        "--no-enable-prefix-caching", "--enforce-eager", "--dtype", "bfloat16", "--hf-overrides", '{"vocab_size": 7}',
        "--served-model-name", "a", "b", "--seed", "-5",
    )  # fmt: skip
    assert args.max_model_len == 1000
    assert args.kv_cache_memory_bytes == 64 << 20
    assert args.gpu_memory_utilization == 0.5
    assert (args.enable_prefix_caching, args.enforce_eager) == (False, True)
    assert args.hf_overrides == {"vocab_size": 7}
    assert args.served_model_name == ["a", "b"]
    assert args.seed == -5


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("-1", -1), ("2K", 2048)])
def test_the_length_may_be_a_word_or_a_size(text: str, value: int | str):
    assert parse("--max-model-len", text).max_model_len == value
    assert parse(f"--max-model-len={text}").max_model_len == value


def test_underscores_are_as_good_as_dashes():
    assert parse("--max_model_len", "5").max_model_len == 5
    assert parse("--max_model-len=5").max_model_len == 5
    assert parse("--no_enable_chunked_prefill").enable_chunked_prefill is False


def test_an_object_may_be_given_by_its_parts():
    args = parse("--hf-overrides", '{"a": {"b": 1}}', "--hf_overrides.a.c_d", "[1]", "--hf-overrides.l+", "x,2")
    assert args.hf_overrides == {"a": {"b": 1, "c_d": [1]}, "l": ["x", 2]}
    assert parse("--hf-overrides.l+=x", "--hf-overrides.l+", "y").hf_overrides == {"l": ["x", "y"]}
    assert parse().hf_overrides == {}


def test_a_repeatable_list_grows():
    assert parse("--middleware", "a.B", "--middleware", "c.D", "e.F").middleware == ["a.B", "c.D", "e.F"]


def test_a_file_holds_options_and_the_command_line_wins(tmp_path: Path):
    path = tmp_path / "options.yaml"
    path.write_text(
        "model: theirs\nmax_model_len: 1k\nserved-model-name: [a, b]\nenable-prefix-caching: false\n"
        "hf-overrides: {x: 1}\nport: 9\nseed: null\nallow-credentials: true\n"
    )
    args = parse("--config", str(path), "--port", "7", "--hf-overrides.y", "2")
    assert (args.max_model_len, args.served_model_name, args.enable_prefix_caching) == (1000, ["a", "b"], False)
    assert (args.port, args.hf_overrides, args.allow_credentials) == (7, {"x": 1, "y": 2}, True)
    assert (args.model_tag, args.model) == ("some/model", "theirs")
    validate_args(args)
    assert args.model == "some/model"
    only_file = make_arg_parser().parse_args([f"--config={path}"])
    validate_args(only_file)
    assert only_file.model == "theirs"
    assert parse(f"--config={path}", "--enable-prefix-caching").enable_prefix_caching is True


@pytest.mark.parametrize(
    ("text", "names"),
    [("max-modle-len: 5", "did you mean --max-model-len"), ("tensor-parallel-size: 4", "--tensor-parallel-size"),
     ("- a", "one option a line"), ("port: http", "--port"), ("a: [", "cannot be read")],
)  # fmt: skip
def test_a_wrong_file_is_refused(capsys, tmp_path: Path, text: str, names: str):
    (tmp_path / "options.yaml").write_text(text)
    assert names in last_line(capsys, "--config", str(tmp_path / "options.yaml"))


def test_a_list_may_be_words_or_json():
    assert parse("--allowed-origins", '["http://a", "http://b"]').allowed_origins == ["http://a", "http://b"]
    assert parse("--allowed-origins", "http://a").allowed_origins == ["http://a"]


def test_a_list_of_numbers_is_one_of_numbers(tmp_path: Path, capsys):
    for words in (["1", "2", "8"], ["[1, 2, 8]"]):
        assert parse("--cudagraph-capture-sizes", *words).cudagraph_capture_sizes == [1, 2, 8]
    (tmp_path / "options.yaml").write_text("cudagraph-capture-sizes: [1, 2, 8]")
    assert parse("--config", str(tmp_path / "options.yaml")).cudagraph_capture_sizes == [1, 2, 8]
    for words in (["1", "two"], ['["1"]'], ["[1.5]"]):
        assert "whole numbers" in last_line(capsys, "--cudagraph-capture-sizes", *words)


def test_a_short_name_of_an_object_may_be_given_by_its_parts_too():
    for option in ("-cc", "--compilation-config", "--compilation_config"):
        args = parse(f"{option}.cudagraph_mode=NONE", f"{option}.mode", "0")
        assert args.compilation_config == {"cudagraph_mode": "NONE", "mode": 0}


def test_logits_processors_are_names_or_classes_and_are_looked_for_at_once(tiny_model: Path):
    from tests.sample.processors import NthToken, Sharpen

    names = [f"tests.sample.processors:{name}" for name in ("NthToken", "Sharpen")]
    assert parse("--logits-processors", *names).logits_processors == names
    for given in (names, [NthToken, Sharpen], [names[0], Sharpen]):
        config = EngineArgs(str(tiny_model), logits_processors=given).create_engine_config()
        assert config.model.logits_processors == names
    for wrong in ("nowhere_at_all:X", "no_class", "__main__:X"):
        with pytest.raises(ConfigError, match="logits_processors"):
            EngineArgs(str(tiny_model), logits_processors=[wrong]).create_engine_config()


def test_defaults_that_are_lists_are_not_shared():
    parse().allowed_origins.append("x")
    assert parse().allowed_origins == ["*"]


def test_a_misspelt_option_is_answered_with_the_nearest(capsys):
    line = last_line(capsys, "--max-modle-len", "5")
    assert line == "minivllm: error: unknown option --max-modle-len; did you mean --max-model-len?"


@pytest.mark.parametrize("option", ["--quantization", "-q"])
def test_a_quantization_that_is_not_served_is_refused_by_its_name(capsys, option: str):
    line = last_line(capsys, option, "awq")
    assert "--quantization" in line and "'awq'" in line and "int8" in line


def test_an_abbreviated_option_is_refused(capsys):
    assert "--max-model-l;" in last_line(capsys, "--max-model-l", "5")


@pytest.mark.parametrize(
    "args",
    [
        ["--tensor-parallel-size", "2"], ["--tensor_parallel_size=2"], ["-tp", "2"], ["--enable-lora"],
        ["--lora-dtype", "auto"], ["--tool-server", "demo"],
    ],
)  # fmt: skip
def test_an_option_of_vllm_that_is_not_here_yet_is_refused_by_its_name(capsys, args: list[str]):
    line = last_line(capsys, *args)
    assert args[0].split("=")[0] in line
    assert "does not support yet" in line


@pytest.mark.parametrize(
    "args",
    [["--tensor-parallel-size", "1"], ["--tensor-parallel-size=1"], ["-tp", "1"], ["--no-async-scheduling"],
     ["--disable-log-requests"], ["--kv-cache-dtype", "auto"]],
)  # fmt: skip
def test_an_option_that_asks_for_nothing_is_ignored_without_its_neighbours(args: list[str]):
    parsed = make_arg_parser().parse_args([*args, "some/model", "--port", "9"])
    assert (parsed.model_tag, parsed.port) == ("some/model", 9)


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (["--dtype", "int3"], ["--dtype", "int3", "bfloat16"]),
        (["--port", "http"], ["--port", "http"]),
        (["--hf-overrides", "vocab_size=7"], ["--hf-overrides", "not JSON"]),
        (["--hf-overrides", "[1]"], ["--hf-overrides", "JSON object"]),
        (["--gpu-memory-utilization", "half"], ["--gpu-memory-utilization", "half"]),
        (["--allowed-origins", "[1]"], ["--allowed-origins", "strings"]),
        (["another/model"], ["another/model"]),
    ],
)
def test_a_wrong_value_is_named_with_its_option(capsys, args: list[str], names: list[str]):
    line = last_line(capsys, *args)
    assert line.startswith("minivllm: error: ")
    assert [name for name in names if name not in line] == []


def validated(*args: str) -> Namespace:
    parsed = make_arg_parser().parse_args(list(args))
    validate_args(parsed)
    return parsed


def test_the_model_may_be_given_either_way():
    assert validated("m").model == validated("--model", "m").model == validated("m", "--model", "m").model == "m"


def test_without_a_model_the_one_in_the_box_is_served_under_its_name():
    model = EngineArgs().create_engine_config().model
    assert (Path(model.model), model.served_model_name) == (box_model_path(), ["minnow"])
    assert EngineArgs(served_model_name=["mine"]).create_engine_config().model.served_model_name == ["mine"]


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["m", "--model", "n"], "two models"),
        (["m", "--port", "65536"], "--port"),
        (["m", "--shutdown-timeout", "-1"], "--shutdown-timeout"),
        (["m", "--api-key", ""], "--api-key"),
        (["m", "--root-path", "api"], "--root-path"),
        (["m", "--chat-template", "no/such/file"], "no/such/file"),
        (["m", "--middleware", "no.such.Thing"], "no.such.Thing"),
        (["m", "--middleware", "json.dumps"], "neither a class"),
        (["m", "--ssl-keyfile", "k"], "--ssl-certfile"),
        (["m", "--ssl-certfile", "no/such.pem"], "no/such.pem"),
        (["m", "--ssl-certfile", __file__], "TLS"),
        (["m", "--ssl-cert-reqs", "3"], "--ssl-cert-reqs"),
        (["m", "--enable-log-outputs"], "--enable-log-requests"),
        (["m", "--sse-keep-alive-interval", "-1"], "--sse-keep-alive-interval"),
        (["m", "--h11-max-header-count", "0"], "--h11-max-header-count"),
        (["m", "--uds", ""], "--uds"),
    ],
)
def test_what_the_front_end_can_see_is_checked_at_once(args: list[str], reason: str):
    with pytest.raises(ConfigError, match=reason):
        validated(*args)


def test_a_chat_template_may_be_text_or_a_file(tmp_path: Path):
    path = tmp_path / "template.jinja"
    path.write_text("{{ messages }}")
    assert validated("m", "--chat-template", str(path)).chat_template == str(path)
    assert validated("m", "--chat-template", "{{ messages }}").chat_template == "{{ messages }}"


def test_short_help_fits_a_screen_and_long_help_has_everything():
    parser = make_arg_parser()
    short, long = parser.help_about(""), parser.help_about("all")
    assert len(short.splitlines()) <= 60
    assert "--port" in short and "--override-generation-config" not in short
    for action in parser._actions:
        assert all(option in long for option in action.option_strings)
    assert "MINIVLLM_RUN_DIR" in long


def test_help_can_be_asked_about_a_group_or_a_word():
    parser = make_arg_parser()
    assert "--block-size" in parser.help_about("CacheConfig")
    assert "--port" not in parser.help_about("CacheConfig")
    assert "--port" in parser.help_about("frontend")
    assert "--kv-cache-memory-bytes" in parser.help_about("kv_cache")
    assert "no option" in parser.help_about("quux")


@pytest.mark.parametrize("args", [["serve", "--help"], ["bench", "serve", "--help"], ["--help"], ["--version"]])
def test_help_does_not_import_torch_or_the_web_framework(args: list[str]):
    code = (
        "import sys\nfrom minivllm.entrypoints.cli.main import main\n"
        f"try:\n    main({args})\nexcept SystemExit as e:\n    assert not e.code\n"
        "sys.exit('torch' in sys.modules or 'fastapi' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_a_misspelt_keyword_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="max_modle_len; did you mean max_model_len"):
        EngineArgs("m", max_modle_len=5)


def test_a_keyword_of_vllm_that_is_not_here_yet_is_refused():
    with pytest.raises(ConfigError, match="tensor_parallel_size=2 .* does not support yet"):
        EngineArgs("m", tensor_parallel_size=2)
    assert EngineArgs("m", tensor_parallel_size=1, quantization=None) == EngineArgs("m")


def test_a_misspelt_variable_of_ours_is_answered_with_the_nearest(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MINIVLLM_CPU_IS", "avx2")
    with pytest.raises(ConfigError, match="MINIVLLM_CPU_IS is unknown; did you mean MINIVLLM_CPU_ISA"):
        validate_args(make_arg_parser().parse_args(["some/model"]))


@pytest.mark.parametrize("as_file", [True, False])
def test_a_broken_chat_template_is_refused_with_the_reason(tmp_path: Path, as_file: bool):
    template = "{% if %}"
    if as_file:
        (tmp_path / "template.jinja").write_text(template)
        template = str(tmp_path / "template.jinja")
    with pytest.raises(ConfigError, match=r"--chat-template.* is not a Jinja template: .*line 1"):
        validate_args(make_arg_parser().parse_args(["some/model", "--chat-template", template]))


MODULES = [
    (["a=/x"], ["--lora-modules: LoRA adapters are not served yet (a)"]),
    (["a=/x=y", '{"name": "b", "path": "/y", "base_model_name": "m"}'], ["not served yet (a, b)"]),
    (["a"], ["--lora-modules a: write name=path"]),
    (["=x"], ["neither name nor path may be empty"]),
    (["a="], ["neither name nor path may be empty"]),
    (["a=x", "a=y"], ["--lora-modules a=y: the name a is used already"]),
    (["some/model=x"], ["the name some/model is used already"]),
    (['{"name": "a"}'], ["missing required field path"]),
    (['{"name": "a", "path": 3}'], ["Expected str, got int", "$.path"]),
    (['{"name": "a", "path": "x", "rank": 8}'], ["unknown field rank"]),
    (['{"name": "a", '], ["Expecting"]),
]


@pytest.mark.parametrize(("values", "says"), MODULES)
def test_adapters_are_read_and_then_refused(values: list[str], says: list[str]):
    args = parse("--lora-modules", *values)
    assert args.lora_modules == values
    with pytest.raises(ConfigError) as refusal:
        validate_args(args)
    assert all(each in str(refusal.value) for each in says), refusal.value


def test_prompt_adapters_are_pairs_and_share_the_names():
    cases = ((["a=/x"], "not served yet (a)"), (["{}"], "write name=path"), (["a=x", "a=y"], "used already"))
    for values, says in cases:
        with pytest.raises(ConfigError, match="--prompt-adapters") as refusal:
            validate_args(parse("--prompt-adapters", *values))
        assert says in str(refusal.value)
    both = parse("--prompt-adapters", "a=x", "--lora-modules", "a=y")
    with pytest.raises(ConfigError, match="--prompt-adapters a=x: the name a is used already"):
        validate_args(both)


AUTO = ["--enable-auto-tool-choice", "--tool-call-parser"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--tool-strict-level", "parameter", *AUTO, "pythonic"], "needs a --tool-call-parser whose calls begin"),
        (["--tool-strict-level", "function", "--tool-call-parser", "hermes"], "add --enable-auto-tool-choice"),
        (["--tool-strict-level", "function"], "add --enable-auto-tool-choice"),
        (["--api-server-count", "2", "--enable-dev-endpoints"], "--enable-dev-endpoints needs --api-server-count 1"),
        (["--api-server-count", "2", "--profiler-config.torch_profiler_dir", "x"],
         "--profiler-config needs --api-server-count 1"),
    ],
)  # fmt: skip
def test_what_would_have_no_effect_is_refused_before_the_model_is_loaded(given: list[str], says: str):
    with pytest.raises(ConfigError, match=says):
        validate_args(parse(*given))


def test_a_level_that_the_parser_can_hold_is_taken():
    validate_args(parse("--tool-strict-level", "parameter", *AUTO, "hermes"))
    validate_args(make_arg_parser().parse_args([str(box_model_path()), "--tool-strict-level", "function"]))


def test_a_server_asked_for_one_process_says_that_it_has_two_and_starts(caplog: pytest.LogCaptureFixture):
    validate_args(parse("--disable-frontend-multiprocessing"))
    assert "--disable-frontend-multiprocessing changes nothing here" in caplog.text


def test_development_endpoints_by_the_environment_need_one_server_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    with pytest.raises(ConfigError, match="VLLM_SERVER_DEV_MODE needs --api-server-count 1"):
        validate_args(parse("--api-server-count", "2"))
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "0")
    validate_args(parse("--api-server-count", "2"))
