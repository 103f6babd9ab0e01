"""Seconds from process start to /health 200, and the memory of each process then and at most until then.

    python benchmarks/startup.py --model DIR [--runs 5] [server arguments …]

Also how long SIGTERM takes. Everything listens on loopback.
"""

from __future__ import annotations

import argparse
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request

import psutil


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_healthy(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health").status == 200
    except (urllib.error.URLError, ConnectionError):
        return False


def peak_mb(pid: int) -> float:
    """The most it has held resident."""
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024 / 1e6


def one_run(model: str, server_args: list[str]) -> tuple[float, float, list[float], list[float]]:
    """Seconds to healthy, seconds to end, resident megabytes of the server and its children, and their peaks."""
    port = free_port()
    command = [sys.executable, "-m", "minivllm.entrypoints.openai.api_server", "--model", model]
    command += ["--host", "127.0.0.1", "--port", str(port), *server_args]
    began = time.monotonic()
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not is_healthy(port):
        if server.poll() is not None:
            sys.exit(f"the server exited with {server.returncode}: run {' '.join(command)} to see why")
        time.sleep(0.01)
    to_healthy = time.monotonic() - began
    processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    megabytes = [process.memory_info().rss / 1e6 for process in processes]
    peaks = [peak_mb(process.pid) for process in processes]
    began = time.monotonic()
    server.send_signal(signal.SIGTERM)
    server.wait()
    return to_healthy, time.monotonic() - began, megabytes, peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--runs", type=int, default=5)
    args, server_args = parser.parse_known_args()
    runs = []
    for _ in range(args.runs):
        runs.append(one_run(args.model, server_args))
        to_healthy, to_end, megabytes, peaks = runs[-1]
        sizes, most = (", ".join(f"{size:.0f}" for size in each) for each in (megabytes, peaks))
        print(
            f"healthy after {to_healthy:.2f} s, ended {to_end:.2f} s after SIGTERM, "
            f"resident MB {sizes}, at most {most}",
            flush=True,
        )
    times = [run[0] for run in runs]
    print(f"to healthy: median {statistics.median(times):.2f} s, {min(times):.2f} to {max(times):.2f}")


if __name__ == "__main__":
    main()
