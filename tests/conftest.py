"""Fixtures every test may use: tiny seeded checkpoints, made once a session, and the size of the long walks."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXIT_STATUS = pytest.StashKey[int]()
sys.path.insert(0, str(ROOT / "examples"))

# No test may reach for a hub: what is not on disk must fail at once.
os.environ["HF_HUB_OFFLINE"] = "1"
# Nor for a card: there engines that say nothing would run on it, by other defaults. `python -m tests.gpu` checks one.
os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[EXIT_STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """End without taking Python apart where Triton is loaded: its library would print a page about objects it leaks."""
    if "triton._C.libtriton" in sys.modules and EXIT_STATUS in config.stash:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.stash[EXIT_STATUS])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--walk-steps", type=int, default=5000, help="length of the random walks (default 5000)")


@pytest.fixture
def caplog(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """pytest's, which hears `minivllm` also where an earlier test configured its logger, which then tells no root."""
    logger = logging.getLogger("minivllm")
    told, logger.propagate = logger.propagate, False
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.propagate = told


@pytest.fixture
def short_path() -> Iterator[Path]:
    """An empty directory for sockets: the paths of those may not be as long as the ones below `tmp_path` become."""
    with tempfile.TemporaryDirectory(prefix="mv") as directory:
        yield Path(directory)


@pytest.fixture(scope="session")
def walk_steps(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("--walk-steps")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 Qwen3-shape checkpoint of about 1 MB with its tokenizer and chat template."""
    from make_random_model import make_model

    return make_model(tmp_path_factory.mktemp("models") / "tiny-qwen3", arch="qwen3", seed=1)
