"""`crosschip serve --gateway FILE`: bind, say what is in front of what, answer until told to end, drain."""

from __future__ import annotations

import asyncio
import logging
import threading
from pathlib import Path
from types import FrameType

import uvicorn

from crosschip.certificate import Serving, Status, status_of
from crosschip.serve.api.listening import (
    LOOPBACK,
    Tls,
    bind,
    log_to_stderr,
    signals_end_cleanly,
    url_of,
    uvicorn_config,
)
from crosschip.serve.gateway.app import Gateway, create_gateway
from crosschip.serve.gateway.settings import EngineTable, GatewaySettings, load_settings

__all__ = ["serve_gateway"]

logger = logging.getLogger("crosschip.serve.gateway")

_AFTER_DRAIN_S = 5  # for error events and their clients, after what is under way was broken off


def serve_gateway(
    file: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    require_certificate: bool = False,
    tls: Tls | None = None,
) -> None:
    """Serve what GATEWAY.toml describes until SIGTERM or SIGINT; then drain.

    Raises:
        ServeError: a file that cannot be honoured, or a port that is taken.
    """
    settings = load_settings(file)
    if tls is not None:
        tls.check()
    listener = bind(host, port)
    log_to_stderr(logger)
    gateway = create_gateway(settings, _certificates(settings.engines), require_certificate)
    _announce(settings, url_of(host, listener, tls), is_open=host not in LOOPBACK)
    drain_s = settings.forwarding.drain_s
    config = uvicorn_config(gateway.app, grace_s=drain_s + _AFTER_DRAIN_S, lifespan=True, tls=tls)
    with signals_end_cleanly():
        _Server(config, gateway, drain_s).run(sockets=[listener])
    print("ended", flush=True)


class _Server(uvicorn.Server):
    """Drains at the signal to end, and breaks off what is still under way `drain_s` later."""

    def __init__(self, config: uvicorn.Config, gateway: Gateway, drain_s: float) -> None:
        super().__init__(config)
        self._gateway, self._drain_s = gateway, drain_s
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        """Serve until told to end (uvicorn)."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets=sockets)  # type: ignore[arg-type]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signal (uvicorn)."""
        self._gateway.drain()
        last_moment = threading.Timer(self._drain_s, self._break_off)
        last_moment.daemon = True
        last_moment.start()
        super().handle_exit(sig, frame)

    def _break_off(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._gateway.break_off)


def _certificates(tables: list[EngineTable]) -> dict[str, Status]:
    """What holds for the engines whose tables name a certified directory."""
    found = {}
    for table in tables:
        if table.certified is not None and table.kind != "native":
            serving = Serving(table.kind, table.certified.chip_kind, table.certified.dtype)
            say = lambda line, name=table.name: print(f"{name}: {line}", flush=True)  # noqa: E731
            found[table.name] = status_of(table.certified.directory, lambda _, known=serving: known, say)  # type: ignore[misc]
    return found


def _announce(settings: GatewaySettings, url: str, is_open: bool) -> None:
    for table in settings.engines:
        print(f"{table.name}: {table.model} at {table.url} ({table.kind} on {table.chip}, group {table.group})")
    if is_open and settings.limits.api_keys is None:
        line = "OPEN: other machines can reach this address, and no API keys are asked for (limits.api_keys)"
        print(line)
        logger.warning(line)
    print(f"gateway: {url}   API: {url}/v1   (Ctrl-C ends)", flush=True)
