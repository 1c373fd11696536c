"""`crosschip serve --gateway FILE`: bind, say what is in front of what, answer until told to end, drain."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from crosschip.certificate import Serving, Status, status_of
from crosschip.certificate.signing import read_public_key
from crosschip.serve.api.ending import GRACE_S, EndingServer
from crosschip.serve.api.hosts import hosts_to_allow
from crosschip.serve.api.listening import (
    LOOPBACK,
    Tls,
    bind,
    log_to_stderr,
    url_of,
    uvicorn_config,
)
from crosschip.serve.gateway.app import create_gateway
from crosschip.serve.gateway.fleet import EngineState
from crosschip.serve.gateway.settings import EngineTable, load_settings

__all__ = ["serve_gateway"]

logger = logging.getLogger("crosschip.serve.gateway")


def serve_gateway(
    file: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    require_certificate: bool = False,
    public_key: Path | None = None,
    tls: Tls | None = None,
    allowed_hosts: Sequence[str] = (),
) -> None:
    """Serve what GATEWAY.toml describes until SIGTERM or SIGINT; then drain.

    With `public_key`, a PEM file, only certificates that its owner signed count, for engines that tell of none and for
    the bounds of parity watches; a native engine is told so itself, when it is started.
    `allowed_hosts` are names beside `host` and the loopback ones; see `hosts_to_allow`.

    Raises:
        ServeError: a file that cannot be honoured, or a port that is taken.
        HandoffError: the public key cannot be read.
    """
    settings = load_settings(file)
    signer = None if public_key is None else read_public_key(public_key)
    if tls is not None:
        tls.check()
    listener = bind(host, port)
    log_to_stderr(logger)
    hosts = hosts_to_allow(host, settings.limits.api_keys is not None, allowed_hosts)
    gateway = create_gateway(settings, _certificates(settings.engines, signer), require_certificate, signer, hosts)
    is_open = host not in LOOPBACK and settings.limits.api_keys is None
    drain_s = settings.forwarding.drain_s
    config = uvicorn_config(gateway.app, grace_s=drain_s + GRACE_S, lifespan=True, tls=tls)
    server = EndingServer(config, drain_s, lambda: server.call_in_loop(gateway.break_off), gateway.drain)
    with server.ending_at_signals():
        _announce(gateway.fleet.engines, url_of(host, listener, tls), is_open)
        server.run(sockets=[listener])
    print("ended", flush=True)


def _certificates(tables: list[EngineTable], signer: bytes | None) -> dict[str, Status]:
    """What holds for the engines whose tables name a certified directory."""
    found = {}
    for table in tables:
        if table.certified is not None and table.kind != "native":
            serving = Serving(table.kind, table.certified.chip_kind, table.certified.dtype)
            say = lambda line, name=table.name: print(f"{name}: {line}", flush=True)  # noqa: E731
            known = lambda _, known=serving: known  # noqa: E731
            found[table.name] = status_of(table.certified.directory, known, say, signer)
    return found


def _announce(engines: list[EngineState], url: str, is_open: bool) -> None:
    for engine in engines:
        table, certificate = engine.table, engine.certificate
        print(f"{table.name}: {table.model} at {table.url} ({table.kind} on {table.chip}, group {table.group})")
        if table.kind == "native":
            continue  # it tells its own certificate, when it is asked
        if certificate.is_certified:
            print(f"{table.name}: CERTIFIED")
        else:
            _warn(f"{table.name}: UNCERTIFIED: {certificate.problem}")
    if is_open:
        _warn("OPEN: other machines can reach this address, and no API keys are asked for (limits.api_keys)")
    print(f"gateway: {url}   API: {url}/v1   (Ctrl-C ends)", flush=True)


def _warn(line: str) -> None:
    print(line)
    logger.warning("%s", line)
