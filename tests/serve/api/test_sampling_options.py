"""Penalties, biases, min-p and choices reach the engine; ids of prompts and versions of weights come back."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import httpx
import openai

from crosschip.rundir import write_json
from crosschip.serve import load_engine
from crosschip.serve.api.server import background_server
from tests.serve.conftest import CONVERSATIONS, RunningServer

GREEDY = {"prompt": [5, 6, 7], "max_tokens": 24, "temperature": 0, "ignore_eos": True, "return_token_ids": True}


def ids_of(server: RunningServer, **more: Any) -> list[int]:
    response = httpx.post(f"{server.url}/v1/completions", json=GREEDY | more, timeout=60)
    assert response.status_code == 200, response.text
    return list(response.json()["choices"][0]["token_ids"])


def test_a_bias_forces_and_forbids(random_server: RunningServer) -> None:
    plain = ids_of(random_server)
    assert ids_of(random_server, logit_bias={"9": 100}) == [9] * 24
    assert plain[0] not in ids_of(random_server, logit_bias={str(plain[0]): -100})
    assert ids_of(random_server, logit_bias={"9": 0}) == plain


def test_penalties_are_off_what_was_said(random_server: RunningServer) -> None:
    two = {"logit_bias": {"9": 100, "10": 100}}
    plain = ids_of(random_server, **two)
    assert ids_of(random_server, **two, presence_penalty=0, frequency_penalty=0) == plain
    assert ids_of(random_server, **two, frequency_penalty=-2.0) == [plain[0]] * 24, "what was said is likelier"
    frequent = ids_of(random_server, **two, frequency_penalty=2.0)
    assert frequent[0] == plain[0]
    assert set(frequent) == {9, 10}
    assert 8 <= frequent.count(9) <= 16
    assert ids_of(random_server, **two, presence_penalty=-2.0)[:2] == [plain[0]] * 2


def test_a_min_p_of_1_is_greedy(random_server: RunningServer) -> None:
    drawn = {"temperature": 1.0, "seed": 11}
    assert ids_of(random_server, **drawn, min_p=1.0) == ids_of(random_server)
    assert ids_of(random_server, **drawn) != ids_of(random_server)
    assert ids_of(random_server, repetition_penalty=5.0) != ids_of(random_server)


def test_choices_of_one_prompt_are_those_of_single_requests(random_server: RunningServer) -> None:
    body = GREEDY | {"temperature": 1.0, "seed": 3, "n": 3}
    choices = httpx.post(f"{random_server.url}/v1/completions", json=body, timeout=60).json()["choices"]
    assert len({tuple(choice["token_ids"]) for choice in choices}) == 3
    assert choices[0]["token_ids"] == ids_of(random_server, temperature=1.0, seed=3)
    assert all(choice["prompt_token_ids"] == [5, 6, 7] for choice in choices)


def test_a_seed_gives_a_prompt_its_answer_whatever_is_asked_beside_it(random_server: RunningServer) -> None:
    drawn: dict[str, Any] = {"temperature": 1.0, "seed": 3, "n": 2}
    both = GREEDY | drawn | {"prompt": [[8, 9], [5, 6, 7]]}
    choices = httpx.post(f"{random_server.url}/v1/completions", json=both, timeout=60).json()["choices"]
    alone = httpx.post(f"{random_server.url}/v1/completions", json=GREEDY | drawn, timeout=60).json()["choices"]
    assert [choice["token_ids"] for choice in choices[2:]] == [choice["token_ids"] for choice in alone]


def test_a_stream_tells_the_ids_of_its_prompt_once(taught_server: RunningServer) -> None:
    client = openai.OpenAI(base_url=f"{taught_server.url}/v1", api_key="none")
    messages: Any = [{"role": "user", "content": CONVERSATIONS[0][0]}]
    arguments: dict[str, Any] = {"model": "taught-tiny", "temperature": 0, "extra_body": {"return_token_ids": True}}
    chunks = list(client.chat.completions.create(messages=messages, stream=True, **arguments))
    told = [chunk.prompt_token_ids for chunk in chunks if hasattr(chunk, "prompt_token_ids")]
    whole = client.chat.completions.create(messages=messages, **arguments)
    assert told == [whole.prompt_token_ids]  # type: ignore[attr-defined]
    assert len(told[0]) == whole.usage.prompt_tokens
    assert all(chunk.crosschip["weights_version"] == "1" for chunk in chunks)  # type: ignore[attr-defined]


def test_figures_are_told_and_hold_no_words(taught_server: RunningServer) -> None:
    body = {"messages": [{"role": "user", "content": "zebra-secret"}], "max_tokens": 3}
    httpx.post(f"{taught_server.url}/v1/chat/completions", json=body)
    text = httpx.get(f"{taught_server.url}/metrics").text
    assert 'crosschip_answers_total{outcome="ended"}' in text
    assert 'crosschip_tokens_total{kind="completion"}' in text
    assert 'weights_version="1"' in text
    assert "crosschip_time_to_first_token_seconds_count" in text
    assert "zebra" not in text
    assert httpx.get(f"{taught_server.url}/ready").json() == {"ready": True}


def test_filters_that_are_the_models_own_are_named(random_dir: Path, tmp_path: Path) -> None:
    """They are not in the request, so leaving them out does not help."""
    directory = shutil.copytree(random_dir, tmp_path / "filtering")
    write_json(directory / "generation_config.json", {"do_sample": True, "top_p": 0.9, "top_k": 5})
    body = {"prompt": [5, 6, 7], "max_tokens": 4, "logprobs": 0, "logprobs_mode": "processed_logprobs"}
    with background_server(load_engine(directory, max_batch_size=1)) as url:
        for given, to_send in (({}, "top_p: 1, top_k: 0"), ({"top_p": 1}, "top_k: 0")):
            response = httpx.post(f"{url}/v1/completions", json=body | given, timeout=60)
            assert response.status_code == 400
            assert response.json()["error"]["message"].endswith(f"sets what was left out, so send {to_send}")
        told = body | {"top_p": 1, "top_k": 0}
        assert httpx.post(f"{url}/v1/completions", json=told, timeout=60).status_code == 200
