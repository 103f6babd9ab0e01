"""What a comparison has found so far: a file of lines, written as they come, and the table made of it.

A run that was cut off is continued with the same file: what it holds is not measured again. Lines are objects:
{"kind": "roofline", …roofline.Roofline}, {"kind": "start", …}, {"kind": "run", …} and {"kind": "failed", "why": …}; the
last three have "cell", "model" and "engine".
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict
from pathlib import Path

import floors
from roofline import Roofline, read_table, table
from works import WORKS


class Results:
    def __init__(self, path: Path) -> None:
        self._path = path
        self.lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def add(self, **line: object) -> None:
        self.lines.append(line)
        with self._path.open("a") as file:
            print(json.dumps(line), file=file)
        self._path.with_suffix(".md").write_text(as_table(self))

    def add_roofline(self, roof: Roofline) -> None:
        self.add(kind="roofline", **asdict(roof))

    def rooflines(self) -> list[Roofline]:
        return [read_table(line) for line in self.lines if line["kind"] == "roofline"]

    def of(self, model: str, cell: str, engine: str) -> list[dict]:
        """Runs and starts."""
        return [line for line in self._of(model, cell) if line["engine"] == engine and line["kind"] != "failed"]

    def failure(self, model: str, cell: str, engine: str) -> str | None:
        for line in self._of(model, cell):
            if line["engine"] == engine and line["kind"] == "failed":
                return line["why"]
        return None

    def engines(self, model: str, cell: str) -> list[str]:
        """Ours first, then as they came."""
        names = list(dict.fromkeys(line["engine"] for line in self._of(model, cell)))
        return sorted(names, key=lambda name: (not name.startswith("ours"), name != "ours"))

    def cells(self) -> list[tuple[Path, str]]:
        """Model directories and cells that have a line, as a reader wants them."""
        seen = dict.fromkeys((line["model"], line["cell"]) for line in self.lines if "cell" in line)
        order = ["start", *WORKS]
        models = list(dict.fromkeys(model for model, _ in seen))
        return [(Path(model), cell) for model in models for cell in order if (model, cell) in seen]

    def _of(self, model: str, cell: str) -> list[dict]:
        return [line for line in self.lines if line.get("cell") == cell and line.get("model") == model]


def median(runs: list[dict], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def as_table(results: Results) -> str:
    """All cells, in Markdown: side by side, then each by itself."""
    parts = [_side_by_side(results, model) for model in dict.fromkeys(model for model, _ in results.cells())]
    for roof in results.rooflines():
        parts.append("```\n" + table(roof) + "\n```\n")
    for model, cell in results.cells():
        parts.append(f"### {cell}, {model.name}\n\n" + "\n".join(_cell(results, model, cell)) + "\n")
    return "\n".join(parts)


def _side_by_side(results: Results, model: Path) -> str:
    """Tokens a second (of starts, seconds), and how many times as fast ours is."""
    cells = [cell for each, cell in results.cells() if each == model]
    engines = list(dict.fromkeys(name for cell in cells for name in results.engines(str(model), cell)))
    lines = [f"| {model.name} | {' | '.join(cells)} |", "|---" * (len(cells) + 1) + "|"]
    for engine in engines:
        lines.append(f"| {engine} | {' | '.join(_short(results, str(model), cell, engine) for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _short(results: Results, model: str, cell: str, engine: str) -> str:
    runs, ours = results.of(model, cell, engine), results.of(model, cell, "ours")
    if not runs:
        return "failed" if results.failure(model, cell, engine) else ""
    key = "seconds" if cell == "start" else "tokens_s"
    value = median(runs, key)
    text = f"{value:.1f} s" if cell == "start" else f"{value:.1f}"
    if cell != "start" and runs[0]["requests"] != WORKS[cell].requests:
        text += f" of {runs[0]['requests']} requests"
    if ours and engine != "ours":
        ratio = value / median(ours, key) if cell == "start" else median(ours, key) / value
        text += f" ({ratio:.2f} ×)"
    return text


def _cell(results: Results, model: Path, cell: str) -> list[str]:
    engines = results.engines(str(model), cell)
    if cell == "start":
        lines = ["| engine | seconds to ready | memory then | peak until then | starts |", "|---|---|---|---|---|"]
        return lines + [_start_row(results, str(model), engine) for engine in engines]
    lines = [
        "| engine | tokens a second, median | least to most | ours is | seconds | first token p50, p99 ms | "
        "between tokens p50, p99 ms | µs of processor a token | memory MB | runs |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    ours = results.of(str(model), cell, "ours")
    lines += [_row(results, str(model), cell, engine, ours) for engine in engines]
    roofs = results.rooflines()
    if roofs:
        for format in floors.FORMATS:
            runs = results.of(str(model), cell, "ours" if format == "bf16" else f"ours-{format}")
            if runs or format != "int4":  # which is measured only where somebody names it
                seconds = median(runs, "seconds") if runs else None
                lines += ["", *floors.of_cell(cell, model, floors.best(roofs), floors.FORMATS[format], seconds)]
    return lines


def _start_row(results: Results, model: str, engine: str) -> str:
    starts = results.of(model, "start", engine)
    if not starts:
        return f"| {engine} | {results.failure(model, 'start', engine)} | | | |"
    memory, peak = median(starts, "memory_mb"), median(starts, "peak_mb")
    return f"| {engine} | {median(starts, 'seconds'):.2f} | {memory:.0f} MB | {peak:.0f} MB | {len(starts)} |"


def _row(results: Results, model: str, cell: str, engine: str, ours: list[dict]) -> str:
    runs, why = results.of(model, cell, engine), results.failure(model, cell, engine)
    if not runs:
        return f"| {engine} | {why} | | | | | | | | 0 |"
    rate = median(runs, "tokens_s")
    rates = [run["tokens_s"] for run in runs]
    spread = f"{min(rates):.1f} to {max(rates):.1f}"
    ratio = f"{median(ours, 'tokens_s') / rate:.2f} ×" if ours and engine != "ours" else ""

    def both(key: str) -> str:
        if f"{key}_p50" not in runs[0]:
            return ""
        return f"{median(runs, f'{key}_p50'):.1f}, {median(runs, f'{key}_p99'):.1f}"

    count = str(len(runs))
    if runs[0]["requests"] != WORKS[cell].requests:
        count += f", of {runs[0]['requests']} of the {WORKS[cell].requests} requests"
    if why:
        count += f"; then {why}"
    return (
        f"| {engine} | {rate:.1f} | {spread} | {ratio} | {median(runs, 'seconds'):.2f} | {both('first_ms')} | "
        f"{both('inter_ms')} | {median(runs, 'us_a_token'):.0f} | {median(runs, 'memory_mb'):.0f} | {count} |"
    )
