"""The official `openai` client against a server in its own process."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from crosschip.data import ChatTokenizer, Message
from crosschip.model import load_model
from tests.serve.conftest import CONVERSATIONS, REASONING, RunningServer

# fp32 log-probs summed in another order, logits of size ~10 (see test_engine).
TOLERANCE = 1e-4
QUESTION = [{"role": "user", "content": CONVERSATIONS[0][0]}]


def client_of(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture
def taught(taught_server: RunningServer) -> openai.OpenAI:
    return client_of(taught_server)


@pytest.fixture
def random_client(random_server: RunningServer) -> openai.OpenAI:
    return client_of(random_server)


def wait_until_idle(url: str, num_slots: int) -> None:
    """Wait for what is promised to come soon; a slot that never comes back fails the test."""
    for _ in range(200):
        if httpx.get(f"{url}/health").json()["free_slots"] == num_slots:
            return
        time.sleep(0.05)
    raise AssertionError(f"slots were not freed: {httpx.get(f'{url}/health').json()}")


def test_the_model_is_listed_with_its_certificate(taught: openai.OpenAI, taught_dir: Path) -> None:
    models = taught.models.list().data
    assert [model.id for model in models] == ["taught-tiny"]
    assert models[0].crosschip["certificate"] == "UNCERTIFIED"  # type: ignore[attr-defined]
    told = models[0].crosschip["model_dir"]  # type: ignore[attr-defined]
    assert told == taught_dir.name, "where it is on the server is nobody's business"
    assert taught.models.retrieve("taught-tiny").id == "taught-tiny"
    with pytest.raises(openai.NotFoundError):
        taught.models.retrieve("other")


def test_a_chat_gives_reasoning_and_answer_apart(taught: openai.OpenAI) -> None:
    raw = taught.chat.completions.with_raw_response.create(model="taught-tiny", messages=QUESTION, temperature=0)
    assert raw.headers["X-Crosschip-Certificate"] == "UNCERTIFIED"
    answer = raw.parse()
    assert answer.crosschip["certificate"] == "UNCERTIFIED"
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content == CONVERSATIONS[0][2]
    assert choice.message.reasoning_content == REASONING
    assert choice.finish_reason == "stop"
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_a_stream_gives_the_same_piece_by_piece(taught: openai.OpenAI, conversation: Any) -> None:
    question, reasoning, answer = conversation
    chunks = list(
        taught.chat.completions.create(
            model="taught-tiny",
            messages=[{"role": "user", "content": question}],
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == answer
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == (reasoning or "")
    assert not any("�" in (delta.content or "") for delta in deltas)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 0
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert all(chunk.crosschip["certificate"] == "UNCERTIFIED" for chunk in chunks)


def test_stop_strings_do_not_leak_into_a_stream(taught: openai.OpenAI) -> None:
    stream = taught.chat.completions.create(
        model="taught-tiny",
        messages=[{"role": "user", "content": "Count."}],
        temperature=0,
        stream=True,
        stop=[" 13", "never"],
    )
    chunks = [chunk.choices[0] for chunk in stream]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == "1 2 3 4 5 6 7 8 9 10 11 12"
    assert chunks[-1].finish_reason == "stop"


def test_a_limit_of_tokens_ends_with_length(taught: openai.OpenAI) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = taught.chat.completions.create(model="taught-tiny", messages=QUESTION, temperature=0, **{name: 5})
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 5
        assert answer.choices[0].message.content == ""
        assert REASONING.startswith(answer.choices[0].message.reasoning_content)


def test_chat_logprobs_name_each_token(taught: openai.OpenAI) -> None:
    arguments = {"model": "taught-tiny", "messages": QUESTION, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    whole = taught.chat.completions.create(**arguments)
    tokens = whole.choices[0].logprobs.content
    assert len(tokens) == whole.usage.completion_tokens
    assert tokens[0].token == "<think>"
    assert all(len(token.top_logprobs) == 3 for token in tokens)
    assert all(token.top_logprobs[0].logprob == pytest.approx(token.logprob) for token in tokens), "greedy"
    spoken = b"".join(bytes(token.bytes) for token in tokens[:-1]).decode()
    assert spoken == f"<think>{REASONING}</think>{CONVERSATIONS[0][2]}"
    chunks = list(taught.chat.completions.create(**arguments, stream=True))
    streamed = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert [token.token for token in streamed] == [token.token for token in tokens]


def test_a_completion_continues_text(taught: openai.OpenAI) -> None:
    prompt = f"<|bos|><|user|>{CONVERSATIONS[0][0]}<|assistant|>"
    arguments = {"model": "taught-tiny", "prompt": prompt, "temperature": 0, "max_tokens": 200}
    answer = taught.completions.create(**arguments)
    assert answer.choices[0].text == f"<think>{REASONING}</think>{CONVERSATIONS[0][2]}"
    echoed = taught.completions.create(**arguments, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in echoed) == prompt + answer.choices[0].text


def test_a_completion_that_names_no_length_ends_after_16_tokens_and_a_chat_at_its_own_end(
    random_client: openai.OpenAI, taught: openai.OpenAI
) -> None:
    endless = {"ignore_eos": True}
    answer = random_client.completions.create(model="random-tiny", prompt=[5, 6, 7], extra_body=endless)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (16, "length")
    almost_full = random_client.completions.create(model="random-tiny", prompt=[5] * 2040, extra_body=endless)
    assert almost_full.usage.completion_tokens == 8
    chat = taught.chat.completions.create(model="taught-tiny", messages=QUESTION, temperature=0)
    assert chat.usage.completion_tokens > 16
    assert chat.choices[0].finish_reason == "stop"


def test_prompts_and_choices_are_numbered_in_order(random_client: openai.OpenAI) -> None:
    arguments = {"model": "random-tiny", "prompt": [[5, 6], [7, 8, 9]], "max_tokens": 4, "n": 2, "seed": 3}
    answer = random_client.completions.create(**arguments, extra_body={"return_token_ids": True})
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    ids = [choice.token_ids for choice in answer.choices]
    assert all(len(each) == 4 for each in ids)
    assert ids[0] != ids[1], "choices of one prompt differ"
    assert answer.usage.prompt_tokens == 5
    assert answer.usage.completion_tokens == 16
    again = random_client.completions.create(**arguments, extra_body={"return_token_ids": True})
    assert [choice.token_ids for choice in again.choices] == ids, "a seed gives the same again"
    texts = random_client.completions.create(model="random-tiny", prompt=["What", "Der Fluß"], max_tokens=2)
    assert len(texts.choices) == 2


def expected_logprobs(directory: Path, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = load_model(directory).forward(torch.tensor([ids]))[0]
    return torch.log_softmax(logits.double(), -1)


@pytest.mark.parametrize("max_tokens", [0, 3])
@pytest.mark.parametrize("as_text", [True, False])
def test_echo_with_logprobs_scores_the_prompt(
    random_client: openai.OpenAI, random_dir: Path, tokenizer: ChatTokenizer, max_tokens: int, as_text: bool
) -> None:
    text = "Привет, мир! 12 + 30 🙂 Fluß"
    ids = tokenizer.encode(text)
    answer = random_client.completions.create(
        model="random-tiny",
        prompt=text if as_text else ids,
        max_tokens=max_tokens,
        temperature=0,
        echo=True,
        logprobs=2,
        extra_body={"return_token_ids": True},
    )
    choice = answer.choices[0]
    all_ids, logprobs = choice.token_ids, choice.logprobs
    assert all_ids[: len(ids)] == ids
    assert len(all_ids) == len(ids) + max_tokens
    assert choice.text.startswith(text)
    assert len(logprobs.tokens) == len(logprobs.text_offset) == len(logprobs.top_logprobs) == len(all_ids)
    assert logprobs.token_logprobs[0] is None
    assert logprobs.top_logprobs[0] is None
    expected = expected_logprobs(random_dir, all_ids)
    for position in range(1, len(all_ids)):
        own = expected[position - 1, all_ids[position]].item()
        assert logprobs.token_logprobs[position] == pytest.approx(own, abs=TOLERANCE)
        best = max(logprobs.top_logprobs[position].values())
        assert best == pytest.approx(expected[position - 1].max().item(), abs=TOLERANCE)
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        # Parts of characters have no text of their own, and random weights write some that never become whole.
        if not token.startswith(("bytes:", "<|")):
            assert choice.text[offset:].removeprefix("�").startswith(token)


def test_tokens_can_be_named_by_their_ids(random_client: openai.OpenAI) -> None:
    answer = random_client.completions.create(
        model="random-tiny",
        prompt=[5, 6, 7],
        max_tokens=0,
        echo=True,
        logprobs=1,
        extra_body={"return_tokens_as_token_ids": True},
    )
    assert answer.choices[0].logprobs.tokens == ["token_id:5", "token_id:6", "token_id:7"]


def test_eight_at_once_answer_as_each_alone(random_client: openai.OpenAI, random_dir: Path) -> None:
    prompts = [[3 + index, 40, 7 * index + 5, 100 - index] for index in range(8)]

    def ask(prompt: list[int]) -> tuple[list[int], list[float]]:
        choice = random_client.completions.create(
            model="random-tiny",
            prompt=prompt,
            max_tokens=24,
            temperature=0,
            logprobs=0,
            extra_body={"return_token_ids": True},
        ).choices[0]
        return choice.token_ids, choice.logprobs.token_logprobs  # type: ignore[attr-defined, return-value]

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, prompts))
    for prompt, (ids, logprobs) in zip(prompts, together, strict=True):
        expected = expected_logprobs(random_dir, prompt + ids)
        for position, (token, logprob) in enumerate(zip(ids, logprobs, strict=True), start=len(prompt) - 1):
            assert logprob == pytest.approx(expected[position, token].item(), abs=TOLERANCE)
            assert logprob >= expected[position].max().item() - TOLERANCE, "greedy up to an fp32 near-tie"
    assert ask(prompts[0])[0] == together[0][0]


def test_a_stream_that_is_dropped_frees_its_slot(random_client: openai.OpenAI, random_server: RunningServer) -> None:
    stream = random_client.completions.create(
        model="random-tiny", prompt=[1, 2, 3], temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    wait_until_idle(random_server.url, 8)


def test_a_call_that_is_given_up_frees_its_slot(random_server: RunningServer) -> None:
    body = {"prompt": [1, 2, 3], "temperature": 0, "ignore_eos": True, "n": 8, "max_tokens": 2000}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{random_server.url}/v1/completions", json=body, timeout=0.5)
    wait_until_idle(random_server.url, 8)


def test_without_a_tokenizer_there_are_token_ids(bare_server: RunningServer, bare_dir: Path) -> None:
    client = client_of(bare_server)
    answer = client.completions.create(model="bare-tiny", prompt=[5, 6, 7], max_tokens=4, temperature=0, logprobs=1)
    choice = answer.choices[0]
    assert choice.text == ""
    assert len(choice.token_ids) == 4  # type: ignore[attr-defined]
    assert choice.logprobs.tokens == [f"token_id:{id_}" for id_ in choice.token_ids]  # type: ignore[attr-defined]
    with pytest.raises(openai.BadRequestError, match="no tokenizer"):
        client.chat.completions.create(model="bare-tiny", messages=QUESTION)
    with pytest.raises(openai.BadRequestError, match="no tokenizer"):
        client.completions.create(model="bare-tiny", prompt="text")
    with pytest.raises(openai.BadRequestError, match="tokenizer"):
        client.completions.create(model="bare-tiny", prompt=[5], stop=["x"])
    assert any("no tokenizer" in line for line in bare_server.log)


def test_the_prompt_is_the_one_of_the_template(taught: openai.OpenAI, tokenizer: ChatTokenizer) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "you"}]},
        {"role": "assistant", "content": "Ho", "reasoning_content": "Hm"},
        {"role": "user", "content": "Again"},
    ]
    same = [Message("system", "Be brief."), Message("user", "Hi you"), Message("assistant", "Ho", "Hm")]
    answer = taught.chat.completions.create(model="taught-tiny", messages=messages, max_tokens=1)  # type: ignore[arg-type]
    expected = tokenizer.encode_chat([*same, Message("user", "Again")], add_generation_prompt=True)
    assert answer.usage.prompt_tokens == len(expected)
