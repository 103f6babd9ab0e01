"""What a user installs: the metadata, the two commands, and that one file says the version."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10; pytest brings tomli there
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
SETUP = ROOT / ".ci" / "setup"


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def _requirement(project: dict, name: str) -> str:
    return next(line for line in project["project"]["dependencies"] if re.match(rf"{name}\b", line))


def test_an_installed_torch_is_never_replaced_because_only_its_lower_bound_is_given(project):
    assert re.fullmatch(r"torch>=[\d.]+", _requirement(project, "torch"))


def test_no_dependency_has_an_upper_bound(project):
    extras = project["project"]["optional-dependencies"].values()
    every = project["project"]["dependencies"] + [line for lines in extras for line in lines]
    assert [line for line in every if re.search(r"==|<|~=", line.split(";")[0])] == []


def test_the_build_needs_a_compiler_and_nothing_from_torch(project):
    needed = {re.match(r"[\w-]+", line).group() for line in project["build-system"]["requires"]}
    assert needed == {"scikit-build-core", "nanobind"}


def test_the_version_is_said_once_and_metadata_reads_it_from_there(project):
    from minivllm.version import __version__

    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["scikit-build"]["metadata"]["version"]["input"] == "minivllm/version.py"
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)


def test_the_setup_script_and_the_metadata_agree_on_the_least_torch(project):
    least = re.search(r"^min_torch=(\S+)$", SETUP.read_text(), re.M).group(1)
    assert _requirement(project, "torch") == f"torch>={least}"


def test_the_setup_script_and_the_metadata_agree_on_what_builds(project):
    asked = re.search(r"^    pip_install (\"scikit-build-core.*)$", SETUP.read_text(), re.M).group(1)
    assert shlex.split(asked) == project["build-system"]["requires"]


def test_the_command_names_a_module_that_is_there(project):
    module, function = project["project"]["scripts"]["minivllm"].split(":")
    path = ROOT / (module.replace(".", "/") + ".py")
    assert re.search(rf"^def {function}\(", path.read_text(), re.M)


def test_the_page_at_the_root_lies_in_the_package_that_the_wheel_takes_whole(project):
    assert project["tool"]["scikit-build"]["wheel"]["packages"] == ["minivllm"]
    static = ROOT / "minivllm" / "entrypoints" / "openai" / "playground" / "static"
    files = {path.name for path in static.iterdir()}
    page = (static / "index.html").read_text()
    named = set(re.findall(r'="playground/([\w.]+)"', page))
    for name in [name for name in files if name.endswith(".js")]:
        named |= set(re.findall(r'from "\./([\w.]+)"', (static / name).read_text()))
    assert named | {"index.html"} == files


def _make(*arguments: str) -> str:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    # This test may itself run under `make test ARGS=...`, which hands its variables down.
    handed_down = ("MAKE", "MFLAGS", "MODEL", "PORT", "ARGS", "PYTHON", "TORCH_INDEX")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(handed_down)}
    command = ["make", "-n", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def test_make_serve_without_a_model_names_none():
    plan = _make("serve")
    assert "--model" not in plan
    assert "--port '8000'" in plan


def test_make_serve_passes_model_port_and_arguments_on():
    plan = _make("serve", "MODEL=/models/a b", "PORT=8001", "ARGS=--max-model-len 64 --seed 3")
    assert "--model '/models/a b'" in plan
    assert "--port '8001' --max-model-len 64 --seed 3" in plan


def test_make_test_sets_up_what_tests_use_and_passes_arguments_to_pytest():
    plan = _make("test", "ARGS=-k name")
    assert ".ci/setup test" in plan
    assert "-m pytest -k name\n" in plan


def test_make_test_runs_everything_side_by_side_but_what_one_file_shares_in_one_process():
    assert "-n auto" in _make("test") and "--dist loadfile" in _make("test")


@pytest.mark.parametrize("script", [".ci/run", ".ci/setup"])
def test_scripts_can_be_executed_and_stop_at_the_first_error(script: str):
    path = ROOT / script
    assert path.stat().st_mode & stat.S_IXUSR
    assert re.search(r"^set -eu", path.read_text(), re.M)


# --- the set-up script, in a checkout of its own where nothing is installed yet ---


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A directory with the script alone, and a `bin` to be the whole PATH."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(SETUP, tmp_path / ".ci" / "setup")
    (tmp_path / "bin").mkdir()
    for tool in ("sh", "dirname", "cat", "find", "cksum", "sort", "tail", "mv", "sed", "tr"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    return tmp_path


def _program(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def _set_up(checkout: Path, **variables: str) -> tuple[int, str]:
    environment = {"PATH": str(checkout / "bin"), "HOME": str(checkout), **variables}
    command = [str(checkout / ".ci" / "setup")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


def test_without_a_compiler_it_says_how_to_get_one_before_anything_is_made(checkout: Path):
    code, said = _set_up(checkout)
    assert code == 1
    assert "no C++ compiler" in said
    assert "apt install g++" in said
    assert not (checkout / ".venv").exists()


def test_a_python_that_exists_but_does_not_run_is_passed_over(checkout: Path):
    _program(checkout / "bin" / "g++", "exit 0")
    for name in ("python3", "python3.12"):  # what a version manager leaves behind
        _program(checkout / "bin" / name, "echo 'command not found' >&2; exit 127")
    code, said = _set_up(checkout)
    assert code == 1
    assert "no Python 3.10 to 3.13" in said
    assert "PYTHON=" in said


def test_a_named_python_that_is_unfit_is_refused_by_name(checkout: Path):
    _program(checkout / "bin" / "g++", "exit 0")
    code, said = _set_up(checkout, PYTHON="/nonexistent/python")
    assert code == 1
    assert "PYTHON=/nonexistent/python" in said


def test_a_python_without_ensurepip_is_told_which_package_brings_it(checkout: Path, tmp_path: Path):
    _program(checkout / "bin" / "g++", "exit 0")
    python = shutil.which("python3")
    broken = 'case "$*" in *"import ensurepip"*) exit 1 ;; esac'
    _program(checkout / "bin" / "python3", f'{broken}\nexec "{python}" "$@"')
    code, said = _set_up(checkout, PATH=f"{checkout / 'bin'}{os.pathsep}{os.environ['PATH']}")
    assert code == 1
    assert "ensurepip is missing" in said
    assert re.search(r"apt install python3\.\d+-venv", said)
