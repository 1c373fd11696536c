"""HTTP to the engines: one client for each, with its key; requests for answers and for its health."""

from __future__ import annotations

import os
from typing import Any

import httpx

from crosschip.serve.gateway.settings import EngineTable, GatewaySettings

__all__ = ["Upstreams"]

_KEEP_ALIVE_S = 2.0  # less than servers keep an idle connection (uvicorn: 5 s), so that none is closed under a request
_HEALTH_PATH = {"native": "/health", "vllm": "/health", "llamacpp": "/health", "openai": "/v1/models"}


class Upstreams:
    """The clients of all engines."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._connect_s = settings.forwarding.connect_s
        self._clients = {table.name: self._client(table) for table in settings.engines}

    def _client(self, table: EngineTable) -> httpx.AsyncClient:
        key = os.environ.get(table.api_key_env) if table.api_key_env else None
        headers = {"accept-encoding": "identity"} | ({"authorization": f"Bearer {key}"} if key else {})
        # Phases have their own deadlines where they are awaited; here only what httpx alone can tell apart.
        timeout = httpx.Timeout(None, connect=self._connect_s, write=30.0, pool=self._connect_s)
        limits = httpx.Limits(
            max_connections=table.max_in_flight + 4,
            max_keepalive_connections=table.max_in_flight,
            keepalive_expiry=_KEEP_ALIVE_S,
        )
        return httpx.AsyncClient(base_url=table.url, headers=headers, timeout=timeout, limits=limits, trust_env=False)

    async def close(self) -> None:
        """Close all connections."""
        for client in self._clients.values():
            await client.aclose()

    async def begin(self, engine: str, path: str, body: bytes, request_id: str) -> httpx.Response:
        """Send a request; returns when the answer's head is there. The response must be closed."""
        client = self._clients[engine]
        headers = {"content-type": "application/json", "x-request-id": request_id}
        return await client.send(client.build_request("POST", path, content=body, headers=headers), stream=True)

    async def health(self, table: EngineTable, timeout_s: float) -> dict[str, Any]:
        """What an engine says of its health; an empty document where it only says that it is well.

        Raises:
            httpx.HTTPError: it is not well, or not there.
        """
        response = await self._clients[table.name].get(_HEALTH_PATH[table.kind], timeout=timeout_s)
        response.raise_for_status()
        return _document(response)

    async def card(self, table: EngineTable, timeout_s: float) -> dict[str, Any]:
        """What an engine says of the model that it shall serve; empty where it does not list it."""
        response = await self._clients[table.name].get("/v1/models", timeout=timeout_s)
        response.raise_for_status()
        listed = _document(response).get("data")
        wanted = table.upstream_model or table.model
        cards = [card for card in listed if isinstance(card, dict)] if isinstance(listed, list) else []
        return next((card for card in cards if card.get("id") == wanted), {})


def _document(response: httpx.Response) -> dict[str, Any]:
    try:
        document = response.json()
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}
