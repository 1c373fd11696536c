"""What the gateway does when engines fail: one that fails by a script, over real HTTP."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import Any

import httpx
import openai
import pytest
from starlette.responses import JSONResponse, Response

from crosschip.serve.gateway.fleet import Ask
from tests.serve.gateway.conftest import (
    DONE,
    HEAD,
    LAST,
    QUESTION,
    TOKEN,
    Broken,
    ScriptedEngine,
    ask,
    delta,
    error_of,
    event,
    running_gateway,
    scripted,
    settings_of,
    stream_of,
    table,
    wait_until,
)


def test_bytes_come_through_as_they_are() -> None:
    odd = b': ping\n\nevent: x\r\ndata:  {"choices": [ {"delta":{"content":"\\u00fc"}} ]}\r\n\r\n'
    engine = ScriptedEngine(play=[HEAD, odd, LAST, DONE])
    with scripted(engine) as [url], running_gateway(settings_of(table("a", url))) as gateway:
        assert stream_of(gateway.url) == (200, HEAD + odd + LAST + DONE)
        assert engine.sent == [QUESTION | {"stream": True}]


@pytest.mark.parametrize("upstream", ["r1-tiny", None])
def test_an_answer_names_the_model_as_it_was_asked_for(upstream: str | None) -> None:
    halves = b'data: {"model":"files/r1.gguf","choices":[{"delta":{"content":"\\ud83d"}}]}\n\n'
    engine = ScriptedEngine(model=upstream or "m", play=[halves, LAST, DONE])
    with scripted(engine) as [url], running_gateway(settings_of(table("a", url, upstream_model=upstream))) as gateway:
        assert stream_of(gateway.url) == (200, halves.replace(b"files/r1.gguf", b"m") + LAST + DONE)
        engine.refusal = JSONResponse({"model": "files/r1.gguf", "choices": [{"text": "ü", "finish_reason": "stop"}]})
        whole = httpx.post(f"{gateway.url}/v1/chat/completions", json=QUESTION)
        assert whole.json() == {"model": "m", "choices": [{"text": "ü", "finish_reason": "stop"}]}
        assert [sent["model"] for sent in engine.sent] == [upstream or "m"] * 2


CERTIFIED = {"crosschip": {"certificate": "CERTIFIED", "weights_version": "1"}}
REPLACED = {"certificate": "UNCERTIFIED", "certificate_problem": "it has no certificate", "weights_version": "2"}


@pytest.mark.parametrize("streams", [True, False])
def test_the_certificate_is_that_of_the_weights_that_answer(streams: bool, caplog: pytest.LogCaptureFixture) -> None:
    engine = ScriptedEngine(play=[event(delta("hello") | {"crosschip": REPLACED}), LAST, DONE], about=CERTIFIED)
    if not streams:
        answer = {"choices": [{"text": "hello", "finish_reason": "stop"}], "crosschip": REPLACED}
        engine.refusal = JSONResponse(answer)
    with scripted(engine) as [url]:
        settings = settings_of(table("a", url, kind="native"), health={"interval_s": 60.0})
        with running_gateway(settings) as gateway:
            (state,) = gateway.gateway.fleet.engines
            assert state.certificate.word == "CERTIFIED"
            response = httpx.post(f"{gateway.url}/v1/chat/completions", json=QUESTION | {"stream": streams})
            assert response.headers["x-crosschip-certificate"] == "UNCERTIFIED"
            wait_until(lambda: state.certificate.word == "UNCERTIFIED", "the answer is believed")
    assert "engine a is UNCERTIFIED: it has no certificate" in caplog.text


def test_the_log_tells_each_change_of_a_certificate_once(caplog: pytest.LogCaptureFixture) -> None:
    engine = ScriptedEngine(about={"crosschip": REPLACED})
    with scripted(engine) as [url], running_gateway(settings_of(table("a", url, kind="native"))):
        first = "engine a is UNCERTIFIED: it has no certificate"
        wait_until(lambda: first in caplog.text, "the reason is told at the first check")
        engine.about = CERTIFIED
        wait_until(lambda: "engine a is CERTIFIED" in caplog.text, "and so is the change")
        assert caplog.text.count(first) == 1


def test_an_engine_that_was_started_anew_is_another_one() -> None:
    """Its weights may be others under the same version, and it has computed none of the old one's prompts."""
    engine = ScriptedEngine(about={"crosschip": CERTIFIED["crosschip"] | {"instance": "1"}}, card={"max_model_len": 64})
    with scripted(engine) as [url], running_gateway(settings_of(table("a", url, kind="native"))) as gateway:
        fleet = gateway.gateway.fleet
        (state,) = fleet.engines
        wait_until(lambda: state.card.get("max_model_len") == 64, "the first check")
        httpx.post(f"{gateway.url}/v1/chat/completions", json=QUESTION)
        prefixes = Ask.of("m", QUESTION).digests
        assert fleet._prefixes.longest(prefixes) == "a"
        engine.card["max_model_len"] = 32
        engine.about = {"crosschip": CERTIFIED["crosschip"] | {"instance": "2"}}
        wait_until(lambda: state.card["max_model_len"] == 32, "the next check")
        assert (state.weights_version, state.instance) == ("1", "2")
        assert fleet._prefixes.longest(prefixes) is None


def test_an_engine_of_another_kind_that_was_down_is_another_one() -> None:
    engine = ScriptedEngine()
    with scripted(engine) as [url], running_gateway(settings_of(table("a", url))) as gateway:
        (state,) = gateway.gateway.fleet.engines
        wait_until(lambda: state.problem is None, "the first check")
        before = state.instance
        engine.well = False
        wait_until(lambda: state.problem is not None, "it is down")
        engine.well = True
        wait_until(lambda: state.problem is None, "it is up")
        assert state.instance != before


@pytest.mark.parametrize("streams", [True, False])
def test_an_answer_of_uncertified_weights_is_none_where_a_certificate_is_required(streams: bool) -> None:
    replaced = ScriptedEngine(play=[event(delta("wrong") | {"crosschip": REPLACED}), LAST, DONE], about=CERTIFIED)
    good = ScriptedEngine(play=[event(delta("right")), LAST, DONE], about=CERTIFIED)
    if not streams:
        whole = {"choices": [{"text": "", "finish_reason": "stop"}]}
        replaced.refusal = JSONResponse(whole | {"crosschip": REPLACED})
        good.refusal = JSONResponse(whole | {"choices": [{"text": "right", "finish_reason": "stop"}]})
    with scripted(replaced, good) as urls:
        tables = [table(name, url, kind="native") for name, url in zip("ab", urls, strict=True)]
        with running_gateway(settings_of(*tables, health={"interval_s": 60.0}), require_certificate=True) as gateway:
            body = QUESTION | {"stream": streams}
            responses = [httpx.post(f"{gateway.url}/v1/chat/completions", json=body) for _ in range(4)]
            assert all("right" in each.text and "wrong" not in each.text for each in responses)
            assert {each.headers["x-crosschip-engine"] for each in responses} == {"b"}
            assert len(replaced.sent) == 1  # after that it is known


def test_an_engine_that_fails_before_its_first_token_is_not_noticed() -> None:
    failing = ScriptedEngine(play=[HEAD, Broken()])
    good = ScriptedEngine()
    with scripted(failing, good) as urls:
        settings = settings_of(table("a", urls[0], weight=1000), table("b", urls[1]))
        with running_gateway(settings) as gateway:
            status, answer = stream_of(gateway.url)
            assert (status, answer) == (200, b"".join(good.play))
            assert len(failing.sent) == len(good.sent) == 1
            assert gateway.metric("crosschip_gateway_retries_total", engine="a", reason="lost") == 1


@pytest.mark.parametrize(
    "script",
    [
        ScriptedEngine(play=[event({"error": {"message": "out of memory", "type": "server_error"}})]),
        ScriptedEngine(refusal=JSONResponse({"error": {"message": "out of memory"}}, 500)),
        ScriptedEngine(refusal=JSONResponse({"error": {"message": "full"}}, 429)),
        ScriptedEngine(refusal=JSONResponse({"message": "your key is wrong"}, 401)),
        ScriptedEngine(play=[HEAD]),
        ScriptedEngine(play=[HEAD, 30]),
        ScriptedEngine(refusal=JSONResponse({"error": {"message": "out of memory"}})),
        ScriptedEngine(refusal=JSONResponse({"object": "error", "message": "out of memory"})),
        ScriptedEngine(refusal=Response("<html>Sign in</html>", media_type="text/html")),
        ScriptedEngine(refusal=Response('{"choices": [{"text": "Hel', media_type="application/json")),
        ScriptedEngine(refusal=Response()),
    ],
    ids=["error event", "500", "429", "401", "ended early", "silent", "error", "vllm", "page", "cut", "nothing"],
)
def test_another_engine_is_asked(script: ScriptedEngine) -> None:
    good = ScriptedEngine()
    with scripted(script, good) as urls:
        settings = settings_of(table("a", urls[0], weight=1000), table("b", urls[1]), forwarding={"first_token_s": 1})
        with running_gateway(settings) as gateway:
            assert stream_of(gateway.url) == (200, b"".join(good.play))
            assert len(script.sent) == 1


def test_an_engine_that_fails_after_its_first_token_is_told_and_not_asked_again() -> None:
    failing, good = ScriptedEngine(play=[HEAD, TOKEN, b'data: {"half', Broken()]), ScriptedEngine()
    with scripted(failing, good) as urls:
        settings = settings_of(table("a", urls[0], weight=1000), table("b", urls[1]))
        with running_gateway(settings) as gateway:
            status, answer = stream_of(gateway.url)
            assert status == 200
            assert answer.startswith(HEAD + TOKEN)
            rest = answer.removeprefix(HEAD + TOKEN)
            assert b"half" not in rest, "no part of an event is left behind"
            error = json.loads(rest.removeprefix(b"data: "))["error"]
            assert (error["code"], error["type"]) == ("engine_lost", "server_error")
            assert "engine a" in error["message"]
            assert good.sent == []
            client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)
            with pytest.raises(openai.APIError, match="engine a"):
                list(client.chat.completions.create(**QUESTION, stream=True))
            count = "crosschip_gateway_requests_total"
            wait_until(lambda: gateway.metric(count, engine="a", outcome="lost") == 2, "both are counted")


def test_a_request_that_kills_engines_is_not_sent_to_all_of_them() -> None:
    engines = [ScriptedEngine(play=[Broken()]) for _ in range(4)]
    with scripted(*engines) as urls:
        tables = [table(str(number), url) for number, url in enumerate(urls)]
        with running_gateway(settings_of(*tables)) as gateway:
            response = ask(gateway.url, stream=True)
            assert response.status_code == 502
            assert error_of(response)["code"] == "engine_lost"
            assert sum(len(engine.sent) for engine in engines) == 2, "the first attempt and one retry"


def test_full_engines_shed_load() -> None:
    busy = [ScriptedEngine(refusal=JSONResponse({}, 429, {"Retry-After": "7"})) for _ in range(2)]
    with scripted(*busy) as urls, running_gateway(settings_of(table("a", urls[0]), table("b", urls[1]))) as gateway:
        response = ask(gateway.url)
        assert (response.status_code, response.headers["retry-after"]) == (429, "7")
        assert error_of(response)["code"] == "engine_overloaded"
        assert all(len(engine.sent) == 1 for engine in busy), "each was asked"


def test_who_waits_too_long_or_with_too_many_is_refused() -> None:
    engine = ScriptedEngine(play=[HEAD, TOKEN, 2.0, LAST, DONE])
    settings = settings_of(table("a", "http://x", max_in_flight=1), forwarding={"max_waiting": 1, "max_wait_s": 0.5})
    with scripted(engine) as [url]:
        settings = settings.model_copy(update={"engines": [settings.engines[0].model_copy(update={"url": url})]})
        with running_gateway(settings) as gateway:
            statuses: list[int] = []
            threads = [threading.Thread(target=lambda: statuses.append(stream_of(gateway.url)[0])) for _ in range(4)]
            for thread in threads:
                thread.start()
                time.sleep(0.1)
            for thread in threads:
                thread.join()
            assert sorted(statuses) == [200, 429, 429, 429]
            wait_until(lambda: gateway.gateway.admission.num_under_way == 0, "every place is free again")


def test_waiting_requests_get_their_turn() -> None:
    engine = ScriptedEngine(play=[HEAD, TOKEN, 0.1, LAST, DONE])
    with scripted(engine) as [url], running_gateway(settings_of(table("a", url, max_in_flight=2))) as gateway:
        statuses: list[int] = []
        threads = [threading.Thread(target=lambda: statuses.append(stream_of(gateway.url)[0])) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert statuses == [200] * 12


def test_a_client_that_leaves_ends_its_request_on_the_engine() -> None:
    engine = ScriptedEngine(play=[HEAD, TOKEN, 60])
    with scripted(engine) as [url], running_gateway(settings_of(table("a", url))) as gateway:
        with httpx.stream("POST", f"{gateway.url}/v1/chat/completions", json=QUESTION | {"stream": True}) as response:
            next(response.iter_raw())
        wait_until(lambda: engine.cancelled == 1, "the engine is told")
        wait_until(lambda: gateway.gateway.admission.num_under_way == 0, "its place is free")
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{gateway.url}/v1/chat/completions", json=QUESTION, timeout=0.5)
        wait_until(lambda: engine.cancelled == 2, "before the first token, too")


@pytest.mark.parametrize(("play", "outcome"), [([DONE, 30.0], "ok"), ([30.0], "client_left")])
def test_a_client_that_closes_at_done_had_its_answer(play: list[Any], outcome: str) -> None:
    engine = ScriptedEngine(play=[HEAD, event(delta("hello")), LAST, *play])
    with scripted(engine) as (url,), running_gateway(settings_of(table("e", url))) as gateway:
        with httpx.stream("POST", f"{gateway.url}/v1/chat/completions", json=QUESTION | {"stream": True}) as response:
            for line in response.iter_lines():
                if "[DONE]" in line or ("finish_reason" in line and outcome != "ok"):
                    break
        count = "crosschip_gateway_requests_total"
        named = {"engine": "e" if outcome == "ok" else "", "outcome": outcome}
        wait_until(lambda: gateway.metric(count, **named) == 1, "it is counted")
        other = {"engine": "", "outcome": "client_left"} if outcome == "ok" else {"engine": "e", "outcome": "ok"}
        assert not gateway.metric(count, **other)


def test_a_client_that_does_not_read_ends_its_request_on_the_engine() -> None:
    engine = ScriptedEngine(play=[HEAD, *[event(delta("x" * 2**20))] * 64, 60])
    forwarding = {"slow_client_s": 0.5}
    with scripted(engine) as [url], running_gateway(settings_of(table("a", url), forwarding=forwarding)) as gateway:

        async def read_a_little() -> None:
            host, _, port = gateway.url.removeprefix("http://").partition(":")
            reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
            body = json.dumps(QUESTION | {"stream": True}).encode()
            about = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            head = f"POST /v1/chat/completions HTTP/1.1\r\n{about}"
            writer.write(head.encode() + body)
            await reader.read(100)
            await asyncio.to_thread(wait_until, lambda: engine.cancelled == 1, "the engine's answer is given up")
            writer.close()

        asyncio.run(read_a_little())
        assert gateway.metric("crosschip_gateway_requests_total", engine="", outcome="client_slow") == 1


def test_an_engine_that_is_down_comes_back() -> None:
    engine = ScriptedEngine()
    with scripted(engine) as [url], running_gateway(settings_of(table("a", url))) as gateway:
        assert httpx.get(f"{gateway.url}/ready").status_code == 200
        engine.well = False
        wait_until(lambda: httpx.get(f"{gateway.url}/ready").status_code == 503, "it is not ready")
        response = ask(gateway.url)
        assert (response.status_code, error_of(response)["code"]) == (503, "no_engine")
        assert "retry-after" in response.headers
        assert httpx.get(f"{gateway.url}/health").status_code == 200, "the gateway itself is well"
        engine.well = True
        wait_until(lambda: httpx.get(f"{gateway.url}/ready").status_code == 200, "it is ready again")


def test_a_group_without_a_share_is_not_waited_for() -> None:
    failing, idle = ScriptedEngine(refusal=JSONResponse({"error": {"message": "out of memory"}}, 500)), ScriptedEngine()
    with scripted(failing, idle) as urls:
        tables = table("a", urls[0]), table("b", urls[1], group="canary")
        splits = [{"model": "m", "shares": {"main": 100, "canary": 0}}]
        with running_gateway(settings_of(*tables, splits=splits, forwarding={"max_wait_s": 5.0})) as gateway:
            response = ask(gateway.url)
            assert (response.status_code, error_of(response)["code"]) == (502, "engine_lost")
            failing.well = False
            wait_until(lambda: httpx.get(f"{gateway.url}/ready").status_code == 503, "it is not ready")
            response = ask(gateway.url)
            assert (response.status_code, error_of(response)["code"]) == (503, "no_engine")
            assert "a: down; b: its group has a share of 0" in error_of(response)["message"]
            assert idle.sent == []


def test_an_engine_that_serves_another_model_gets_nothing() -> None:
    with scripted(ScriptedEngine(model="other")) as [url]:
        with running_gateway(settings_of(table("a", url)), wait_for=0) as gateway:
            problem = lambda: gateway.gateway.fleet.engines[0].problem or ""  # noqa: E731
            wait_until(lambda: "does not list" in problem(), "it is told")
            assert ask(gateway.url).status_code == 503
        with running_gateway(settings_of(table("a", url, upstream_model="other"))) as gateway:
            assert stream_of(gateway.url)[0] == 200


def test_an_engine_gets_its_own_key_and_not_the_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_KEY", "engine's")
    engine = ScriptedEngine()
    with scripted(engine) as [url], running_gateway(settings_of(table("a", url, api_key_env="ENGINE_KEY"))) as gateway:
        headers = {"authorization": "Bearer client's"}
        httpx.post(f"{gateway.url}/v1/chat/completions", json=QUESTION, headers=headers)
        assert engine.keys == ["Bearer engine's"]


def test_what_no_engine_could_answer_is_refused_here() -> None:
    engine = ScriptedEngine()
    with (
        scripted(engine) as [url],
        running_gateway(
            settings_of(table("a", url), table("b", url, model="n"), health={"failures": 9}), wait_for=1
        ) as gateway,
    ):
        post = f"{gateway.url}/v1/chat/completions"
        kind = {"content-type": "application/json"}
        assert ask(gateway.url, model="zzz").status_code == 404
        assert ask(gateway.url, model=7).status_code == 400
        for stream in (1, "true", [], {}):  # what the engine may read as true, and the gateway would not
            response = ask(gateway.url, stream=stream)
            assert (response.status_code, error_of(response)["param"]) == (400, "stream")
        assert ask(gateway.url, model=None).status_code == 400, "two models, and none is named"
        for content in (b"", b"{", b"[]", b"\xff", b"[" * 200_000, b'{"model": ' + b"1" * 10_000 + b"}"):
            response = httpx.post(post, content=content, headers=kind)
            assert response.status_code == 400, content[:20]
            assert error_of(response)["type"] == "invalid_request_error"
        assert httpx.post(post, content=b"{}", headers={"content-type": "text/plain"}).status_code == 400
        assert httpx.get(post).status_code == 405
        assert httpx.get(f"{gateway.url}/nowhere").status_code == 404
        assert engine.sent == []
