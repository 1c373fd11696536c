"""What an engine sends is read as far as an answer may go, and as long as a check may take."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, MutableMapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from crosschip.certificate import Status
from crosschip.golden.scoring_http import EngineBrokeError, ScoringHttp
from crosschip.serve.api.listening import Tls
from crosschip.serve.gateway.admission import Admission
from crosschip.serve.gateway.attempt import Attempt
from crosschip.serve.gateway.calls import Call
from crosschip.serve.gateway.fleet import Ask, Fleet
from crosschip.serve.gateway.health import HealthWatch
from crosschip.serve.gateway.metrics import GatewayMetrics
from crosschip.serve.gateway.settings import GatewaySettings
from crosschip.serve.gateway.upstream import Upstreams
from tests.serve.gateway.conftest import (
    QUESTION,
    ScriptedEngine,
    ask,
    in_thread,
    make_tls,
    running_gateway,
    settings_of,
    table,
    wait_until,
)

DEADLINE_S = 20.0  # of a test whose engine never ends
MOST_BYTES = 2**20


class Body(httpx.AsyncByteStream):
    """A body that is as long as one may be, and one byte longer; or one that never ends."""

    def __init__(self, ends: bool) -> None:
        self.ends = ends

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b" "
        if not self.ends:
            await asyncio.Event().wait()
        yield b" " * MOST_BYTES


def engine_that_sends(monkeypatch: pytest.MonkeyPatch, ends: bool, status: int = 200) -> GatewaySettings:
    """Settings of one engine, whose every answer is such a body. Only one that never ends is to be over time."""
    transport = httpx.MockTransport(lambda _: httpx.Response(status, stream=Body(ends)))
    client = httpx.AsyncClient(base_url="http://engine", transport=transport)
    monkeypatch.setattr(Upstreams, "_client", lambda *_: client)
    monkeypatch.setattr("crosschip.serve.gateway.upstream._MOST_BYTES", MOST_BYTES)
    return settings_of(table("a", "http://engine"), health={"timeout_s": DEADLINE_S if ends else 0.01, "failures": 1})


def test_an_engine_with_a_certificate_of_ones_own_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, key = make_tls(tmp_path)
    with in_thread(ScriptedEngine().app(), lifespan=False, tls=Tls(certificate, key)) as url:
        settings = settings_of(table("a", url))
        with running_gateway(settings, wait_for=0) as gateway:
            (engine,) = gateway.gateway.fleet.engines
            wait_until(lambda: "CERTIFICATE_VERIFY_FAILED" in str(engine.problem), "its certificate is not known")
        with pytest.raises(EngineBrokeError, match="CERTIFICATE_VERIFY_FAILED"):
            ScoringHttp(url).exchange("GET", "/v1/models")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        with running_gateway(settings) as gateway:
            assert ask(gateway.url, stream=True).status_code == 200
        assert ScoringHttp(url).exchange("GET", "/v1/models")[0] == 200


@pytest.mark.parametrize(("ends", "words"), [(True, "1 MiB"), (False, "within 0.01 s")])
def test_a_check_is_over_in_time_and_holds_no_endless_body(
    monkeypatch: pytest.MonkeyPatch, ends: bool, words: str
) -> None:
    settings = engine_that_sends(monkeypatch, ends)
    fleet = Fleet(settings, {"a": Status("UNCERTIFIED", "no")}, False)
    admission = Admission(fleet, 1, 1.0)
    watch = HealthWatch(fleet, Upstreams(settings), admission, GatewayMetrics(), settings.health)
    asyncio.run(asyncio.wait_for(watch.check(fleet.engines[0]), DEADLINE_S))
    assert words in str(fleet.engines[0].problem)


@pytest.mark.parametrize("status", [200, 404, 500])
def test_an_answer_that_is_too_long_is_the_engines_fault(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    settings = engine_that_sends(monkeypatch, ends=True, status=status)
    fleet = Fleet(settings, {"a": Status("UNCERTIFIED", "no")}, False)
    call = Call("/v1/chat/completions", b"{}", QUESTION, Ask.of("m", QUESTION), "req-1", is_stream=False)
    sent: list[MutableMapping[str, Any]] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    async def attempt() -> None:
        await Attempt(call, fleet.engines[0], Upstreams(settings), settings.forwarding, send, None).run()

    with pytest.raises(Exception, match="a: it sent more than 1 MiB"):
        asyncio.run(attempt())
    assert sent == []
