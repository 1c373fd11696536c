"""By which names a server may be asked (ASGI middleware).

A page of any site can be asked for under a name that its owner then lets point to 127.0.0.1 (DNS rebinding). The
browser takes the server on this machine for that site, so the page reads and uses it. The header Host gives it away.
"""

from __future__ import annotations

from collections.abc import Sequence

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from crosschip.serve.api.errors import error_body, shown
from crosschip.serve.api.listening import LOOPBACK

__all__ = ["HostLayer", "hosts_to_allow"]


def hosts_to_allow(listens_on: str, asks_for_keys: bool, named: Sequence[str] = ()) -> frozenset[str] | None:
    """The names by which a server may be asked; None: any.

    A page that knows no key gets nothing from a server that asks for one, and one that other machines can reach has
    names that only its user knows. So names are held to where neither is so, or where the user has `named` some.
    """
    if not named and (asks_for_keys or listens_on not in LOOPBACK):
        return None
    return frozenset(_plain(name) for name in (*LOOPBACK, listens_on, *named))


class HostLayer:
    """Refuses requests for other names, whatever their port. One without a name comes from no browser."""

    def __init__(self, app: ASGIApp, allowed: frozenset[str]) -> None:
        self._app, self._allowed = app, allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (ASGI)."""
        if scope["type"] == "http":
            given = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
            for host in given:
                if host and _plain(_without_port(host)) not in self._allowed:
                    await _refusal(host)(scope, receive, send)
                    return
        await self._app(scope, receive, send)


def _refusal(host: str) -> JSONResponse:
    message = (
        f"this server is not asked by the name {shown(host)}; ask http://localhost or http://127.0.0.1 with its port, "
        "or start it with --allowed-host NAME where a proxy passes that name on"
    )
    return JSONResponse(error_body(400, message, code="host_not_allowed"), 400)


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]


def _plain(name: str) -> str:
    """As names are compared: `[::1]` and `LOCALHOST.` are others' spellings."""
    return name.lower().rstrip(".").removeprefix("[").removesuffix("]")
