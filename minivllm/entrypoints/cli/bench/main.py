"""`minivllm bench COMMAND`: the table of benchmarks."""

from __future__ import annotations

COMMANDS = {
    "latency": ("minivllm.entrypoints.cli.bench.latency", "one batch, again and again, in this process"),
    "throughput": ("minivllm.entrypoints.cli.bench.throughput", "many requests at once, in this process"),
    "serve": ("minivllm.entrypoints.cli.bench.serve", "load on a running server"),
}
NOT_YET = ("startup", "sweep", "mm-processor")
