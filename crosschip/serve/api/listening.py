"""Listening: a bound socket, what uvicorn is told, TLS. No torch, so that the gateway starts at once."""

from __future__ import annotations

import errno
import logging
import socket
import ssl
import sys
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from crosschip.errors import ServeError
from crosschip.serve.api.http_protocol import BoundedHttp

__all__ = ["LOOPBACK", "Tls", "bind", "log_to_stderr", "url_of", "uvicorn_config"]

LOOPBACK = ("127.0.0.1", "localhost", "::1")  # hosts that only this machine can reach


@dataclass(frozen=True)
class Tls:
    """The files of a certificate, with its chain, and of its key, both in PEM."""

    certificate: Path
    key: Path

    def check(self) -> None:
        """Load them, before anything slow happens.

        Raises:
            ServeError: they cannot be read or do not belong together.
        """
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.certificate, self.key, password="")
        except (OSError, ssl.SSLError, ValueError) as error:  # ssl.SSLError is an OSError
            raise ServeError(
                f"TLS with {self.certificate} and {self.key} cannot be had: {error}",
                "give a certificate and its key as PEM files, the key without a password",
            ) from None


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, bound before anything slow happens.

    Raises:
        ServeError: the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        remedy = "give another --host"
        if error.errno == errno.EADDRINUSE:
            remedy = "end what listens there, or give another --port (0 lets the system choose)"
        elif error.errno == errno.EACCES:
            remedy = "ports under 1024 need a privilege; give another --port"
        raise ServeError(f"cannot listen on {host}:{port}: {error.strerror or error}", remedy) from error
    return listener


def uvicorn_config(app: ASGIApp, *, grace_s: float, lifespan: bool = False, tls: Tls | None = None) -> uvicorn.Config:
    """What uvicorn is told: no access log (addresses and paths are nobody's business by default), no server header."""
    return uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=max(1, round(grace_s)),
        server_header=False,
        lifespan="on" if lifespan else "off",
        http=BoundedHttp,
        ws="none",
        ssl_certfile=tls.certificate if tls else None,
        ssl_keyfile=tls.key if tls else None,
    )


def log_to_stderr(logger: logging.Logger) -> None:
    """Show a logger's warnings, once."""
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        logger.addHandler(handler)


def url_of(host: str, listener: socket.socket, tls: Tls | None) -> str:
    """The address to be told to whoever started the server."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)
    shown = f"[{shown}]" if ":" in shown and not shown.startswith("[") else shown
    return f"{'https' if tls else 'http'}://{shown}:{listener.getsockname()[1]}"
