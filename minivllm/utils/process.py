"""Starting a child process, tying its life to ours, and saying how it died.

Owns what is the same for every child: the spawn, the death of the parent, signals by name. Knows
nothing of what the child does.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import types
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_spawn_lock = threading.Lock()


def spawn(target: Callable[..., None], args: tuple, *, name: str, daemon: bool = False) -> BaseProcess:
    """Start `target(*args)` in a fresh interpreter that does not import this program's `__main__`.

    multiprocessing's spawn re-imports the main module in the child, so that a script without an
    `if __name__ == "__main__"` guard would start itself again, and a server would be loaded twice.
    Nothing of ours needs it: while the child starts, an empty module stands in.

    The child starts with SIGINT blocked, lest Ctrl-C break it while Python starts: it is to choose a handler,
    then call `unblock_interrupts`. With `daemon` it is ended when this program ends.
    """
    process = multiprocessing.get_context("spawn").Process(target=target, args=args, name=name, daemon=daemon)
    with _spawn_lock:
        resource_tracker.ensure_running()  # its start would unblock SIGINT again
        # Of this thread; a child inherits it.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            process.start()
        finally:
            sys.modules["__main__"] = main
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return process


def unblock_interrupts() -> None:
    """For a child of `spawn`, once it has chosen what SIGINT does."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def die_with_parent(signum: int = signal.SIGTERM) -> None:
    """Ask Linux to send us `signum` when the thread that started us ends (prctl(2)); elsewhere do nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signum), 0, 0, 0)


def watch_parent(on_death: Callable[[], None]) -> None:
    """Call `on_death` from a thread once the parent is gone, however it went (end of file on a pipe it held)."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        on_death()

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


def kill_session(session_id: int, *, timeout_s: float = 2.0) -> None:
    """Kill every process of a session but ourselves, and wait until they are gone.

    What a child started itself (setsid(2) makes the child a session leader) is found this way even when the
    child is dead and its children have another parent.
    """
    import psutil

    members = []
    for pid in psutil.pids():
        try:
            if pid != os.getpid() and os.getsid(pid) == session_id:
                process = psutil.Process(pid)
                process.kill()
                members.append(process)
        except (ProcessLookupError, PermissionError, psutil.Error):
            continue  # gone meanwhile, or none of ours
    psutil.wait_procs(members, timeout=timeout_s)


def describe_exit(exitcode: int | None) -> str:
    """How a process ended, in words: "was killed by SIGKILL", "exited with code 3"."""
    if exitcode is None:
        return "is still running"
    if exitcode >= 0:
        return f"exited with code {exitcode}"
    try:
        name = signal.Signals(-exitcode).name
    except ValueError:
        name = f"signal {-exitcode}"
    hint = " (out of memory?)" if -exitcode == signal.SIGKILL else ""
    return f"was killed by {name}{hint}"


def give_back_memory() -> None:
    """Return freed memory to the system, where the C library would keep it for later (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
