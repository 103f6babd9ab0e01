"""Each request of a run as a bar over time: waiting for its first token, then generating. A page without scripts."""

from __future__ import annotations

import html
from collections.abc import Iterable
from pathlib import Path

from minivllm.entrypoints.cli.bench.stream_client import Answer
from minivllm.exceptions import ConfigError

WIDTH = 1000  # of the drawing, in pixels
ROW = 10  # of a request
WAITING, GENERATING, FAILED = "#f0b429", "#2680c2", "#d64545"


def write_timeline(path: Path, answers: Iterable[Answer]) -> None:
    """Draw a run.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(timeline(list(answers)), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def timeline(answers: list[Answer]) -> str:
    """The page: a row a request, in the order they were sent, each bar with its numbers as a tooltip."""
    begin = min((answer.start for answer in answers), default=0.0)
    end = max((answer.start + answer.latency_s for answer in answers), default=0.0)
    scale = WIDTH / max(end - begin, 1e-9)
    rows = [_row(i, answer, (answer.start - begin) * scale, scale) for i, answer in enumerate(answers)]
    ticks = [
        f'<text x="{WIDTH * part / 4:.0f}" y="12" font-size="11">{(end - begin) * part / 4:.2f} s</text>'
        for part in range(5)
    ]
    height = 20 + ROW * len(answers)
    return (
        "<!doctype html><meta charset=utf-8><title>timeline</title>"
        f"<p>{len(answers)} requests; waiting for the first token, then generating; failed ones red.</p>"
        f'<svg width="{WIDTH + 60}" height="{height}" font-family="sans-serif">{"".join(ticks + rows)}</svg>\n'
    )


def _row(index: int, answer: Answer, left: float, scale: float) -> str:
    y = 20 + ROW * index
    tip = f"request {index}: {answer.prompt_len} tokens in, {answer.num_output_tokens} out"
    if answer.error is not None:
        bars = _bar(left, y, max(answer.latency_s * scale, 3), FAILED)
        tip += f", {answer.error[:200]}"
    else:
        wait = answer.first_token_s * scale
        bars = _bar(left, y, wait, WAITING) + _bar(left + wait, y, answer.latency_s * scale - wait, GENERATING)
        tip += f", first after {answer.first_token_s:.3f} s, all after {answer.latency_s:.3f} s"
    return f"<g><title>{html.escape(tip)}</title>{bars}</g>"


def _bar(x: float, y: int, width: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y}" width="{max(width, 0.5):.1f}" height="{ROW - 2}" fill="{colour}"/>'
