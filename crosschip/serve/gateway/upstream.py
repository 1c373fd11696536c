"""HTTP to the engines: one client for each, with its key; requests for answers and for its health."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import httpx

from crosschip.golden.scoring_http import authorization
from crosschip.serve.gateway.settings import EngineTable, GatewaySettings

__all__ = ["BodyTooLong", "Upstreams", "read_whole"]

_KEEP_ALIVE_S = 2.0  # less than servers keep an idle connection (uvicorn: 5 s), so that none is closed under a request
_HEALTH_PATH = {"native": "/health", "vllm": "/health", "llamacpp": "/health", "openai": "/v1/models"}
_MOST_BYTES = 64 << 20  # of a body that is held whole


class BodyTooLong(Exception):
    """An engine's body that is longer than any answer."""


class Upstreams:
    """The clients of all engines."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._connect_s = settings.forwarding.connect_s
        self._authorities = httpx.create_ssl_context()  # with SSL_CERT_FILE, though no proxies of the environment
        self._clients = {table.name: self._client(table) for table in settings.engines}

    def _client(self, table: EngineTable) -> httpx.AsyncClient:
        key = os.environ.get(table.api_key_env) if table.api_key_env else None
        headers = {"accept-encoding": "identity"} | authorization(key, table.api_key_env or "")
        # Phases have their own deadlines where they are awaited; here only what httpx alone can tell apart.
        timeout = httpx.Timeout(None, connect=self._connect_s, write=30.0, pool=self._connect_s)
        limits = httpx.Limits(
            max_connections=table.max_in_flight + 4,
            max_keepalive_connections=table.max_in_flight,
            keepalive_expiry=_KEEP_ALIVE_S,
        )
        return httpx.AsyncClient(
            base_url=table.url,
            headers=headers,
            timeout=timeout,
            limits=limits,
            trust_env=False,
            verify=self._authorities,
        )

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
            TimeoutError: its answer did not end within `timeout_s`.
            BodyTooLong: it did not end at all.
        """
        return await self._get(table, _HEALTH_PATH[table.kind], timeout_s)

    async def card(self, table: EngineTable, timeout_s: float) -> dict[str, Any]:
        """What an engine says of the model that it shall serve; empty where it does not list it.

        Raises:
            httpx.HTTPError, TimeoutError, BodyTooLong: as `health`.
        """
        listed = (await self._get(table, "/v1/models", timeout_s)).get("data")
        wanted = table.upstream_model or table.model
        cards = [card for card in listed if isinstance(card, dict)] if isinstance(listed, list) else []
        return next((card for card in cards if card.get("id") == wanted), {})

    async def _get(self, table: EngineTable, path: str, timeout_s: float) -> dict[str, Any]:
        """httpx's deadlines hold for each part of an answer, ours for the whole."""
        async with (
            asyncio.timeout(timeout_s),
            self._clients[table.name].stream("GET", path, timeout=timeout_s) as response,
        ):
            response.raise_for_status()
            return _document(await read_whole(response))


async def read_whole(response: httpx.Response) -> bytes:
    """A body as far as an engine may send one.

    Raises:
        BodyTooLong: it is longer.
        httpx.HTTPError: the connection broke.
    """
    content = bytearray()
    async for part in response.aiter_bytes():
        content += part
        if len(content) > _MOST_BYTES:
            raise BodyTooLong(f"it sent more than {_MOST_BYTES >> 20} MiB in one answer")
    return bytes(content)


def _document(content: bytes) -> dict[str, Any]:
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}
