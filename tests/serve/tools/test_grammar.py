"""Prescribed calls: any walk through what the grammar allows ends in calls that fit their schemas."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crosschip.data import ChatTokenizer
from crosschip.serve.api.constraints import JSON_OPTIONS, AnswerConstraint
from crosschip.serve.tools import FORMATS, CallableTool, ToolFormat, call_reader, calls_grammar
from tests.serve.tools.speaking import FAMILIES, WEATHER, save_tokenizer

llguidance = pytest.importorskip("llguidance")

TOOLS = [
    CallableTool("get_weather", WEATHER["function"]["parameters"]),
    CallableTool("get_time", {"type": "object", "properties": {}, "additionalProperties": False}),
]
NAMES = frozenset(tool.name for tool in TOOLS)


@pytest.fixture(scope="module", params=list(FAMILIES))
def spoken(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ToolFormat, Any]:
    tokenizer = save_tokenizer(request.param, tmp_path_factory.mktemp("grammar"))
    return FORMATS[request.param], tokenizer


def constraint_of(tokenizer: ChatTokenizer, form: ToolFormat, **options: Any) -> AnswerConstraint:
    text = tokenizer._tokenizer.to_str()
    backend = llguidance.LLTokenizer(text, n_vocab=tokenizer.vocab_size, eos_token=[tokenizer.eos_id])
    lark = calls_grammar(form, TOOLS, tokenizer._tokenizer.token_to_id, json_options=JSON_OPTIONS, **options)
    matcher = llguidance.LLMatcher(backend, llguidance.LLMatcher.grammar_from_lark(lark))
    assert not matcher.get_error(), (lark, matcher.get_error())
    return AnswerConstraint(matcher, backend, (None, None), False)


def walk(tokenizer: ChatTokenizer, constraint: AnswerConstraint, rng: random.Random) -> str:
    ids: list[int] = []
    for _ in range(600):
        allowed = constraint.allowed(ids)
        assert constraint.problem is None
        choices = np.flatnonzero(allowed)
        # The end wherever it is possible, or some walks through strings would go on for very long.
        ids.append(tokenizer.eos_id if tokenizer.eos_id in choices else int(rng.choice(choices)))
        if ids[-1] == tokenizer.eos_id:
            return str(tokenizer._tokenizer.decode(ids[:-1], skip_special_tokens=False))
    raise AssertionError("the walk did not end")


def fits(name: str, arguments: dict[str, Any]) -> bool:
    if name == "get_time":
        return arguments == {}
    return set(arguments) == {"city", "unit"} and len(arguments["city"]) <= 12 and arguments["unit"] in ("C", "F")


def test_any_walk_is_a_call_that_fits(spoken: tuple[ToolFormat, ChatTokenizer]) -> None:
    form, tokenizer = spoken
    rng, seen = random.Random(3), set()
    for _ in range(12):
        text = walk(tokenizer, constraint_of(tokenizer, form, most=1), rng)
        reader = call_reader(form, NAMES, only_one=False)
        first, last = reader.push(text), reader.finish()
        calls = first.calls + last.calls
        assert len(calls) == 1, text
        assert first.content + last.content == ""
        assert fits(calls[0].name, json.loads(calls[0].arguments)), text
        seen.add(calls[0].name)
    assert seen == NAMES


def test_several_calls_and_an_answer_instead_are_possible(spoken: tuple[ToolFormat, ChatTokenizer]) -> None:
    form, tokenizer = spoken
    one = form.open + form.before_name + "get_time" + form.before_arguments + "{}" + form.after_arguments + form.close
    two = form.begin + one + form.between + one + form.end
    answer = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}

    def accepts(text: str, **options: Any) -> bool:
        constraint = constraint_of(tokenizer, form, **options)
        ids = [*tokenizer.encode_with_controls(text), tokenizer.eos_id]
        for place, token in enumerate(ids):
            allowed = constraint.allowed(ids[:place])
            if allowed is None or not allowed[token]:
                return False
        return True

    assert accepts(two, most=2)
    assert not accepts(two, most=1), "one at a time"
    assert accepts("\n\n" + form.begin + one + form.end, most=1), "as models do after their reasoning"
    assert not accepts('{"ok": true}', most=2)
    if not form.open:
        return  # an answer in JSON cannot be told from a call by its first brace; the API refuses to be asked for both
    assert accepts('{"ok": true}', most=2, answer_schema=answer)
    assert accepts(two, most=2, answer_schema=answer)
    assert not accepts("Hello", most=2, answer_schema=answer)


def test_a_mark_is_its_token_and_not_its_letters(tmp_path: Path) -> None:
    tokenizer = save_tokenizer("hermes", tmp_path)
    constraint = constraint_of(tokenizer, FORMATS["hermes"], most=1)
    allowed = constraint.allowed([])
    assert allowed[tokenizer._tokenizer.token_to_id("<tool_call>")]
    assert not allowed[tokenizer.encode("<")[0]]
