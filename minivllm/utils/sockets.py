"""Where our IPC sockets live: one private directory per engine, removed at exit.

Owns the directory's name, mode and end, and the sweep of those whose owner was killed. Knows nothing
of what is said on the sockets.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import tempfile
from pathlib import Path

from minivllm import envs
from minivllm.exceptions import ConfigError
from minivllm.logger import init_logger

logger = init_logger(__name__)

MAX_UNIX_PATH = 107  # bytes: sockaddr_un.sun_path without its final NUL, unix(7)
_DIRECTORY = re.compile(r"minivllm-\d+-[0-9a-f]{8}")
_LOCK = "lock"


class RunDirectory:
    """A fresh 0700 directory `minivllm-<pid>-<random>` under MINIVLLM_RUN_DIR or the temporary directory.

    Its owner holds a lock on a file in it, which the system lets go of when the owner dies: that is how a sweep
    knows, in whatever container it runs (a pid says nothing outside its namespace).

    longest_name: bytes of the longest socket path inside it.

    Raises (on construction):
        ConfigError: the directory cannot be made, or a socket's path in it would be too long for the system.
    """

    def __init__(self, longest_name: int = 8) -> None:
        name = f"minivllm-{os.getpid()}-{secrets.token_hex(4)}"
        sweep()
        base = _base_directory(len(name) + 1 + longest_name)
        self.path = base / name
        try:
            base.mkdir(parents=True, exist_ok=True)
            # Under its name only once it is locked: a sweep never sees it unowned.
            unnamed = self.path.with_suffix(".new")
            unnamed.mkdir(mode=0o700)
            self._lock = os.open(unnamed / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            unnamed.rename(self.path)
        except OSError as error:
            raise ConfigError(
                f"cannot make the socket directory {self.path}: {error.strerror}; "
                "set MINIVLLM_RUN_DIR to a directory this user may write"
            ) from error

    def address(self, name: str) -> str:
        """The ZeroMQ address of a socket file in this directory."""
        return f"ipc://{self.path / name}"

    def remove(self) -> None:
        """Remove the directory and what is in it; once it is gone, do nothing."""
        if self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = None


def _candidates() -> list[Path]:
    places = (envs.get("MINIVLLM_RUN_DIR"), tempfile.gettempdir(), "/tmp")
    return list(dict.fromkeys(Path(place).absolute() for place in places if place))


def _base_directory(room: int) -> Path:
    """The first place where a socket path of `room` further bytes fits: the operator's choice, the system's, /tmp."""
    for base in _candidates():
        if len(os.fsencode(base)) + 1 + room <= MAX_UNIX_PATH:
            return base
        logger.warning("%s is too long for a socket path (%d bytes); trying elsewhere", base, MAX_UNIX_PATH)
    raise ConfigError(
        f"no place for sockets: paths have at most {MAX_UNIX_PATH} bytes; set a short MINIVLLM_RUN_DIR"
    )


def sweep() -> None:
    """Remove run directories of this user whose owner was killed before it could."""
    for base in _candidates():
        if base.is_dir():
            _sweep(base)


def _sweep(base: Path) -> None:
    for path in base.iterdir():
        named = _DIRECTORY.fullmatch(path.name)
        if named and not path.is_symlink() and _is_ours(path) and not _has_owner(path):
            logger.debug("removing %s, left by a process that was killed", path)
            shutil.rmtree(path, ignore_errors=True)


def _is_ours(path: Path) -> bool:
    try:
        return path.stat().st_uid == os.getuid()
    except OSError:
        return False


def _has_owner(path: Path) -> bool:
    """Whether a process holds the directory's lock; True as well when that cannot be found out."""
    try:
        lock = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False
