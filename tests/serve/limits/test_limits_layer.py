"""The middleware over real HTTP, around a server that only answers."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from crosschip.serve.limits import KeyRing, Limits, LimitsLayer, load_keys, new_key
from tests.serve.gateway.conftest import in_thread


class Backend:
    """Counts what reaches it. `/v1/slow` takes a while, `/v1/stream` never ends."""

    def __init__(self) -> None:
        self.reached: list[str] = []
        self.cancelled = 0

    def app(self) -> Starlette:
        paths = ("/health", "/v1/echo", "/v1/slow", "/v1/stream", "/v1/weights", "/metrics")
        return Starlette(routes=[Route(path, self._answer, methods=["GET", "POST"]) for path in paths])

    async def _answer(self, request: Request) -> Response:
        path = request.url.path
        self.reached.append(path)
        body = await request.body()
        try:
            if path == "/v1/slow":
                await asyncio.sleep(float(body or 1))
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if path == "/v1/stream":
            return StreamingResponse(self._stream(), media_type="text/event-stream")
        return JSONResponse({"length": len(body)})

    async def _stream(self) -> AsyncIterator[bytes]:
        try:
            while True:
                yield b'data: {"x": 1}\n\n'
                await asyncio.sleep(0.05)
        finally:
            self.cancelled += 1


@contextmanager
def limited(keys: KeyRing | None = None, **limits: Any) -> Iterator[tuple[str, Backend, CollectorRegistry]]:
    backend, registry = Backend(), CollectorRegistry()
    app = LimitsLayer(backend.app(), Limits.model_validate(limits), keys, registry=registry)
    with in_thread(app, lifespan=False) as url:
        yield url, backend, registry


@pytest.fixture
def keys(tmp_path: Path) -> tuple[KeyRing, str, str]:
    alice, lines = new_key("alice")
    root, admin_lines = new_key("root", admin=True)
    (tmp_path / "keys.toml").write_text(lines + admin_lines)
    return load_keys(tmp_path / "keys.toml"), alice, root


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def code_of(response: httpx.Response) -> str:
    return str(response.json()["error"]["code"])


def test_a_key_opens_and_nothing_else_does(keys: tuple[KeyRing, str, str]) -> None:
    ring, alice, _ = keys
    with limited(ring) as (url, backend, registry):
        assert httpx.post(f"{url}/v1/echo", headers=bearer(alice)).status_code == 200
        assert httpx.post(f"{url}/v1/echo", headers={"x-api-key": alice}).status_code == 200
        assert httpx.get(f"{url}/health").status_code == 200
        reached = len(backend.reached)
        wrong = [
            {},
            bearer("wrong"),
            {"authorization": "Bearer"},
            {"authorization": alice},
            {"authorization": f"Basic {alice}"},
        ]
        for headers in wrong:
            for method, path in (
                ("POST", "/v1/echo"),
                ("GET", "/metrics"),
                ("GET", "/v1/echo"),
                ("OPTIONS", "/v1/echo"),
            ):
                response = httpx.request(method, url + path, headers=headers)
                assert (response.status_code, code_of(response)) == (401, "invalid_api_key")
                assert response.headers["www-authenticate"] == "Bearer"
        assert len(backend.reached) == reached
        assert registry.get_sample_value("crosschip_refused_requests_total", {"key": "(no key)", "reason": "key"}) == 20


@pytest.mark.parametrize("path", ["/v1/weights", "/v1//weights/../weights", "/v1/weights/"])
def test_only_an_admin_administrates(keys: tuple[KeyRing, str, str], path: str) -> None:
    ring, alice, root = keys
    with limited(ring) as (url, backend, _):
        httpx.post(url + path, headers=bearer(alice))
        assert "/v1/weights" not in backend.reached
        assert httpx.post(f"{url}/v1/weights", headers=bearer(root)).status_code == 200
    with limited() as (url, backend, _):
        response = httpx.post(f"{url}/v1/weights")
        assert (response.status_code, code_of(response)) == (403, "admin_key_needed")
        assert backend.reached == [], "without keys nobody is an admin"


@pytest.mark.parametrize("path", ["/v1/weights%0A", "/v1/weights%0a", "/v1/%0Aweights", "/v1/weights%00", "/%7f"])
def test_a_path_with_control_characters_reaches_nothing(keys: tuple[KeyRing, str, str], path: str) -> None:
    ring, alice, root = keys
    with limited() as (url, backend, _):
        response = httpx.post(url + path)
        assert (response.status_code, code_of(response)) == (404, "unknown_url")
        assert backend.reached == []
    with limited(ring) as (url, backend, _):
        for secret in (alice, root):
            assert httpx.post(url + path, headers=bearer(secret)).status_code == 404
        assert backend.reached == []


def test_each_key_has_its_own_rate(keys: tuple[KeyRing, str, str]) -> None:
    ring, alice, root = keys
    with limited(ring, requests_per_minute=3) as (url, _, _):
        statuses = [httpx.post(f"{url}/v1/echo", headers=bearer(alice)).status_code for _ in range(5)]
        assert statuses == [200, 200, 200, 429, 429]
        response = httpx.post(f"{url}/v1/echo", headers=bearer(alice))
        assert code_of(response) == "rate_limit_exceeded"
        assert 1 <= int(response.headers["retry-after"]) <= 20
        assert httpx.post(f"{url}/v1/echo", headers=bearer(root)).status_code == 200


def test_concurrency_is_limited_and_given_back() -> None:
    with limited(max_concurrent=2) as (url, _, _):
        statuses: list[int] = []

        def one() -> None:
            statuses.append(httpx.post(f"{url}/v1/slow", content=b"0.6").status_code)

        threads = [threading.Thread(target=one) for _ in range(4)]
        for thread in threads:
            thread.start()
            time.sleep(0.02)
        for thread in threads:
            thread.join()
        assert sorted(statuses) == [200, 200, 429, 429]
        assert httpx.post(f"{url}/v1/slow", content=b"0").status_code == 200


def test_long_bodies_and_prompts_are_refused() -> None:
    with limited(max_body_bytes=2000, max_prompt_chars=100) as (url, backend, _):

        def in_parts() -> Iterator[bytes]:
            for _ in range(30):
                yield b"x" * 100

        for content in (b"x" * 2001, in_parts()):
            response = httpx.post(f"{url}/v1/echo", content=content)
            assert (response.status_code, code_of(response)) == (413, "body_too_large")
        response = httpx.post(f"{url}/v1/echo", json={"prompt": "x" * 101})
        assert (response.status_code, code_of(response)) == (400, "prompt_too_long")
        assert backend.reached == []
        assert httpx.post(f"{url}/v1/echo", json={"prompt": "x" * 100}).json()["length"] == 113


def test_a_body_of_countless_small_parts_is_refused_unread() -> None:
    with limited() as (url, backend, _):
        for part in (b"{}", b"[]"):
            response = httpx.post(f"{url}/v1/echo", content=b"[" + part * 200_000 + b"]")
            assert (response.status_code, code_of(response)) == (413, "body_too_large")
        assert backend.reached == []
        assert httpx.post(f"{url}/v1/echo", content=b"[" + b"{}" * 199_999 + b"]").status_code == 200


def test_a_body_that_does_not_come_holds_nothing() -> None:
    with limited(max_body_s=0.3, max_concurrent=1) as (url, backend, _):
        host, _, port = url.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port))) as slow:
            slow.sendall(b"POST /v1/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nx")
            answer = slow.recv(1000)
            assert b" 408 " in answer.split(b"\r\n")[0]
        assert backend.reached == []
        assert httpx.post(f"{url}/v1/echo").status_code == 200


def test_a_body_on_its_way_keeps_nobody_out() -> None:
    with limited(max_concurrent=1) as (url, backend, _):
        host, _, port = url.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port)), timeout=30) as slow:
            slow.sendall(b"POST /v1/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nx")
            for _ in range(5):
                assert httpx.post(f"{url}/v1/echo").status_code == 200
            assert len(backend.reached) == 5
            slow.sendall(b"y" * 9)
            answer = HTTPResponse(slow)
            answer.begin()
            assert json.loads(answer.read()) == {"length": 10}


def test_an_answer_that_takes_too_long_is_broken_off() -> None:
    with limited(max_request_s=0.4) as (url, backend, _):
        response = httpx.post(f"{url}/v1/slow", content=b"30")
        assert (response.status_code, code_of(response)) == (504, "request_timeout")
        with httpx.stream("POST", f"{url}/v1/stream") as stream:
            text = b"".join(stream.iter_raw()).decode()
        events = [line.removeprefix("data: ") for line in text.splitlines() if line]
        assert json.loads(events[0]) == {"x": 1}
        assert json.loads(events[-1])["error"]["code"] == "request_timeout"
        assert backend.cancelled == 2


def test_a_client_that_leaves_gives_its_place_back() -> None:
    with limited(max_concurrent=1) as (url, _, _):
        with httpx.stream("POST", f"{url}/v1/stream") as stream:
            parts = stream.iter_raw()  # kept: letting go of it would close the connection
            next(parts)
            assert httpx.post(f"{url}/v1/echo").status_code == 429
        for _ in range(100):
            if httpx.post(f"{url}/v1/echo").status_code == 200:
                return
            time.sleep(0.05)
        raise AssertionError("the place was not given back")
