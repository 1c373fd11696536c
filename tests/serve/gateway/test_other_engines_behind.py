"""vLLM and llama.cpp behind the gateway beside a native engine, the same model on each, and one of them is killed."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
import torch

from crosschip.data import ChatTokenizer
from crosschip.model import save_model
from tests.engines.other_engines import SIZES, skip_without, started_engine
from tests.serve.conftest import TEXTS, make_model, tiny_config
from tests.serve.gateway.conftest import RunningGateway, running_gateway, settings_of, wait_until

pytestmark = [pytest.mark.engines, pytest.mark.slow]

LENGTH = 256
KINDS = ("native", "vllm", "llamacpp")
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


@dataclass
class Fleet:
    """A gateway before one engine of each kind, and how llama.cpp is killed."""

    gateway: RunningGateway
    kill_llamacpp: ExitStack

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.gateway.url}/v1", api_key="-", max_retries=0, timeout=120)


def table(kind: str, url: str, name: str, model: str) -> dict[str, Any]:
    listed = httpx.get(f"{url}/v1/models", timeout=30, trust_env=False).json()["data"][0]["id"]
    return {"name": name, "url": url, "model": model, "upstream_model": listed, "kind": kind, "chip": "cpu"}


@pytest.fixture(scope="module")
def fleet(tokenizer: ChatTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    skip_without(*KINDS)
    place = tmp_path_factory.mktemp("fleet")
    sizes = {**SIZES, "max_position_embeddings": LENGTH, "eos_token_id": tokenizer.eos_id}
    model = make_model(tiny_config(tokenizer.vocab_size, **sizes), seed=3)
    save_model(model, place / "model", torch.float32)
    tokenizer.save(place / "model")
    with ExitStack() as stack:
        urls = {}
        for kind in KINDS:
            killing = stack.enter_context(ExitStack())
            urls[kind] = killing.enter_context(started_engine(kind, place / "model", place, LENGTH)).url
        tables = [table(kind, url, f"only-{kind}", kind) for kind, url in urls.items()]
        tables += [table(kind, url, f"any-{kind}", "any") for kind, url in urls.items()]
        with running_gateway(settings_of(*tables, forwarding={"retries": 1})) as gateway:
            yield Fleet(gateway, killing)  # llama.cpp is the last one


@pytest.mark.parametrize("kind", KINDS)
def test_completions_chats_and_streams_pass_through(fleet: Fleet, kind: str) -> None:
    client, question = fleet.client, [{"role": "user", "content": "What is 12 + 30?"}]
    whole = client.completions.create(model=kind, prompt="The quick brown", **GREEDY)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12
    parts = list(client.completions.create(model=kind, prompt="The quick brown", stream=True, **GREEDY))
    assert "".join(part.choices[0].text for part in parts if part.choices) == whole.choices[0].text
    chat = client.chat.completions.create(model=kind, messages=question, **GREEDY)  # type: ignore[arg-type]
    assert chat.choices[0].finish_reason in ("length", "stop")
    streamed = list(
        client.chat.completions.create(
            model=kind,
            messages=question,  # type: ignore[arg-type]
            stream=True,
            stream_options={"include_usage": True},
            **GREEDY,
        )
    )
    said = "".join(part.choices[0].delta.content or "" for part in streamed if part.choices)
    assert said == (chat.choices[0].message.content or "")
    assert streamed[-1].usage is not None
    assert chat.usage is not None
    assert streamed[-1].usage.completion_tokens == chat.usage.completion_tokens


def first_logprob(fleet: Fleet, kind: str, prompt: str) -> float | None:
    """Of the greedy token; llama.cpp has the form of chats, and none for a token that is part of a character."""
    body = {"model": kind, "prompt": prompt, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    answer = httpx.post(f"{fleet.gateway.url}/v1/completions", json=body, timeout=120).json()
    told = answer["choices"][0]["logprobs"]
    if kind == "llamacpp":
        return told["content"][0]["logprob"] if told and told["content"] else None
    logprob: float = told["token_logprobs"][0]
    return logprob


def test_the_engines_say_the_same_of_one_model(fleet: Fleet) -> None:
    """The gateway reached three engines over the same weights, all in fp32."""
    words = TEXTS[2].split()
    prompts = [" ".join(words[: number + 1]) for number in range(len(words))]
    ours = {prompt: first_logprob(fleet, "native", prompt) for prompt in prompts}
    for kind in KINDS[1:]:
        theirs = {prompt: first_logprob(fleet, kind, prompt) for prompt in prompts}
        told = [prompt for prompt in prompts if theirs[prompt] is not None]
        assert len(told) >= 3, kind
        assert [theirs[prompt] for prompt in told] == pytest.approx([ours[prompt] for prompt in told], abs=1e-3)


def test_a_killed_engine_costs_no_answer_that_had_not_begun(fleet: Fleet) -> None:
    """Whole answers have sent nothing before they are complete, so each is asked for again elsewhere."""
    url, body = (
        f"{fleet.gateway.url}/v1/completions",
        {"model": "any", "prompt": "The quick", **GREEDY, "max_tokens": 60},
    )
    with ThreadPoolExecutor(9) as pool:
        answers = [pool.submit(httpx.post, url, json=body, timeout=120) for _ in range(45)]
        wait_until(lambda: sum(answer.done() for answer in answers) >= 9, "answers come")
        fleet.kill_llamacpp.close()
        assert {answer.result().status_code for answer in answers} == {200}
    engines = {engine.name: engine for engine in fleet.gateway.gateway.fleet.engines}
    wait_until(lambda: engines["any-llamacpp"].problem is not None, "its end is noticed")
    assert httpx.post(url, json=body, timeout=120).status_code == 200
    gone = httpx.post(url, json=body | {"model": "llamacpp"}, timeout=120)
    assert gone.status_code in (502, 503)
    assert gone.json()["error"]["message"]
