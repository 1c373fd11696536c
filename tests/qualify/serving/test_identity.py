"""Who answers at an address: what is no engine there, an engine that wants a key, and one that is not ready yet."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from crosschip.errors import QualifyError
from crosschip.qualify.serving import client as client_module
from crosschip.qualify.serving.client import EngineClient
from crosschip.qualify.serving.identity import identify_engine
from tests.qualify.serving.conftest import examine

CARD = {"id": "m", "owned_by": "made", "crosschip": {"chip": "npu:0", "dtype": "bfloat16"}}
Reply = tuple[int, Any, dict[str, str]]


@contextmanager
def answering(reply: Callable[[str], Reply]) -> Iterator[tuple[str, list[str]]]:
    """The address of what answers as told, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            asked.append(self.path)
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, document, headers = reply(self.path)
            data = json.dumps(document).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_GET

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_BUSY_S", 0.0)


def completion() -> dict[str, Any]:
    names = [f"token_id:{each}" for each in (5, 6, 7, 8, 9, 10)]
    tops = [None, *({name: -1.0} for name in names[1:])]
    scores = {"tokens": names, "token_logprobs": [None, *[-1.0] * 5], "top_logprobs": tops}
    return {"choices": [{"text": "x", "logprobs": scores, "finish_reason": "length"}]}


def sound(path: str) -> Reply:
    """Of an engine that answers completions and has no chats."""
    if path == "/v1/models":
        return 200, {"data": [CARD]}, {}
    return (200, completion(), {}) if path == "/v1/completions" else (404, {"error": "no such path"}, {})


def test_the_machine_and_the_chip_stand_in_the_title_and_the_document() -> None:
    with answering(sound) as (url, _):
        identity = identify_engine(EngineClient(url))
    assert identity.chip == f"{url} on {socket.gethostname()}, npu:0 (made)"
    assert identity.document()["host"] == socket.gethostname()
    assert identity.document()["own_chip"] == "npu:0"
    assert identity.scores_prompts


@pytest.mark.parametrize("path", ["/v1/models", "/v1/completions"])
def test_an_address_that_leads_elsewhere_is_bad_usage(path: str) -> None:
    def reply(asked: str) -> Reply:
        return (301, {}, {"Location": "https://engine.lab/v1"}) if asked == path else sound(asked)

    with answering(reply) as (url, _), pytest.raises(QualifyError) as error:
        identify_engine(EngineClient(url))
    assert f"{url}{path} leads elsewhere" in error.value.problem
    assert "https://engine.lab/v1" in error.value.problem


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("path", ["/v1/models", "/v1/completions"])
def test_an_engine_that_wants_a_key_names_where_it_is_put(status: int, path: str) -> None:
    """llama.cpp lists its models to everyone, vLLM does not."""
    with (
        answering(lambda asked: (status, {"error": "no"}, {}) if asked == path else sound(asked)) as (url, _),
        pytest.raises(QualifyError) as error,
    ):
        identify_engine(EngineClient(url))
    assert "CROSSCHIP_API_KEY" in error.value.remedy


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("path", ["/v1/models", "/v1/completions"])
def test_an_engine_that_is_not_ready_has_not_failed(tmp_path: Path, status: int, path: str) -> None:
    def reply(asked: str) -> Reply:
        return (status, {"error": {"message": "Loading model"}}, {}) if asked == path else sound(asked)

    with answering(reply) as (url, asked):
        report = examine(url, tmp_path)
    assert report["verdict"] == "INCONCLUSIVE"
    assert f"HTTP {status}: Loading model; wait until it is ready" in report["findings"][0]["message"]
    assert asked.count(path) == 3


def test_an_engine_that_is_ready_when_it_is_asked_again_is_examined() -> None:
    refusals = [503, 503]

    def reply(asked: str) -> Reply:
        return (refusals.pop(), {}, {}) if refusals else sound(asked)

    with answering(reply) as (url, _):
        assert identify_engine(EngineClient(url)).model == "m"


def test_a_server_error_is_still_the_engine_s(tmp_path: Path) -> None:
    with answering(lambda path: (500, {}, {})) as (url, _):
        assert examine(url, tmp_path)["verdict"] == "FAIL"
