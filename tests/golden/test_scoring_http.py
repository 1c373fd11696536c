"""Engines that trickle, hang, or send brackets without end: every request ends, and says how. With real HTTP."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from crosschip.errors import GoldenError
from crosschip.golden.llamacpp_scoring import LlamaCppEngine
from crosschip.golden.scoring_engine import ScoringEngine
from crosschip.golden.scoring_http import EngineBrokeError, ScoringHttp, TimeOverError, authorization
from crosschip.handoff.answers import engine as handoff_engine
from crosschip.qualify.serving.client import EngineClient
from crosschip.train.distill import engine as distill_engine
from crosschip.train.rl.rollouts import engine as rollout_engine

DEEP = b"[" * 100_000


def _scored(value: float, top: float = 0.0) -> bytes:
    """An answer to two prompt tokens and one more, each of them with this log-prob."""
    tokens = {"tokens": ["token_id:1"] * 3, "token_logprobs": [value] * 3, "top_logprobs": [{"token_id:1": top}] * 3}
    return json.dumps({"choices": [{"logprobs": tokens}]}).encode()


ODD = {
    "deep": DEEP,
    "deep-choice": b'{"choices": [' + DEEP,
    "huge-number": _scored(10**400),
    "huge-log-prob": _scored(1000.0),
    "huge-top": _scored(0.0, 1000.0),
    "log-prob-above-0": _scored(0.5),
    "text-choice": b'{"choices": ["abc"]}',
    "long-number": b'{"choices": ' + b"1" * 5000 + b"}",
}  # fmt: skip


class _Engine(BaseHTTPRequestHandler):
    """Answers in the way that the path names; its card is a sound one but for the ways that are about cards."""

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        way = self.path.split("/")[1]
        if way == "closed":
            self.send_error(401)
            return
        owner = {"owned_by": "llamacpp", "meta": [1]} if way == "llamacpp" else {}
        self._send(DEEP if way == "deep-card" else json.dumps({"data": [{"id": "odd", **owner}]}).encode())

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        way = self.path.split("/")[1]
        if way in ("trickles", "hangs"):
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            for _ in range(600):
                with contextlib.suppress(OSError):
                    self.wfile.write(b" " * (way == "trickles"))
                time.sleep(0.05)
        else:
            self._send(ODD[way])

    def _send(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Engine)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def asked(url: str, **waits: Any) -> float:
    """How long a request took that must not come to a proper end, in seconds."""
    began = time.monotonic()
    with pytest.raises(EngineBrokeError) as broke:
        ScoringEngine(url, **waits).score([1, 1], 1)
    assert isinstance(broke.value, TimeOverError) == ("deadline" in waits), broke.value
    return time.monotonic() - began


def test_an_engine_that_trickles_is_not_waited_for_without_end(url: str) -> None:
    """Silence alone never ends it: a byte comes every 0.05 s, for 30 s."""
    assert asked(f"{url}/trickles", silence_s=5.0, total_s=2.0) < 15
    with pytest.raises(EngineBrokeError, match="still sending after"):
        ScoringHttp(f"{url}/trickles", total_s=2.0).exchange("POST", "/v1/completions", {})
    assert asked(f"{url}/hangs", silence_s=2.0) < 15


@pytest.mark.parametrize("way", ["trickles", "hangs"])
def test_at_the_end_of_the_time_nothing_is_held_against_the_engine(url: str, way: str) -> None:
    assert asked(f"{url}/{way}", deadline=time.monotonic() + 2.0) < 15


@pytest.mark.parametrize("way", ODD)
def test_an_answer_that_makes_no_sense_is_a_broken_engine(url: str, way: str) -> None:
    with pytest.raises(EngineBrokeError, match=r"another form|no probability is above 1"):
        ScoringEngine(f"{url}/{way}").score([1, 1], 1)


def test_a_card_that_makes_no_sense_is_refused(url: str) -> None:
    with pytest.raises(GoldenError, match="no model is listed"):
        ScoringEngine(f"{url}/deep-card")
    with pytest.raises(GoldenError, match="does not tell its context"):
        LlamaCppEngine(f"{url}/llamacpp")


@pytest.mark.parametrize("given", ["secret", "secret\n", " secret\r\n"])
def test_white_space_around_a_key_is_not_sent(given: str) -> None:
    assert authorization(given) == {"Authorization": "Bearer secret"}
    assert authorization("\n") == authorization(None) == {}


@pytest.mark.parametrize("key", ["top\nsecret", "top-sécret", "top\x00secret"])
@pytest.mark.parametrize("client", [ScoringHttp, EngineClient])
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(client: Any, key: str) -> None:
    with pytest.raises(GoldenError, match="no printable ASCII") as refused:
        client("http://127.0.0.1:9", api_key=key)
    assert "top" not in str(refused.value)


def test_an_engine_that_wants_a_key_names_where_it_is_put(url: str) -> None:
    with pytest.raises(GoldenError, match="HTTP 401") as refused:
        ScoringEngine(f"{url}/closed")
    assert "CROSSCHIP_API_KEY" in refused.value.remedy


@pytest.mark.parametrize(
    "make",
    [
        lambda key: handoff_engine.Engine("http://127.0.0.1:9", key),
        lambda key: distill_engine.Client("http://127.0.0.1:9", key),
        lambda key: rollout_engine.HttpEngine("http://127.0.0.1:9", key, timeout_s=1.0, wants_routes=False),
    ],
)
def test_every_client_of_an_engine_refuses_such_a_key_and_does_not_show_it(make: Callable[[str], object]) -> None:
    with pytest.raises(GoldenError, match="its character 2 is no printable ASCII") as caught:
        make("s\u00e9cret")
    assert "cret" not in str(caught.value)
