"""Routed experts over HTTP: what training needs to take the same ones."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from crosschip.model import load_model
from crosschip.serve import load_engine
from crosschip.serve.api.server import background_server
from tests.serve.conftest import RunningServer

BODY = {
    "max_tokens": 12, "logprobs": 0, "return_token_ids": True, "return_routed_experts": True, "ignore_eos": True,
    "temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def recording(random_dir: Path) -> Iterator[str]:
    engine = load_engine(random_dir, max_batch_size=6, max_model_len=128, record_routes=True)
    with background_server(engine) as url:
        yield url


def routes_of(choice: dict[str, Any]) -> torch.Tensor:
    told = choice["routed_experts"]
    array = np.frombuffer(base64.b64decode(told["data"]), dtype=told["dtype"]).reshape(told["shape"])
    return torch.from_numpy(array.astype(np.int64))


def test_every_choices_routes_replay_to_its_log_probs(recording: str, random_dir: Path) -> None:
    model = load_model(random_dir)
    prompts = [[5, 6, 7, 8, 9], list(range(10, 60))]
    response = httpx.post(f"{recording}/v1/completions", json=BODY | {"prompt": prompts, "n": 4}, timeout=60)
    assert response.status_code == 200, response.text
    choices = response.json()["choices"]
    assert len({tuple(choice["token_ids"]) for choice in choices}) == 8
    for choice in choices:
        prompt = prompts[choice["index"] // 4]
        ids = torch.tensor([prompt + choice["token_ids"]])
        routes = routes_of(choice)
        assert choice["routed_experts"]["dtype"] == "uint8"
        assert routes.shape == (ids.shape[1] - 1, 1, 2)
        assert choice["weights_version"] == response.json()["crosschip"]["weights_version"] == "1"
        told = torch.tensor(choice["logprobs"]["token_logprobs"])
        with torch.no_grad():
            replayed, other = (
                model.logprobs(ids[:, :-1], ids[:, 1:], routes=each[None]).logprobs_BT[0, len(prompt) - 1 :]
                for each in (routes, (routes + 1) % 4)
            )
        assert torch.allclose(replayed, told, atol=1e-4, rtol=0)  # logits of size 10, see TOLERANCE in engines.py
        assert not torch.allclose(other, told, atol=1e-2, rtol=0), "the negative control"


def test_a_streams_last_chunk_has_them(recording: str) -> None:
    with httpx.stream("POST", f"{recording}/v1/completions", json=BODY | {"prompt": [5], "stream": True}) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    choices = [json.loads(line)["choices"][0] for line in lines[:-1]]
    assert [choice["finish_reason"] for choice in choices if "routed_experts" in choice] == ["length"]
    assert routes_of(choices[-1]).shape == (12, 1, 2)
    assert choices[-1]["weights_version"] == "1"


def test_who_does_not_ask_gets_none(recording: str) -> None:
    body = {key: value for key, value in BODY.items() if key != "return_routed_experts"} | {"prompt": [5]}
    for more in ({}, {"return_routed_experts": False}):
        response = httpx.post(f"{recording}/v1/completions", json=body | more)
        assert "routed_experts" not in response.json()["choices"][0]


def test_what_cannot_be_returned_is_refused_with_the_remedy(recording: str, random_server: RunningServer) -> None:
    def refusal(url: str, **more: Any) -> str:
        response = httpx.post(f"{url}/v1/completions", json=BODY | {"prompt": [5]} | more)
        assert response.status_code == 400, response.text
        return str(response.json()["error"]["message"])

    assert "--record-routes" in refusal(random_server.url)
    assert "stop_token_ids" in refusal(recording, stop="x")
    chat = {"messages": [{"role": "user", "content": "Hi"}], "return_routed_experts": True, "max_tokens": 4}
    response = httpx.post(f"{recording}/v1/chat/completions", json=chat)
    assert response.status_code == 400
    assert "return_routed_experts" in response.json()["error"]["message"]


def test_log_probs_as_drawn_are_the_models_at_the_temperature(recording: str, random_dir: Path) -> None:
    model = load_model(random_dir)
    body = BODY | {"prompt": [5, 6, 7], "temperature": 0.6, "n": 3, "logprobs": 2}

    def told(**more: Any) -> list[dict[str, Any]]:
        response = httpx.post(f"{recording}/v1/completions", json=body | more, timeout=60)
        assert response.status_code == 200, response.text
        found: list[dict[str, Any]] = response.json()["choices"]
        return found

    for mode, temperature in ((None, 1.0), ("raw_logprobs", 1.0), ("processed_logprobs", 0.6)):
        for choice in told(logprobs_mode=mode):
            ids = torch.tensor([[5, 6, 7, *choice["token_ids"]]])
            with torch.no_grad():
                expected = model.logprobs(ids[:, :-1], ids[:, 1:], temperature=temperature).logprobs_BT[0, 2:]
            found = torch.tensor(choice["logprobs"]["token_logprobs"])
            assert torch.allclose(found, expected, atol=1e-4, rtol=0)
            for own, top in zip(found.tolist(), choice["logprobs"]["top_logprobs"], strict=True):
                assert max(top.values()) >= own - 1e-6
    drawn = [[choice["token_ids"] for choice in told(logprobs_mode=mode)] for mode in (None, "processed_logprobs")]
    assert drawn[0] == drawn[1], "what is drawn does not depend on what is told"


@pytest.mark.parametrize(
    "more", [{"top_p": 0.9}, {"presence_penalty": 1.0}, {"logit_bias": {"5": 1.0}}, {"echo": True}]
)
def test_log_probs_as_drawn_are_refused_beside_what_is_not_drawn(recording: str, more: dict[str, Any]) -> None:
    body = BODY | {"prompt": [5, 6, 7], "logprobs_mode": "processed_logprobs"} | more
    response = httpx.post(f"{recording}/v1/completions", json=body, timeout=60)
    assert response.status_code == 400
    assert "raw_logprobs" in response.json()["error"]["message"]
