"""Templates that a request brings, rendered in a process of its own: with little memory, and little time.

The process reads {"template", "messages", "options"} and writes {"text"} or {"refusal"}, as JSON. It ends with each
rendering: a template may loop for ever or ask for all memory there is, sandboxed as it is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

MAX_TEMPLATE_CHARS = 1 << 17
WALL_S = 5.0  # to start Python takes a tenth of a second, on a busy machine longer
CPU_S = 2
MEMORY_BYTES = 512 << 20  # of address space, of which Python itself takes a good part


def render_apart(template: str, messages: list[dict[str, Any]], **options: Any) -> str:
    """As `chat_template.render`. Blocks its thread while it waits.

    Raises:
        TemplateRefusal: as there; or it takes too long, or too much memory.
    """
    from minivllm.tokenizer.chat_template import TemplateRefusal

    if len(template) > MAX_TEMPLATE_CHARS:
        raise TemplateRefusal(f"it has {len(template)} characters; at most {MAX_TEMPLATE_CHARS} fit")
    package = Path(__file__).resolve().parents[2]
    job = json.dumps({"template": template, "messages": messages, "options": options}).encode()
    try:
        done = subprocess.run(
            [sys.executable, "-c", "from minivllm.tokenizer.template_process import main; main()"],
            input=job,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=WALL_S,
            cwd="/",
            env={"PYTHONPATH": str(package), "PATH": os.environ.get("PATH", "")},
        )
    except subprocess.TimeoutExpired:
        raise TemplateRefusal(f"it takes longer than {WALL_S:g} s") from None
    if done.returncode != 0:
        raise TemplateRefusal(f"it takes more than {CPU_S} s or {MEMORY_BYTES >> 20} MiB")
    answer = json.loads(done.stdout)
    if "refusal" in answer:
        raise TemplateRefusal(answer["refusal"])
    return answer["text"]


def main() -> None:
    """The process: limits first, then the work."""
    import resource

    from minivllm.tokenizer.chat_template import TemplateRefusal, render

    job = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    try:
        answer = {"text": render(job["template"], job["messages"], **job["options"])}
    except TemplateRefusal as error:
        if isinstance(error.__cause__, MemoryError):
            raise SystemExit(1) from None
        answer = {"refusal": str(error)[:1000]}
    json.dump(answer, sys.stdout)
