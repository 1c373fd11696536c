"""Engines that are late, over real HTTP: who is busy is not lost, and who is told to wait is waited for."""

from __future__ import annotations

from crosschip.serve.gateway.fleet import Ask
from tests.serve.gateway.conftest import (
    DONE,
    HEAD,
    LAST,
    QUESTION,
    TOKEN,
    ScriptedEngine,
    ask,
    error_of,
    running_gateway,
    scripted,
    settings_of,
    stream_of,
    table,
    wait_until,
)


def test_an_engine_that_stalls_is_given_up() -> None:
    engine = ScriptedEngine(play=[HEAD, TOKEN, 30])
    settings = {"forwarding": {"stall_s": 0.5}, "health": {"interval_s": 60.0}}
    with scripted(engine) as [url], running_gateway(settings_of(table("a", url), **settings)) as gateway:
        for _ in range(3):
            _, answer = stream_of(gateway.url)
            assert b"0.5 s" in answer
        wait_until(lambda: engine.cancelled == 3, "the engine is told that nobody waits")
        assert gateway.gateway.fleet.engines[0].problem is None, "its checks say whether it is there"


def test_an_engine_whose_answers_are_late_is_busy_and_not_dead() -> None:
    """It has more requests than it computes together; who comes to it next must not be told that there is no engine."""
    engine = ScriptedEngine(play=[HEAD, 30])
    with scripted(engine) as [url]:
        tables = {"forwarding": {"first_token_s": 0.3}, "health": {"interval_s": 60.0}}
        settings = settings_of(table("a", url), **tables)
        with running_gateway(settings) as gateway:
            for _ in range(3):
                response = ask(gateway.url, stream=True)
                assert (response.status_code, error_of(response)["code"]) == (504, "engine_timeout")
                assert int(response.headers["retry-after"]) >= 1
                assert "no token came from it within 0.3 s" in error_of(response)["message"]
            fleet = gateway.gateway.fleet
            assert fleet.engines[0].problem is None
            assert fleet._prefixes.longest(Ask.of("m", QUESTION).digests) == "a"
            assert gateway.metric("crosschip_gateway_retries_total", engine="a", reason="timeout") == 3
            engine.play = [HEAD, TOKEN, LAST, DONE]
            assert stream_of(gateway.url) == (200, HEAD + TOKEN + LAST + DONE)


def test_an_engine_that_says_that_a_request_waits_is_waited_for() -> None:
    waiting = [b": waiting\n\n", 0.3]
    engine = ScriptedEngine(play=[*waiting * 4, HEAD, TOKEN, *waiting * 4, LAST, DONE])
    forwarding = {"first_token_s": 0.6, "stall_s": 0.6, "answer_s": 30.0}
    with scripted(engine) as [url], running_gateway(settings_of(table("a", url), forwarding=forwarding)) as gateway:
        status, answer = stream_of(gateway.url)
        assert (status, answer) == (200, b"".join(part for part in engine.play if isinstance(part, bytes)))


def test_an_engine_that_does_nothing_else_is_not_waited_for_without_end() -> None:
    engine = ScriptedEngine(play=[b": waiting\n\n", 0.1] * 300)
    forwarding = {"first_token_s": 0.5, "answer_s": 1.0}
    with scripted(engine) as [url], running_gateway(settings_of(table("a", url), forwarding=forwarding)) as gateway:
        response = ask(gateway.url, stream=True)
        assert (response.status_code, error_of(response)["code"]) == (504, "engine_timeout")
        wait_until(lambda: engine.cancelled == 1, "the engine is told that nobody waits")
