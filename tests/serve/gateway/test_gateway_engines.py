"""The gateway before real engines in processes of their own, which are killed and drained."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai

from crosschip.serve.gateway.settings import GatewaySettings
from tests.serve.conftest import CONVERSATIONS, REASONING, RunningServer, running_server
from tests.serve.gateway.conftest import RunningGateway, running_gateway, settings_of, wait_until

GREEDY = {"temperature": 0, "ignore_eos": True, "max_tokens": 16}


ANSWER_TOKENS = 160  # so many that an engine can be killed among them


def before(*servers: RunningServer, model: str = "random-tiny", **tables: Any) -> GatewaySettings:
    engines = [
        {"name": f"e{number}", "url": server.url, "model": model, "kind": "native", "chip": "cpu"}
        for number, server in enumerate(servers)
    ]
    return settings_of(*engines, **tables)


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


def test_the_openai_client_sees_no_gateway(taught_server: RunningServer) -> None:
    with running_gateway(before(taught_server, model="taught-tiny")) as gateway:
        client = client_of(gateway.url)
        assert [model.id for model in client.models.list().data] == ["taught-tiny"]
        card: Any = client.models.retrieve("taught-tiny")
        assert (card.crosschip["certificate"], card.max_model_len) == ("UNCERTIFIED", 2048)
        question: Any = [{"role": "user", "content": CONVERSATIONS[0][0]}]
        raw = client.chat.completions.with_raw_response.create(model="taught-tiny", messages=question, temperature=0)
        assert raw.headers["x-crosschip-engine"] == "e0"
        assert raw.headers["x-crosschip-certificate"] == "UNCERTIFIED"
        message: Any = raw.parse().choices[0].message
        assert (message.content, message.reasoning_content) == (CONVERSATIONS[0][2], REASONING)
        chunks = client.chat.completions.create(model="taught-tiny", messages=question, temperature=0, stream=True)
        deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
        assert "".join(delta.content or "" for delta in deltas) == CONVERSATIONS[0][2]
        # The client has its last bytes before the gateway has counted them.
        count = "crosschip_gateway_requests_total"
        wait_until(lambda: gateway.metric(count, engine="e0", outcome="ok") == 2, "both are counted")
        text = httpx.get(f"{gateway.url}/metrics").text
        assert 'crosschip_gateway_engine_info{certificate="UNCERTIFIED",chip="cpu",engine="e0"' in text
        assert 'weights_version="1"' in text
        assert CONVERSATIONS[0][0] not in text
        assert gateway.metric("crosschip_gateway_time_per_output_token_seconds_count", engine="e0") == 1


def test_a_prompts_beginning_stays_with_its_engine(
    random_server: RunningServer, second_random_server: RunningServer
) -> None:
    with running_gateway(before(random_server, second_random_server)) as gateway:

        def engine_of(prompt: str) -> str:
            body = {"model": "random-tiny", "prompt": prompt, "max_tokens": 1}
            return httpx.post(f"{gateway.url}/v1/completions", json=body).headers["x-crosschip-engine"]

        beginning = "The quick brown fox jumps. " * 12
        assert len({engine_of(beginning + str(number)) for number in range(6)}) == 1


def test_an_engine_that_is_killed_loses_only_what_it_had_begun(random_dir: Path) -> None:
    """Every request ends: right, or with an error that says so; and those with an error were on the dead engine."""
    with running_server(random_dir, max_batch_size=8) as first, running_server(random_dir, max_batch_size=8) as second:
        settings = before(first, second, forwarding={"affinity_slack": 0}, health={"interval_s": 0.2})
        with running_gateway(settings) as gateway:
            client = client_of(gateway.url)
            prompts = [[5, 6, number] for number in range(8)]
            right = {str(prompt): _greedy(client, prompt, None) for prompt in prompts}
            on_first = threading.Semaphore(0)
            outcomes: list[tuple[str, str, str]] = []

            def one(number: int) -> None:
                prompt = prompts[number % 8]
                outcomes.append(_stream(client, prompt, right[str(prompt)], on_first))

            with ThreadPoolExecutor(16) as pool:
                waiting = [pool.submit(one, number) for number in range(64)]
                for _ in range(4):
                    assert on_first.acquire(timeout=60), "four requests have begun on the first engine"
                first.process.send_signal(signal.SIGKILL)
                for each in waiting:
                    each.result(120)
            counts = Counter((engine, outcome) for engine, outcome, _ in outcomes)
            assert len(outcomes) == 64
            lost = [words for _, outcome, words in outcomes if outcome == "lost"]
            assert 1 <= len(lost) <= 16, counts
            assert all("engine e0" in words and "ask again" in words for words in lost), lost
            assert all(engine == "e0" for engine, outcome in counts if outcome == "lost"), counts
            assert {outcome for _, outcome in counts} == {"right", "lost"}, counts
            assert counts["e1", "right"] >= 64 - len(lost) - counts["e0", "right"]
            assert gateway.gateway.fleet.engines[0].problem is not None
            wait_until(lambda: gateway.gateway.admission.num_under_way == 0, "every place is free again")
            assert _greedy(client, prompts[0], None) == right[str(prompts[0])]


def _greedy(client: openai.OpenAI, prompt: list[int], stream: None) -> str:
    extra = {"ignore_eos": True}
    answer = client.completions.create(
        model="random-tiny", prompt=prompt, temperature=0, max_tokens=ANSWER_TOKENS, extra_body=extra
    )
    return answer.choices[0].text


def _stream(
    client: openai.OpenAI, prompt: list[int], right: str, on_first: threading.Semaphore
) -> tuple[str, str, str]:
    engine, text = "?", ""
    try:
        with client.completions.with_streaming_response.create(
            model="random-tiny",
            prompt=prompt,
            temperature=0,
            max_tokens=ANSWER_TOKENS,
            stream=True,
            extra_body={"ignore_eos": True},
        ) as response:
            engine = response.headers["x-crosschip-engine"]
            if engine == "e0":
                on_first.release()
            for chunk in response.parse():
                text += chunk.choices[0].text
    except openai.APIError as error:
        return engine, "lost", str(error)
    return engine, "right" if text == right else "WRONG", text


def test_a_drained_engine_ends_what_it_has_and_gets_no_more(
    random_server: RunningServer, second_random_server: RunningServer
) -> None:
    with running_gateway(before(random_server, second_random_server)) as gateway:
        fleet, admission = gateway.gateway.fleet, gateway.gateway.admission
        fleet.engines[0].draining = True
        admission.assign()
        body = {"model": "random-tiny", "prompt": [5, 6], "max_tokens": 1}
        engines = {
            httpx.post(f"{gateway.url}/v1/completions", json=body).headers["x-crosschip-engine"] for _ in range(6)
        }
        assert engines == {"e1"}
        fleet.engines[1].draining = True
        assert httpx.post(f"{gateway.url}/v1/completions", json=body).status_code == 503
        fleet.engines[0].draining = False
        assert httpx.post(f"{gateway.url}/v1/completions", json=body).headers["x-crosschip-engine"] == "e0"


def test_a_required_certificate_keeps_the_uncertified_out(random_server: RunningServer) -> None:
    with running_gateway(before(random_server), require_certificate=True) as gateway:
        response = httpx.post(f"{gateway.url}/v1/completions", json={"model": "random-tiny", "prompt": [5]})
        assert response.status_code == 503
        assert "UNCERTIFIED" in response.json()["error"]["message"]


def test_many_requests_cancelled_and_malformed_among_them(
    random_server: RunningServer, second_random_server: RunningServer
) -> None:
    with running_gateway(before(random_server, second_random_server)) as gateway:
        mixed_load(gateway, random.Random(0), num_requests=100, num_in_flight=16)


def mixed_load(gateway: RunningGateway, rng: random.Random, num_requests: int, num_in_flight: int) -> Counter[str]:
    """A tenth cancelled, a tenth malformed; every good one is answered right."""
    prompts = [[5, 6, number] for number in range(10)]
    http = httpx.Client(base_url=gateway.url, timeout=120, limits=httpx.Limits(max_connections=num_in_flight + 1))
    right = {}
    for prompt in prompts:
        body = {"model": "random-tiny", "prompt": prompt, **GREEDY}
        right[str(prompt)] = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    kinds = ["cancelled"] * (num_requests // 10) + ["malformed"] * (num_requests // 10)
    kinds += ["good"] * (num_requests - len(kinds))
    rng.shuffle(kinds)

    def one(number: int) -> str:
        kind, prompt = kinds[number], prompts[number % 10]
        body: dict[str, Any] = {"model": "random-tiny", "prompt": prompt, **GREEDY}
        if kind == "malformed":
            wrong = [{"prompt": {}}, {"temperature": "hot"}, {"max_tokens": 10**9}, {"logprobs": 99}, {"n": 0}]
            response = http.post("/v1/completions", json=body | wrong[number % 5])
            return kind if response.status_code == 400 else f"malformed: {response.status_code}"
        if kind == "cancelled":
            with http.stream("POST", "/v1/completions", json=body | {"stream": True, "max_tokens": 500}) as stream:
                next(stream.iter_raw())
            return kind
        response = http.post("/v1/completions", json=body)
        if response.status_code != 200:
            return f"good: {response.status_code} {response.text[:200]}"
        return kind if response.json()["choices"][0]["text"] == right[str(prompt)] else "good: WRONG"

    with ThreadPoolExecutor(num_in_flight) as pool:
        counts = Counter(pool.map(one, range(num_requests)))
    http.close()
    assert counts == Counter(kinds), counts
    wait_until(lambda: gateway.gateway.admission.num_under_way == 0, "every place is free again")
    return counts


def test_a_version_that_changes_is_seen(random_server: RunningServer) -> None:
    with running_gateway(before(random_server)) as gateway:
        engine = gateway.gateway.fleet.engines[0]
        assert engine.weights_version == "1"
        engine.weights_version = "old"
        wait_until(lambda: engine.weights_version == "1", "the next check tells")
        deadline = time.monotonic() + 5
        while 'weights_version="old"' in httpx.get(f"{gateway.url}/metrics").text:
            assert time.monotonic() < deadline, "the old version stays beside the new one"
