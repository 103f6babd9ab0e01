"""The socket the server listens on: a TCP port or a Unix socket, bound before anything is started.

Owns binding and what to say when it fails. Listening is the launcher's.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat

from minivllm.exceptions import ConfigError

MAX_UNIX_PATH = 107  # bytes; sun_path of sockaddr_un, without its last zero


def create_server_socket(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet, so that a load balancer sees no server before there is one.

    Raises:
        ConfigError: the address is taken, not ours, or not allowed.
    """
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        try:
            # Without SO_REUSEADDR: with it, Linux lets two servers bind as long as neither listens, and the
            # second would learn of the first only after it had loaded its model.
            sock.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            # Connections in TIME_WAIT do not count.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
    except (OSError, OverflowError) as error:
        sock.close()
        raise ConfigError(_bind_failure(host, port, error)) from error
    return sock


def _bind_failure(host: str, port: int, error: Exception) -> str:
    address = f"{host or '0.0.0.0'}:{port}"
    code = getattr(error, "errno", None)
    if code == errno.EADDRINUSE:
        return f"port {port} is in use{_holder(port)}; stop that server or pass another --port"
    if code == errno.EACCES:
        return f"port {port} needs privileges this process lacks; pass a --port from 1024"
    return f"cannot bind {address}: {getattr(error, 'strerror', None) or error}; check --host and --port"


def _holder(port: int) -> str:
    """Who listens on the port, if the system lets us see it."""
    import psutil

    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN:
                if connection.pid is not None:
                    return f" by process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return ""


def create_unix_socket(path: str) -> socket.socket:
    """A bound Unix socket that does not listen yet. A file left by a server that is gone is replaced.

    Raises:
        ConfigError: something else is there, a server listens there, or it cannot be made.
    """
    if len(os.fsencode(path)) > MAX_UNIX_PATH:
        raise ConfigError(f"--uds {path} has more than {MAX_UNIX_PATH} bytes; choose a shorter path")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if os.path.lexists(path):
            if not stat.S_ISSOCK(os.lstat(path).st_mode):
                raise ConfigError(f"--uds {path} is there already and no socket; choose another path")
            with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
                if probe.connect_ex(path) == 0:
                    raise ConfigError(f"--uds {path} is in use by another server; stop it or choose another path")
            os.unlink(path)
        sock.bind(path)
    except (OSError, ValueError) as error:
        sock.close()
        raise ConfigError(f"cannot bind --uds {path}: {getattr(error, 'strerror', None) or error}") from error
    except ConfigError:
        sock.close()
        raise
    return sock


def remove_unix_socket(sock: socket.socket, path: str | None) -> None:
    """Remove the file of a Unix socket that this process has bound."""
    sock.close()
    if path is not None:
        with contextlib.suppress(OSError):
            os.unlink(path)


def url_of(host: str, sock: socket.socket, *, tls: bool) -> str:
    """How to reach the socket from this machine."""
    if sock.family == socket.AF_UNIX:
        return f"unix:{sock.getsockname()}"
    scheme, port = "https" if tls else "http", sock.getsockname()[1]
    host = "127.0.0.1" if host in ("", "0.0.0.0") else "::1" if host == "::" else host
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
