"""The grammar of prescribed tool calls, for llguidance: the format's own words around arguments that fit the schema."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from crosschip.serve.tools.formats import ToolFormat

__all__ = ["CallableTool", "calls_grammar"]


@dataclass(frozen=True)
class CallableTool:
    """A tool's name, and the JSON schema that its arguments fit."""

    name: str
    schema: dict[str, Any]


def calls_grammar(
    format: ToolFormat,
    tools: Sequence[CallableTool],
    token_id: Callable[[str], int | None],
    *,
    most: int,
    json_options: dict[str, Any],
    answer_schema: dict[str, Any] | bool | None = None,
) -> str:
    """A grammar in Lark's language: one to `most` calls of the tools, or, where one is given, an answer by a schema.

    Args:
        format: the model's.
        tools: those that may be called.
        token_id: the token that is a mark; None where a mark is written with several.
        most: calls in one answer.
        json_options: of llguidance, for each schema.
        answer_schema: what may be answered instead.
    """

    def words(text: str) -> str:
        return _terms(text, format.marks, token_id)

    rules = [f"start: calls{'' if answer_schema is None else ' | answer'}"]
    # After a reasoning, models break the line once or twice before they call.
    more = f" ({words(format.between)} call){{0,{most - 1}}}" if most > 1 else ""
    rules += [f"calls: SPACE? {words(format.begin)} call{more} {words(format.end)}", r"SPACE: /\n{1,2}/"]
    rules.append("call: " + " | ".join(f"call_{number}" for number in range(len(tools))))
    for number, tool in enumerate(tools):
        head = words(format.open + format.before_name + tool.name + format.before_arguments)
        tail = words(format.after_arguments + format.close)
        rules.append(f"call_{number}: {head} arguments_{number} {tail}")
        rules.append(f"arguments_{number}: {_json(tool.schema, json_options)}")
    if answer_schema is not None:
        rules.append(f"answer: {_json(answer_schema, json_options)}")
    return "\n".join(rules) + "\n"


def _json(schema: dict[str, Any] | bool, options: dict[str, Any]) -> str:
    whole = {} if schema is True else {"not": {}} if schema is False else schema
    return "%json " + json.dumps({**whole, "x-guidance": options})


def _terms(text: str, marks: Sequence[str], token_id: Callable[[str], int | None]) -> str:
    """Text as Lark's terms: marks that are tokens by their number, since no letters make a control token."""
    terms = []
    for piece in re.split("(" + "|".join(map(re.escape, marks)) + ")", text):
        number = token_id(piece) if piece in marks else None
        if piece:
            terms.append(f"<[{number}]>" if number is not None else json.dumps(piece, ensure_ascii=False))
    return " ".join(terms)
