"""Tool calls: a fixed set of tools and requests, and whether an answer holds a call that fits its tool.

A tool is a pydantic model of its arguments, so one declaration gives the schema that the engine is told and the check.
"""

from __future__ import annotations

import json
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

__all__ = ["TOOLS", "TOOL_REQUESTS", "ToolCall", "find_calls", "is_valid_call", "tool_fields", "tool_instructions"]

ToolCall = tuple[str, Any]  # the tool's name and its arguments, as they came

_MOST_CANDIDATES = 50  # opening braces of one answer that are tried
_FENCE = re.compile(r"<tool_call>|</tool_call>|```(?:json)?")


class _Arguments(BaseModel):
    """No argument beside the known ones, and none of another type."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Calculate(_Arguments):
    """Calculate an arithmetic expression."""

    expression: str = Field(min_length=1, description="such as 12 * (3 + 4)")


class Weather(_Arguments):
    """Tell the weather of a city."""

    city: str = Field(min_length=1)
    unit: Literal["celsius", "fahrenheit"] = "celsius"


class Convert(_Arguments):
    """Convert an amount from one unit to another."""

    amount: float
    source: str = Field(min_length=1, description="the unit of the amount, such as km")
    target: str = Field(min_length=1, description="the wanted unit, such as mi")


class Remind(_Arguments):
    """Set a reminder."""

    text: str = Field(min_length=1)
    minutes: int = Field(ge=1, description="from now")
    repeat: bool = False


class Search(_Arguments):
    """Search documents."""

    query: str = Field(min_length=1)
    tags: list[str] = Field(default_factory=list)
    limit: int = Field(default=10, ge=1, le=100)


TOOLS: dict[str, type[_Arguments]] = {
    "calculate": Calculate,
    "weather": Weather,
    "convert": Convert,
    "remind": Remind,
    "search": Search,
}

_CITIES = ("Nairobi", "Lima", "Oslo", "Hanoi", "Quito", "Accra", "Turin", "Perth", "Osaka", "Cork", "Graz", "Porto")
_TOPICS = (
    "bridges",
    "owls",
    "glaciers",
    "tides",
    "chess",
    "bread",
    "comets",
    "maps",
    "violins",
    "rice",
    "wind",
    "moss",
)
_UNITS = (("km", "mi"), ("kg", "lb"), ("litres", "gallons"), ("metres", "feet"))
_CHORES = ("call the plumber", "water the plants", "take out the bread", "send the letter", "feed the cat", "stretch")


def _requests() -> list[tuple[str, str]]:
    """Ten times a dozen requests, the tools in turn, so that any beginning of the list holds all of them."""
    found: list[tuple[str, str]] = []
    for number in range(24):
        city, topic, chore = _CITIES[number % 12], _TOPICS[number % 12], _CHORES[number % 6]
        source, target = _UNITS[number % 4]
        degrees = "fahrenheit" if number >= 12 else "celsius"
        kind = f"at most {number + 3} documents about {topic}" + (" tagged history" if number >= 12 else "")
        often = "again and again every" if number >= 12 else "in"
        found += [
            (f"What is {17 + number} * {23 + 3 * number} - {5 + number}? Use a tool.", "calculate"),
            (f"How warm is it in {city}, in {degrees}?", "weather"),
            (f"Convert {3.5 + number} {source} to {target}.", "convert"),
            (f"Remind me {often} {5 + 5 * number} minutes to {chore}.", "remind"),
            (f"Find {kind}.", "search"),
        ]
    return found


TOOL_REQUESTS: tuple[tuple[str, str], ...] = tuple(_requests())


def tool_fields() -> list[dict[str, Any]]:
    """The tools as OpenAI's `tools` field has them."""
    return [
        {
            "type": "function",
            "function": {"name": name, "description": tool.__doc__, "parameters": tool.model_json_schema()},
        }
        for name, tool in TOOLS.items()
    ]


def tool_instructions() -> str:
    """The tools in words, for an engine that has no field for them."""
    lines = [json.dumps(each["function"], ensure_ascii=False) for each in tool_fields()]
    return (
        "You can call one of these tools, given as JSON schemas:\n"
        + "\n".join(lines)
        + '\nTo call one, answer with one JSON object and nothing else: {"name": TOOL, "arguments": {...}}'
    )


def is_valid_call(call: ToolCall, tool: str) -> bool:
    """Whether it calls the tool that fits, with arguments that are JSON and fit its schema."""
    name, arguments = call
    if name != tool or tool not in TOOLS:
        return False
    try:
        # From JSON and not from Python, where a whole number that stands for a float is one.
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        TOOLS[tool].model_validate_json(text)
    except (ValidationError, ValueError, TypeError, RecursionError):
        return False
    return True


def find_calls(text: str) -> list[ToolCall]:
    """The calls in an answer's text: JSON objects with a `name` and `arguments` (or `parameters`), fenced or not."""
    text = _FENCE.sub(" ", text)
    decoder = json.JSONDecoder()
    calls: list[ToolCall] = []
    position = tried = 0
    while (position := text.find("{", position)) >= 0 and tried < _MOST_CANDIDATES:
        tried += 1
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            position += 1
            continue
        call = _call_of(value)
        if call is not None:
            calls.append(call)
    return calls


def _call_of(value: Any) -> ToolCall | None:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    key = next((key for key in ("arguments", "parameters") if key in value), None)
    return None if key is None else (value["name"], value[key])
