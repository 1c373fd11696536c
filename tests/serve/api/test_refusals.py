"""What cannot be served is refused in OpenAI's form, by name and with numbers."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from tests.serve.conftest import RunningServer

MESSAGES = [{"role": "user", "content": "Hi"}]


def tool_with(parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "look", "parameters": parameters}}


def nested(depth: int) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": nested(depth - 1)}} if depth else {"type": "string"}


TOOL, DEEP = tool_with({"type": "object", "properties": {}}), nested(40)
NAMED = {"type": "function", "function": {"name": "other"}}
CALLING = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}],
}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.mark.parametrize(
    ("path", "change", "param", "words"),
    [
        (CHAT, {"messages": []}, "messages", "at least 1"),
        (CHAT, {"messages": None}, "messages", "messages"),
        (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, "messages", "robot"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "image_url"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages", "a message of the role user has a content"),
        (CHAT, {"messages": [{"role": "system", "content": None}]}, "messages", "role system has a content"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "x"}]}]}, "messages", "messages.0.content.0.type ="),
        (CHAT, {"temperature": 2.5}, "temperature", "2.5"),
        (TEXT, {"prompt": ["a", 1]}, "prompt", "prompt.0 = 'a'"),
        (TEXT, {"prompt": None}, "prompt", "prompt = None: "),
        (TEXT, {"stop": "x" * 1001}, "stop", "stop = 'xxx"),
        (CHAT, {"stream": 1}, "stream", "boolean"),
        (TEXT, {"stream": "true"}, "stream", "boolean"),
        (CHAT, {"top_p": 0}, "top_p", "greater than 0"),
        (CHAT, {"n": 0}, "n", "0"),
        (CHAT, {"max_tokens": 0}, "max_tokens", "at least one token"),
        (CHAT, {"max_tokens": 100_000}, "max_tokens", "2048"),
        (CHAT, {"top_logprobs": 2}, "top_logprobs", "logprobs=true"),
        (CHAT, {"top_logprobs": 21, "logprobs": True}, "top_logprobs", "20"),
        (CHAT, {"tools": [{"type": "function"}]}, "tools", "function is missing"),
        (CHAT, {"tools": [{"type": "retrieval"}]}, "tools", "retrieval"),
        (CHAT, {"tools": [TOOL]}, "tools", "does not know tools"),
        (CHAT, {"tools": [TOOL, TOOL]}, "tools", "two tools are called look"),
        (CHAT, {"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "a b"),
        (CHAT, {"tools": [tool_with({"type": "array"})]}, "tools", "array"),
        (CHAT, {"tools": [tool_with(DEEP)]}, "tools", "nested deeper than 64"),
        (CHAT, {"tool_choice": "required"}, "tool_choice", "there are no tools"),
        (CHAT, {"tools": [TOOL], "tool_choice": "sometimes"}, "tool_choice", "sometimes"),
        (CHAT, {"tools": [TOOL], "tool_choice": NAMED}, "tool_choice", "other, which is no tool"),
        (CHAT, {"messages": [*MESSAGES, CALLING]}, "messages", "does not know an assistant's tool calls"),
        (CHAT, {"messages": [*MESSAGES, {"role": "tool", "content": "x"}]}, "messages", "role tool"),
        (TEXT, {"tools": [TOOL]}, "tools", "not supported"),
        (CHAT, {"response_format": {"type": "xml"}}, "response_format", "xml"),
        (TEXT, {"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        (CHAT, {"presence_penalty": 2.5}, "presence_penalty", "2.5"),
        (CHAT, {"frequency_penalty": -3}, "frequency_penalty", "-3"),
        (CHAT, {"repetition_penalty": 3e-170}, "repetition_penalty", "0.01"),
        (CHAT, {"min_p": 1.5}, "min_p", "1.5"),
        (CHAT, {"logit_bias": {"5": -101}}, "logit_bias", "-101"),
        (CHAT, {"logit_bias": {"99999": 1}}, "logit_bias", "99999"),
        (CHAT, {"logit_bias": {"token": 1}}, "logit_bias", "token"),
        (CHAT, {"logit_bias": [5]}, "logit_bias", "logit_bias"),
        (CHAT, {"stop": [""]}, "stop", "stop"),
        (CHAT, {"stop_token_ids": [99_999]}, "stop_token_ids", "99999"),
        (TEXT, {"prompt": [1, 99_999]}, "prompt", "99999"),
        (TEXT, {"prompt": [1, -5]}, "prompt", "-5"),
        (TEXT, {"prompt": []}, "prompt", "empty"),
        (TEXT, {"prompt": ""}, "prompt", "no tokens"),
        (TEXT, {"prompt": [[1], []]}, "prompt", "no tokens"),
        (TEXT, {"prompt": [1] * 3000}, "prompt", "3001"),
        (TEXT, {"prompt": [1] * 2000, "max_tokens": 49}, "max_tokens", "2049"),
        (TEXT, {"prompt": {"a": 1}}, "prompt", "prompt"),
        (TEXT, {"logprobs": 21}, "logprobs", "20"),
        (TEXT, {"best_of": 3}, "best_of", "3"),
        (TEXT, {"suffix": "end"}, "suffix", "end"),
    ],
)
def test_a_wrong_parameter_is_named(
    random_server: RunningServer, path: str, change: dict[str, Any], param: str, words: str
) -> None:
    body = ({"messages": MESSAGES} if path == CHAT else {"prompt": "Hi"}) | change
    response = httpx.post(random_server.url + path, json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert words in error["message"]
    assert response.headers["x-crosschip-certificate"] == "UNCERTIFIED"


def test_what_changes_nothing_is_accepted(random_server: RunningServer) -> None:
    neutral = {"presence_penalty": 0, "logit_bias": {}, "tools": [], "response_format": {"type": "text"}, "n": None}
    unknown = {"user": "someone", "metadata": {"a": "b"}, "something_new": 7, "service_tier": "auto"}
    body = {"messages": MESSAGES, "max_tokens": 2} | neutral | unknown
    assert httpx.post(random_server.url + CHAT, json=body).status_code == 200


def test_the_client_raises_what_its_users_know(random_server: RunningServer) -> None:
    client = openai.OpenAI(base_url=f"{random_server.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-9", prompt="Hi")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="random-tiny", prompt="Hi", max_tokens=9999)
    assert long.value.code == "context_length_exceeded"
    assert "maximum context length is 2048 tokens" in long.value.message
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="random-tiny", prompt="Hi", stream=True, max_tokens=9999)


def test_bodies_that_are_no_request(random_server: RunningServer) -> None:
    url, json_type = random_server.url + TEXT, {"content-type": "application/json"}
    for content in (b"{", b"", b"[1, 2]", b"7", b"\xff\xfe"):
        response = httpx.post(url, content=content, headers=json_type)
        assert response.status_code == 400, content
        assert "error" in response.json()
    assert httpx.post(url, content=b'{"prompt": "x"}', headers={"content-type": "text/plain"}).status_code == 400
    for path, status in (("/v1/nothing", 404), (TEXT, 405)):
        response = httpx.get(random_server.url + path)
        assert response.status_code == status
        assert path in response.json()["error"]["message"]


def test_a_body_that_is_too_long_is_refused(random_server: RunningServer) -> None:
    long = b'{"prompt": "' + b"x" * (17 * 2**20) + b'"}'
    headers = {"content-type": "application/json"}

    def in_parts() -> Any:
        for start in range(0, len(long), 2**20):
            yield long[start : start + 2**20]

    for content in (long, in_parts()):
        try:
            response = httpx.post(random_server.url + TEXT, content=content, headers=headers, timeout=30)
        except httpx.WriteError:  # the server may close before all is written
            continue
        assert response.status_code == 413
        assert "16777216" in response.json()["error"]["message"]
    assert httpx.get(f"{random_server.url}/health").status_code == 200


def test_a_prompt_that_never_fits_is_refused_before_it_is_encoded(random_server: RunningServer) -> None:
    text = "What is 12 + 30? " * 100_000
    for path, prompt in ((TEXT, {"prompt": text}), (CHAT, {"messages": [{"role": "user", "content": text}]})):
        error = httpx.post(random_server.url + path, json=prompt, timeout=60).json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", next(iter(prompt)))
        assert "characters has more" in error["message"], "its tokens were not counted"


@pytest.mark.parametrize(
    "change",
    [
        {"top_k": 10**30, "temperature": 1},
        {"temperature": 1e-320},
        {"temperature": 1e-7, "top_p": 1e-9},
        {"seed": -(10**40), "top_p": 0.5},
    ],
)
def test_extreme_values_are_answered_and_hurt_nobody(random_server: RunningServer, change: dict[str, Any]) -> None:
    body = {"prompt": [5, 6], "max_tokens": 3, "ignore_eos": True} | change
    response = httpx.post(random_server.url + TEXT, json=body)
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["completion_tokens"] == 3


def test_values_that_no_json_should_hold_are_refused(random_server: RunningServer) -> None:
    headers = {"content-type": "application/json"}
    for content in ('{"prompt": "\\ud800"}', '{"prompt": [5], "temperature": NaN}', '{"prompt": [1e400]}'):
        response = httpx.post(random_server.url + TEXT, content=content, headers=headers)
        assert response.status_code == 400, (content, response.text)
        assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("prompt", [[[5]] * 300, [""] * 300], ids=["ids", "texts that are not even looked at"])
def test_too_many_answers_at_once_are_refused(random_server: RunningServer, prompt: Any) -> None:
    response = httpx.post(random_server.url + TEXT, json={"prompt": prompt, "n": 10, "max_tokens": 1})
    assert response.status_code == 400
    assert "2048" in response.json()["error"]["message"]


def test_a_conversation_of_endless_turns_is_refused(random_server: RunningServer) -> None:
    body = {"messages": [{"role": "user", "content": ""}] * 4097, "max_tokens": 1}
    error = httpx.post(random_server.url + CHAT, json=body, timeout=30).json()["error"]
    assert error["param"] == "messages"
    assert "4096" in error["message"]
