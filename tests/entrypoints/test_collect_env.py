"""The environment report: complete, quick to read, and silent about secrets."""

from __future__ import annotations

import subprocess
import sys

from minivllm import envs
from minivllm.entrypoints.cli.collect_env import collect, render
from minivllm.version import __version__


def test_the_report_names_the_version_the_processor_and_every_variable():
    report = collect()
    assert report["minivllm"]["version"] == __version__
    assert "native extension" in report["minivllm"]
    assert report["processor"]["model"]
    assert set(report["environment"]) == set(envs.VARIABLES)
    assert "torch" in render(report)


def test_a_key_is_reported_as_set_and_never_shown(monkeypatch):
    monkeypatch.setenv("MINIVLLM_API_KEY", "correct horse battery staple")
    report = collect()
    assert report["environment"]["MINIVLLM_API_KEY"] == "set"
    assert "horse" not in render(report)


def test_the_report_is_made_without_importing_torch():
    code = (
        "import sys; from minivllm.entrypoints.cli import collect_env; collect_env.main();"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
