"""A second real client: `huggingface_hub.InferenceClient` against servers in their own processes.

It is here because it shares nothing with `openai` (types, HTTP and reading of events are its own; langchain-openai,
instructor, llm and aisuite all call `openai`), is well kept, and costs nothing: huggingface-hub is here already.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from tests.serve.conftest import CONVERSATIONS, REASONING, RunningServer
from tests.serve.tools.speaking import CALLED, PARIS, TOOLS

QUESTION = [{"role": "user", "content": CONVERSATIONS[0][0]}]


def client_of(server: RunningServer) -> InferenceClient:
    return InferenceClient(base_url=f"{server.url}/v1", api_key="none", timeout=60)


def test_a_chat(taught_server: RunningServer) -> None:
    answer = client_of(taught_server).chat_completion(
        QUESTION, model="taught-tiny", temperature=0, logprobs=True, top_logprobs=2
    )
    message: Any = answer.choices[0].message
    assert message.content == CONVERSATIONS[0][2]
    assert message.reasoning_content == REASONING
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert len(logprobs.content) == answer.usage.completion_tokens
    assert [len(each.top_logprobs) for each in logprobs.content] == [2] * len(logprobs.content)


def test_a_stream(taught_server: RunningServer) -> None:
    client = client_of(taught_server)  # when it goes, so do its streams
    options: Any = {"include_usage": True}
    chunks = list(
        client.chat_completion(QUESTION, model="taught-tiny", temperature=0, stream=True, stream_options=options)
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == CONVERSATIONS[0][2]
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 0


@pytest.mark.parametrize("stream", [False, True])
def test_tools(caller: RunningServer, stream: bool) -> None:
    client = client_of(caller)
    asked: dict[str, Any] = {"model": "caller-tiny", "tools": TOOLS}
    if stream:
        chunks = list(client.chat_completion([PARIS], stream=True, **asked))
        calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
        reason = chunks[-1].choices[0].finish_reason
    else:
        choice = client.chat_completion([PARIS], **asked).choices[0]
        calls, reason = list(choice.message.tool_calls or []), choice.finish_reason
    assert reason == "tool_calls"
    assert [(call.function.name, call.function.arguments) for call in calls] == [(CALLED.name, CALLED.arguments)]
    function = {"name": CALLED.name, "arguments": CALLED.arguments}
    turn = {
        "role": "assistant",
        "content": "I look.",
        "tool_calls": [{"id": "1", "type": "function", "function": function}],
    }
    result = {"role": "tool", "tool_call_id": "1", "content": "sunny, 21"}
    answer = client.chat_completion([PARIS, turn, result], **asked)
    assert answer.choices[0].message.content == "Sunny, 21 degrees."


def test_a_named_tool_and_a_schema(caller: RunningServer) -> None:
    pytest.importorskip("llguidance")
    client = client_of(caller)
    named: Any = {"function": {"name": "get_time"}}  # as its types have it, without "type"
    choice = client.chat_completion([PARIS], model="caller-tiny", tools=TOOLS, tool_choice=named).choices[0]
    (call,) = choice.message.tool_calls or []
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_time", {})
    schema = {
        "type": "object",
        "properties": {"ok": {"enum": [True]}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "ok", "schema": schema}}
    # Sent as {"type": "json_object", "value": schema}, which is Text Generation Inference's form.
    answer = client.chat_completion([PARIS], model="caller-tiny", response_format=form, max_tokens=200)
    assert json.loads(answer.choices[0].message.content or "") == {"ok": True}


def test_a_refusal_is_raised_with_its_words(taught_server: RunningServer) -> None:
    with pytest.raises(HfHubHTTPError, match="does not know tools"):
        client_of(taught_server).chat_completion(QUESTION, model="taught-tiny", tools=TOOLS)


def test_its_asynchronous_half(taught_server: RunningServer) -> None:
    import asyncio

    async def ask() -> str:
        client = AsyncInferenceClient(base_url=f"{taught_server.url}/v1", api_key="none", timeout=60)
        stream = await client.chat_completion(QUESTION, model="taught-tiny", temperature=0, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(ask()) == CONVERSATIONS[0][2]
