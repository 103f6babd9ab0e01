"""Who may import whom. The table is the architecture: a new arrow is a decision, made here."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "minivllm"

# What everything may use. Each may use those before it.
BOTTOM = [
    "exceptions", "envs", "version", "logger", "utils", "sampling_params", "logits_processors", "outputs", "config",
    "messages",
]

# package -> what else it may import
ALLOWED: dict[str, set[str]] = {
    "platforms": set(),
    "ops": {"platforms"},
    "attention": {"ops", "platforms"},
    "layers": {"attention", "ops", "platforms"},
    "models": {"layers", "attention", "ops", "platforms"},
    "sample": {"ops", "platforms"},
    "worker": {"models", "layers", "attention", "ops", "sample", "platforms"},
    "executor": {"worker"},
    "core": set(),
    "tokenizer": set(),
    "metrics": set(),
    "tracing": set(),
    "structured_output": {"tokenizer"},
    "tool_parsers": set(),
    "reasoning": {"tool_parsers"},
    "engine": {"core", "executor", "tokenizer", "models", "reasoning", "structured_output"},
    "entrypoints": {"engine", "tokenizer", "metrics", "tracing", "tool_parsers", "reasoning"},
}

# `engine` is two sides in one folder: these modules run in the core process, the rest in the client.
CORE_SIDE = {"engine.core", "engine.core_process", "engine.plans_in_flight"}
# The one name of `models` a client may see: the table of architectures, which imports no torch.
REGISTRY = "models.registry"

TORCH_FREE = [
    "minivllm",
    "minivllm.entrypoints.openai.api_server",
    "minivllm.entrypoints.cli.main",
    "minivllm.core.sched.scheduler",
    "minivllm.engine.async_llm",
    "minivllm.engine.llm_engine",
    "minivllm.engine.arg_utils",
    "minivllm.messages.engine",
    "minivllm.messages.worker",
    "minivllm.logits_processors",
    "minivllm.models.registry",
    "minivllm.structured_output.check_process",
    "minivllm.structured_output.manager",
    "minivllm.utils.native",
]


def _modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py"))


def _name(path: Path) -> str:
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


def _imports(path: Path) -> set[str]:
    """Modules of ours that a file imports anywhere, functions included, without `if TYPE_CHECKING:` blocks."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "minivllm":
            base = node.module.removeprefix("minivllm").lstrip(".")
            if not base:
                found.update(alias.name for alias in node.names)
                continue
            found.add(base)
        elif isinstance(node, ast.Import):
            found.update(a.name.removeprefix("minivllm.") for a in node.names if a.name.startswith("minivllm."))
    return found


def _violations() -> list[str]:
    wrong = []
    for path in _modules():
        name = _name(path)
        if not name:
            continue
        here = name.split(".")[0]
        for target in sorted(_imports(path)):
            there = target.split(".")[0]
            if there == here or there.startswith("_"):
                continue
            if there in BOTTOM:
                if here in BOTTOM and BOTTOM.index(there) > BOTTOM.index(here):
                    wrong.append(f"{name} imports {target}: upward among the shared modules")
                continue
            if there not in ALLOWED.get(here, set()):
                wrong.append(f"{name} imports {target}: {here} may not import {there}")
            elif here == "engine" and there in ("core", "executor") and name not in CORE_SIDE:
                wrong.append(f"{name} imports {target}: only {sorted(CORE_SIDE)} are on the core's side")
            elif here == "engine" and there == "models" and target != REGISTRY:
                wrong.append(f"{name} imports {target}: a client may see only {REGISTRY}")
    return wrong


def test_every_import_follows_the_table():
    assert _violations() == []


def test_each_extension_has_one_door():
    assert [_name(path) for path in _modules() if "_native" in _imports(path)] == ["utils.native"]
    assert [_name(path) for path in _modules() if "_cuda" in _imports(path)] == ["ops.cuda"]


def test_the_table_has_no_cycle():
    visiting: list[str] = []

    def visit(package: str) -> None:
        assert package not in visiting, f"cycle: {visiting} -> {package}"
        visiting.append(package)
        for target in ALLOWED[package]:
            visit(target)
        visiting.pop()

    for package in ALLOWED:
        visit(package)


def test_every_package_is_in_the_table():
    packages = {p.name for p in PACKAGE.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert packages <= set(ALLOWED) | set(BOTTOM)


def test_package_inits_are_empty_but_the_top_one():
    filled = [p for p in PACKAGE.rglob("__init__.py") if p.parent != PACKAGE and p.read_text().strip()]
    assert filled == []


@pytest.mark.parametrize("module", TORCH_FREE)
def test_importing_it_leaves_torch_out(module: str):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
