"""Starting and ending: ports, signals, certificates, limits."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from pathlib import Path

import httpx
import pytest
from starlette.routing import Route

from crosschip.errors import ModelError, ServeError
from crosschip.serve import load_engine, serve
from crosschip.serve.api.app import create_app
from crosschip.serve.limits import Limits, new_key
from crosschip.serve.page import PAGE_PATHS
from tests.serve.conftest import running_server


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_cleanly(random_dir: Path, number: int) -> None:
    with running_server(random_dir, model_name="my-model") as server:
        log = "".join(server.log)
        assert "UNCERTIFIED" in log
        assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"] == "my-model"
        body = {"prompt": [1, 2], "stream": True, "ignore_eos": True, "temperature": 0, "max_tokens": 1900}
        ended = threading.Event()

        def read_to_the_end() -> None:
            try:
                with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
                    for _ in response.iter_bytes():
                        started.set()
            except httpx.HTTPError:
                pass
            ended.set()

        started = threading.Event()
        threading.Thread(target=read_to_the_end, daemon=True).start()
        assert started.wait(30)
        assert server.end(number) == 0, "an answer under way does not keep the server from ending"
        assert ended.wait(30)
        rest = "".join(server.log)
        assert "Traceback" not in rest, rest
        assert rest.endswith("ended\n")


def test_a_port_in_use_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ServeError, match="--port") as error:
            serve(tmp_path / "absent", port=taken.getsockname()[1])
    assert str(taken.getsockname() if taken.fileno() >= 0 else "127.0.0.1") in str(error.value) or error.value.problem


def test_a_required_certificate_refuses(random_dir: Path) -> None:
    with pytest.raises(ServeError, match="no certificate"):
        serve(random_dir, port=0, require_certificate=True)


def test_a_directory_without_a_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        serve(tmp_path, port=0, device="cpu")


def test_a_length_beyond_the_model_is_refused(random_dir: Path) -> None:
    with pytest.raises(ServeError, match="2048"):
        load_engine(random_dir, max_model_len=4096)


def test_without_a_key_the_page_is_given_and_nothing_else(random_dir: Path, tmp_path: Path) -> None:
    secret, lines = new_key("alice")
    (tmp_path / "keys.toml").write_text(lines)
    engine = load_engine(random_dir, max_batch_size=1)
    try:
        app = create_app(engine, limits=Limits(api_keys=tmp_path / "keys.toml"))
        paths = [route.path for route in app.routes if isinstance(route, Route) and "GET" in (route.methods or ())]

        async def statuses(headers: dict[str, str]) -> dict[str, int]:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://x", headers=headers) as client:
                return {path: (await client.get(path)).status_code for path in paths}

        found = asyncio.run(statuses({}))
        assert {path for path, status in found.items() if status == 200} == PAGE_PATHS | {"/health", "/ready"}
        assert found["/openapi.json"] == 401
        assert asyncio.run(statuses({"authorization": f"Bearer {secret}"}))["/openapi.json"] == 200
    finally:
        engine.close()
