"""Tools in `POST /v1/chat/completions`, through the official client, against servers in their own processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosschip.errors import ServeError
from crosschip.serve import load_engine
from crosschip.serve.api.server import background_server
from tests.serve.api.test_api_fuzz import FEW, MOSTLY_RIGHT, TOOL, answers
from tests.serve.conftest import RunningServer
from tests.serve.tools.speaking import CALLED, CLOCK, PARIS, TOOLS, WEATHER, save_random
from tests.serve.tools.test_grammar import fits

llguidance = pytest.importorskip("llguidance")


@pytest.fixture
def client(caller: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{caller.url}/v1", api_key="none", max_retries=0, timeout=60)


def ask(client: openai.OpenAI, text: str, **more: Any) -> Any:
    arguments = {"messages": [{"role": "user", "content": text}], "tools": TOOLS} | more
    return client.chat.completions.create(model="caller-tiny", **arguments)


def test_what_is_served_says_how_calls_are_read(client: openai.OpenAI, caller: RunningServer) -> None:
    card: Any = client.models.list().data[0]
    assert card.crosschip["tool_format"] == "hermes"
    assert card.crosschip["shows_tools"]
    assert "tools: calls are read as hermes\n" in caller.log


def test_a_call_with_reasoning_and_text_before_it(client: openai.OpenAI) -> None:
    choice = ask(client, "Weather in Paris?").choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.reasoning_content == "Look."
    assert choice.message.content == "I look."
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name, call.function.arguments) == ("function", CALLED.name, CALLED.arguments)
    assert call.id.startswith("call_")


def test_a_whole_round_with_the_result(client: openai.OpenAI) -> None:
    message = ask(client, "Weather in Paris?").choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny, 21"}
    answer = ask(client, "", messages=[PARIS, message, result])
    assert answer.choices[0].message.content == "Sunny, 21 degrees."
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].finish_reason == "stop"


def test_parallel_calls_and_one_at_a_time(client: openai.OpenAI) -> None:
    choice = ask(client, "Both, please.").choices[0]
    assert choice.message.content is None, "as with OpenAI, where a turn only calls"
    calls = choice.message.tool_calls
    assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == [
        ("get_weather", {"city": "Köln", "unit": "C"}),
        ("get_time", {}),
    ]
    assert calls[0].id != calls[1].id
    alone = ask(client, "Both, please.", parallel_tool_calls=False).choices[0]
    assert [call.function.name for call in alone.message.tool_calls] == ["get_weather"]
    assert alone.finish_reason == "tool_calls"


@pytest.mark.parametrize("text", ["Weather in Paris?", "Both, please.", "Go wrong."])
def test_a_stream_adds_up_to_the_same(client: openai.OpenAI, text: str) -> None:
    whole = ask(client, text).choices[0]
    with client.chat.completions.stream(
        model="caller-tiny", messages=[{"role": "user", "content": text}], tools=TOOLS
    ) as stream:
        last = stream.get_final_completion().choices[0]
    assert last.finish_reason == whole.finish_reason
    assert (last.message.content or None) == (whole.message.content or None)
    mine, theirs = last.message.tool_calls or [], whole.message.tool_calls or []
    assert [call.function.name for call in mine] == [call.function.name for call in theirs]
    assert [call.function.arguments for call in mine] == [call.function.arguments for call in theirs]
    chunks = list(ask(client, text, stream=True))
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert [call.index for call in deltas] == list(range(len(theirs)))
    assert all(call.id and call.type == "function" for call in deltas)


def test_text_that_only_looks_like_a_call_stays_text(client: openai.OpenAI) -> None:
    choice = ask(client, "Go wrong.").choices[0]
    assert choice.message.tool_calls is None
    assert choice.message.content.startswith('<tool_call>\n{"name": "get_weather", "arguments": {"city": }')
    assert choice.message.content.endswith("</tool_call> was no call.")
    assert choice.finish_reason == "stop"


def test_a_call_that_was_cut_off_is_text_and_says_length(client: openai.OpenAI) -> None:
    choice = ask(client, "Both, please.", max_tokens=10).choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls is None
    assert choice.message.content.startswith("<tool_call>")


def test_without_tools_nothing_is_read_as_a_call(client: openai.OpenAI) -> None:
    shown = ask(client, "Both, please.").usage.prompt_tokens
    for more in ({"tool_choice": "none"}, {"tools": openai.omit}):
        answer = ask(client, "Both, please.", max_tokens=40, **more)
        assert answer.choices[0].message.tool_calls is None
        assert answer.usage.prompt_tokens < shown / 2, "the tools are not in the prompt"


def test_a_form_for_the_answer_leaves_calls_possible(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    form = {"type": "json_schema", "json_schema": {"name": "ok", "schema": schema}}
    choice = ask(client, "Both, please.", response_format=form).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert len(choice.message.tool_calls) == 2
    other = ask(client, "Something else?", response_format=form, max_tokens=200).choices[0]
    if other.finish_reason == "stop":
        assert set(json.loads(other.message.content)) >= {"ok"}


@pytest.mark.parametrize("stream", [False, True])
def test_random_weights_of_every_family_call_as_prescribed(family_server: RunningServer, stream: bool) -> None:
    client = openai.OpenAI(base_url=f"{family_server.url}/v1", api_key="none", max_retries=0, timeout=60)
    name = client.models.list().data[0].id
    named = {"type": "function", "function": {"name": "get_time"}}
    for choice, allowed in (("required", {"get_weather", "get_time"}), (named, {"get_time"})):
        arguments: dict[str, Any] = {
            "model": name,
            "messages": [PARIS],
            "tools": TOOLS,
            "tool_choice": choice,
            "parallel_tool_calls": False,
            "temperature": 1,
            "seed": 3,
            "max_tokens": 400,
        }
        if stream:
            with client.chat.completions.stream(**arguments) as answer:
                done = answer.get_final_completion().choices[0]
        else:
            done = client.chat.completions.create(**arguments).choices[0]
        assert done.finish_reason == "tool_calls", done
        (call,) = done.message.tool_calls or []
        assert call.function.name in allowed
        assert fits(call.function.name, json.loads(call.function.arguments))


def test_calls_and_results_of_every_family_are_taken(family_server: RunningServer) -> None:
    call = {"id": "call_0001", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}
    messages: list[dict[str, Any]] = [
        PARIS,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_0001", "content": "noon"},
    ]
    body = {"messages": messages, "tools": TOOLS, "max_tokens": 1}
    response = httpx.post(f"{family_server.url}/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    call["function"] = {"name": "get_time", "arguments": "{"}
    response = httpx.post(f"{family_server.url}/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == 400
    assert "JSON object" in response.json()["error"]["message"]


def test_a_form_that_is_not_seen_from_the_template_can_be_named(tmp_path: Path) -> None:
    directory = save_random("hermes", tmp_path / "m")
    file = directory / "chat_template.jinja"
    file.write_text(file.read_text().replace("tool_call>", "invoke>"))
    body = {"messages": [PARIS], "tools": TOOLS, "tool_choice": "required", "max_tokens": 1}
    for name, status in ((None, 400), ("hermes", 200)):
        with background_server(load_engine(directory, max_batch_size=1, device="cpu"), tool_format=name) as url:
            response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
            assert response.status_code == status, response.text
            assert ("--tool-format" in response.text) is (name is None)
    engine = load_engine(directory, max_batch_size=1, device="cpu")
    with pytest.raises(ServeError, match="choose among hermes"), background_server(engine, tool_format="mine"):
        pass
    engine.close()


def test_a_schema_that_cannot_be_held_to_is_refused(caller: RunningServer) -> None:
    broken = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"$ref": "#/no"}}}}}
    body = {"messages": [PARIS], "tools": [broken], "tool_choice": "required", "max_tokens": 1}
    response = httpx.post(f"{caller.url}/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tool_choice"


def test_no_request_with_tools_is_a_500(caller: RunningServer) -> None:
    @FEW
    @given(MOSTLY_RIGHT, st.lists(TOOL, max_size=2), st.sampled_from(["auto", "required", "none"]))
    def tools_of_all_kinds(more: dict[str, Any], tools: list[Any], choice: str) -> None:
        right = {"messages": [PARIS], "max_tokens": 2, "tools": [WEATHER, CLOCK], "tool_choice": choice}
        answers(caller.url, "/v1/chat/completions", right | ({"tools": tools} if tools else {}) | more)

    tools_of_all_kinds()
    assert httpx.get(f"{caller.url}/health").json()["status"] == "ok"
