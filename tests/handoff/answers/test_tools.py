"""A call is valid when its JSON parses, its arguments fit the schema, and the tool is the one that was asked for."""

from __future__ import annotations

import json

import pytest

from crosschip.handoff.answers.engine import Reply
from crosschip.handoff.answers.questions import Question
from crosschip.handoff.answers.scoring import is_valid_call_reply
from crosschip.handoff.answers.tools import (
    TOOL_REQUESTS,
    TOOLS,
    find_calls,
    is_valid_call,
    tool_fields,
    tool_instructions,
)

QUESTION = Question("tools-1", "tools", ({"role": "user", "content": "How warm is it in Oslo?"},), "weather")


def test_requests_ask_for_every_tool_and_none_twice() -> None:
    assert len({text for text, _ in TOOL_REQUESTS}) == len(TOOL_REQUESTS) == 120
    assert {tool for _, tool in TOOL_REQUESTS[:5]} == set(TOOLS)
    assert [each["function"]["name"] for each in tool_fields()] == list(TOOLS)
    assert all(name in tool_instructions() for name in TOOLS)
    json.dumps(tool_fields())


@pytest.mark.parametrize(
    ("name", "arguments", "is_valid"),
    [
        ("weather", '{"city": "Oslo"}', True),
        ("weather", {"city": "Oslo", "unit": "fahrenheit"}, True),
        ("weather", '{"city": "Oslo", "unit": "kelvin"}', False),
        ("weather", '{"city": 7}', False),
        ("weather", '{"city": "Oslo", "country": "Norway"}', False),
        ("weather", "{}", False),
        ("weather", '{"city": "Oslo"', False),
        ("weather", None, False),
        ("weather", "[" * 100_000, False),
        ("search", '{"query": "owls"}', False),  # another tool
        ("no_such", "{}", False),
    ],
)
def test_arguments(name: str, arguments: object, is_valid: bool) -> None:
    assert is_valid_call((name, arguments), "weather") == is_valid


def test_a_whole_number_is_an_amount_and_a_text_is_no_number() -> None:
    assert is_valid_call(("convert", '{"amount": 3, "source": "km", "target": "mi"}'), "convert")
    assert not is_valid_call(("convert", '{"amount": "3", "source": "km", "target": "mi"}'), "convert")
    assert not is_valid_call(("remind", '{"text": "x", "minutes": 2.5}'), "remind")


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "weather", "arguments": {"city": "Oslo"}}',
        'I will look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>',
        '```json\n{"name": "weather", "parameters": {"city": "Oslo"}}\n```',
        '{"function": {"name": "weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}}',
        '{broken {"name": "weather", "arguments": {"city": "Oslo"}}',
    ],
)
def test_calls_in_text(text: str) -> None:
    assert is_valid_call_reply(QUESTION, Reply(text, finish_reason="stop"))


@pytest.mark.parametrize(
    "reply",
    [
        Reply("It is 12 degrees."),
        Reply('{"name": "weather", "arguments": {"city": "Oslo"'),
        Reply('{"name": "weather"}'),
        Reply("{" * 100_000),
        Reply('<think>{"name": "weather", "arguments": {"city": "Oslo"}}'),  # reasoning without an end
        Reply('{"name": "weather", "arguments": {"city": "Oslo"}} {"name": "weather", "arguments": {}}'),
        Reply("", calls=(("weather", '{"city": '),)),
        Reply(refusal="HTTP 400"),
    ],
)
def test_no_valid_call(reply: Reply) -> None:
    assert not is_valid_call_reply(QUESTION, reply)


def test_the_field_for_calls_counts_before_the_text() -> None:
    reply = Reply("it is {}", calls=(("weather", '{"city": "Oslo"}'),))
    assert is_valid_call_reply(QUESTION, reply)
    assert find_calls(reply.text) == []
