"""TLS: what uvicorn needs to know, and certificates that are read again when their files change."""

from __future__ import annotations

import asyncio
import os
import ssl
from pathlib import Path
from typing import Any

from minivllm.config.frontend import FrontendConfig
from minivllm.exceptions import ConfigError
from minivllm.logger import init_logger

logger = init_logger(__name__)

LOOK_EVERY_S = 1.0


def check_tls(frontend: FrontendConfig) -> None:
    """Read everything once, so that what is wrong is known before a model is loaded.

    Raises:
        ConfigError: a file is missing or no certificate, or the options contradict each other.
    """
    if frontend.ssl_cert_reqs not in (0, 1, 2):
        raise ConfigError(f"--ssl-cert-reqs {frontend.ssl_cert_reqs} must be 0 (none), 1 (optional) or 2 (required)")
    if frontend.ssl_certfile is None:
        for name in ("ssl_keyfile", "ssl_ca_certs", "ssl_ciphers", "enable_ssl_refresh"):
            if getattr(frontend, name):
                raise ConfigError(f"--{name.replace('_', '-')} needs --ssl-certfile: without it there is no TLS")
        if frontend.ssl_cert_reqs:
            raise ConfigError("--ssl-cert-reqs needs --ssl-certfile: without it there is no TLS")
        return
    for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"):
        path = getattr(frontend, name)
        if path is not None and not Path(path).is_file():
            raise ConfigError(f"--{name.replace('_', '-')} {path} is not a file; check the path")
    if frontend.ssl_cert_reqs and frontend.ssl_ca_certs is None:
        raise ConfigError("--ssl-cert-reqs needs --ssl-ca-certs: the authorities that clients' certificates come from")
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        _load(context, frontend)
        if frontend.ssl_ciphers:
            context.set_ciphers(frontend.ssl_ciphers)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(f"the TLS files or ciphers cannot be used: {error}; check --ssl-*") from error


def uvicorn_tls_options(frontend: FrontendConfig) -> dict[str, Any]:
    """Keywords for `uvicorn.Config`; none without a certificate."""
    if frontend.ssl_certfile is None:
        return {}
    options: dict[str, Any] = {
        "ssl_certfile": frontend.ssl_certfile,
        "ssl_keyfile": frontend.ssl_keyfile,
        "ssl_ca_certs": frontend.ssl_ca_certs,
        "ssl_cert_reqs": frontend.ssl_cert_reqs,
    }
    if frontend.ssl_ciphers:
        options["ssl_ciphers"] = frontend.ssl_ciphers
    return options


async def refresh_certificates(context: ssl.SSLContext, frontend: FrontendConfig) -> None:
    """Load the files into the context whenever they change; new connections then use them. Runs until cancelled.

    Files that do not fit together (one is replaced before the other) are tried again at the next look.
    """
    paths = [path for path in (frontend.ssl_certfile, frontend.ssl_keyfile, frontend.ssl_ca_certs) if path]
    loaded = _versions(paths)
    complained_of = None
    while True:
        await asyncio.sleep(LOOK_EVERY_S)
        now = _versions(paths)
        if now == loaded:
            continue
        try:
            # A context keeps its old pair when the new one is refused; a scratch one shows whether it is.
            _load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), frontend)
            _load(context, frontend)
        except (ssl.SSLError, OSError) as error:
            if now != complained_of:
                logger.warning("the TLS files changed and cannot be read yet: %s; the old ones stay in use", error)
                complained_of = now
            continue
        loaded = now
        logger.info("the TLS files changed and were loaded")


def _load(context: ssl.SSLContext, frontend: FrontendConfig) -> None:
    context.load_cert_chain(frontend.ssl_certfile, frontend.ssl_keyfile)
    if frontend.ssl_ca_certs:
        context.load_verify_locations(frontend.ssl_ca_certs)


def _versions(paths: list[str]) -> list[tuple[int, int, int] | None]:
    """What changes when a file does: also when a link is turned to another file, as Kubernetes does."""
    versions: list[tuple[int, int, int] | None] = []
    for path in paths:
        try:
            status = os.stat(path)
        except OSError:
            versions.append(None)
        else:
            versions.append((status.st_ino, status.st_mtime_ns, status.st_size))
    return versions
