"""An engine's processes, as a whole: started in a session of their own, paused, weighed and ended together.

Nothing an engine starts outlives whoever started it: `Processes.end` ends the whole session, and where the starter is
killed too suddenly for that, a guard does, a small process that does nothing else than wait for the starter's end
(`python benchmarks/processes.py`, which reads session numbers from stdin).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil


class Guard:
    """Ends the sessions it was told of when this process is gone, whatever ended it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__))], stdin=subprocess.PIPE, text=True, start_new_session=True
        )

    def watch(self, session: int) -> None:
        print(session, file=self._process.stdin, flush=True)


class Processes:
    """One command, and all it starts."""

    def __init__(
        self,
        command: list[str],
        env: dict[str, str],
        log: Path,
        *,
        guard: Guard | None = None,
        talks: bool = False,
    ) -> None:
        """talks: it has stdin and stdout as pipes; else both its outputs go to `log`, as stderr always does."""
        with log.open("ab") as out:
            self.root = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
                stdout=subprocess.PIPE if talks else out,
                stderr=out,
                env=os.environ | env,
                start_new_session=True,
            )
        if guard is not None:
            guard.watch(self.root.pid)

    def members(self) -> list[psutil.Process]:
        """Those alive: of the session, and what the root has below it elsewhere."""
        found = {process.pid: process for process in of_session(self.root.pid)}
        try:
            for child in psutil.Process(self.root.pid).children(recursive=True):
                found[child.pid] = child
        except psutil.NoSuchProcess:
            pass
        return list(found.values())

    def pause(self) -> None:
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        self._send(signal.SIGCONT)

    def _send(self, number: int) -> None:
        for process in self.members():
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                pass

    def memory_mb(self) -> float:
        """Proportional set size of all of them."""
        return sum(process.memory_full_info().pss for process in self.members()) / 1e6

    def peak_mb(self) -> float:
        """The most each has held resident, added up; what they share counts more than once."""
        peaks = 0
        for process in self.members():
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM"):
                    peaks += int(line.split()[1])
        return peaks / 1e3 * 1.024

    def cpu_seconds(self) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in self.members())

    def settle(self, limit_s: float) -> None:
        """Wait until it has hardly worked for a second: what it does after its start is not to be measured."""
        end, before = time.monotonic() + limit_s, self.cpu_seconds()
        while time.monotonic() < end:
            time.sleep(1)
            now = self.cpu_seconds()
            if now - before < 0.1:
                return
            before = now

    def end(self) -> None:
        """Ask, wait ten seconds, then kill whatever is left."""
        members = self.members()
        self.resume()
        if self.root.poll() is None:
            self.root.terminate()
            try:
                self.root.wait(10)
            except subprocess.TimeoutExpired:
                pass
        kill([*members, *of_session(self.root.pid)])
        self.root.wait()
        for pipe in (self.root.stdin, self.root.stdout):
            if pipe is not None:
                pipe.close()


def of_session(session: int) -> list[psutil.Process]:
    found = []
    for pid in psutil.pids():
        try:
            if os.getsid(pid) == session:
                found.append(psutil.Process(pid))
        except (ProcessLookupError, PermissionError, psutil.NoSuchProcess):
            pass
    return [process for process in found if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        try:
            process.kill()  # refused by psutil where the number is another process's by now
        except psutil.NoSuchProcess:
            pass


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sessions = [int(line) for line in sys.stdin]  # until whoever writes it is gone
    for session in sessions:
        kill(of_session(session))


if __name__ == "__main__":
    main()
