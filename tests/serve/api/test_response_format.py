"""Answers in a prescribed form: random weights under a schema give documents that fit it."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from crosschip.data import ChatTokenizer
from crosschip.serve import load_engine
from crosschip.serve.api import chat, constraints
from crosschip.serve.api.constraints import AnswerConstraint
from crosschip.serve.api.server import background_server
from crosschip.serve.engine.request import SamplingParams
from tests.serve.conftest import RunningServer

llguidance = pytest.importorskip("llguidance")

needs_engine = pytest.mark.skipif(
    "constraint" not in SamplingParams.__dataclass_fields__, reason="the engine takes no constraints yet"
)

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "count": {"type": "integer", "minimum": 0, "maximum": 999},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "count", "kind"],
    "additionalProperties": False,
}


def fits(document: Any) -> bool:
    return (
        set(document) == {"name", "count", "kind"}
        and isinstance(document["name"], str)
        and len(document["name"]) <= 8
        and document["count"] in range(1000)
        and document["kind"] in ("cat", "dog")
    )


def format_of(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "pet", "schema": schema, "strict": True}}


def constraint_of(tokenizer: ChatTokenizer, in_reasoning: bool, schema: Any = SCHEMA) -> AnswerConstraint:
    text = tokenizer._tokenizer.to_str()
    backend = llguidance.LLTokenizer(text, n_vocab=tokenizer.vocab_size, eos_token=[tokenizer.eos_id])
    matcher = llguidance.LLMatcher(backend, llguidance.LLMatcher.grammar_from_json_schema(schema))
    return AnswerConstraint(matcher, backend, think_ids(tokenizer), in_reasoning)


def think_ids(tokenizer: ChatTokenizer) -> tuple[int, int]:
    return tokenizer.encode_with_controls("<think>")[0], tokenizer.encode_with_controls("</think>")[0]


def not_allowed(constraint: AnswerConstraint, ids: list[int]) -> list[int]:
    return [int(token) for token in np.flatnonzero(~constraint.allowed(ids))]


def test_any_walk_through_what_is_allowed_fits_the_schema(tokenizer: ChatTokenizer) -> None:
    rng = random.Random(3)
    for _ in range(20):
        constraint, ids = constraint_of(tokenizer, False), []
        for _ in range(400):
            allowed = constraint.allowed(ids)
            ids.append(int(rng.choice(np.flatnonzero(allowed))))
            if not ids or ids[-1] == tokenizer.eos_id:
                break
            if ids[0] == think_ids(tokenizer)[0]:
                ids = []
                constraint = constraint_of(tokenizer, False)
        assert fits(json.loads(tokenizer.decode(ids)))


def test_reasoning_is_free_and_the_answer_after_it_is_not(tokenizer: ChatTokenizer) -> None:
    opened, closed = think_ids(tokenizer)
    constraint, ids = constraint_of(tokenizer, False), [opened]
    assert constraint.allowed([])[opened]
    assert not_allowed(constraint, ids) == [tokenizer.eos_id], "it may not end the answer: the form is still due"
    ids += tokenizer.encode("anything {{ at all")
    assert not_allowed(constraint, ids) == [tokenizer.eos_id]
    ids.append(closed)
    allowed = constraint.allowed(ids)
    assert {tokenizer.decode([int(token)])[0] for token in np.flatnonzero(allowed)} == {"{"}
    assert not allowed[opened], "it opens once"
    within = constraint_of(tokenizer, True)
    assert not_allowed(within, []) == [tokenizer.eos_id]
    assert len(not_allowed(within, [closed])) > 1


def test_an_answer_that_left_the_form_may_only_end(tokenizer: ChatTokenizer) -> None:
    constraint = constraint_of(tokenizer, False)
    for more in ("", " at all"):  # the engine's other requests go on: nothing is raised
        allowed = constraint.allowed(tokenizer.encode("no JSON" + more))
        assert list(np.flatnonzero(allowed)) == [tokenizer.eos_id]
    assert constraint.problem is not None
    assert "satisfy the grammar" in constraint.problem


@needs_engine
def test_random_weights_answer_in_the_form(random_server: RunningServer) -> None:
    client = openai.OpenAI(base_url=f"{random_server.url}/v1", api_key="none", max_retries=0)
    messages: Any = [{"role": "user", "content": "A pet, please."}]
    ends = []
    for temperature in (0, 1):
        answer = client.chat.completions.create(
            model="random-tiny",
            messages=messages,
            temperature=temperature,
            seed=5,
            n=2,
            max_tokens=400,
            response_format=format_of(SCHEMA),  # type: ignore[arg-type]
        )
        for choice in answer.choices:
            ends.append(choice.finish_reason)
            if choice.finish_reason == "stop":
                assert fits(json.loads(choice.message.content or "")), choice.message.content
    assert "stop" in ends
    free = client.chat.completions.create(model="random-tiny", messages=messages, temperature=0, max_tokens=40)
    with pytest.raises(ValueError, match="Expecting"):
        json.loads(free.choices[0].message.content or "")


@needs_engine
def test_the_schema_true_takes_any_json(random_server: RunningServer) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "response_format": format_of(True), "max_tokens": 3}
    response = httpx.post(f"{random_server.url}/v1/chat/completions", json=body, timeout=30)
    assert response.status_code == 200, response.text


@needs_engine
@pytest.mark.parametrize(
    ("response_format", "words"),
    [
        ({"type": "yaml"}, "yaml"),
        ({"type": "json_schema"}, "json_schema.schema"),
        (format_of({"type": "nonsense"}), "nonsense"),
        (format_of({"$ref": "#/nowhere"}), "nowhere"),
        (format_of({"type": "string", "pattern": "("}), "regex"),
        (format_of([]), "schema"),
        (format_of(False), "no answer fits"),
        (format_of({"enum": ["x" * 70_000]}), "65536"),
        ("json", "response_format"),
    ],
)
def test_a_form_that_cannot_be_held_to_is_refused(
    random_server: RunningServer, response_format: Any, words: str
) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "response_format": response_format, "max_tokens": 1}
    response = httpx.post(f"{random_server.url}/v1/chat/completions", json=body, timeout=30)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == "response_format"
    assert words in error["message"]


def answer_in_form(url: str) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": "A pet."}], "response_format": format_of(SCHEMA), "max_tokens": 9}
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    return dict(response.json()["choices"][0]["message"])


@needs_engine
def test_the_directory_of_new_weights_may_go(random_dir: Path, tmp_path: Path) -> None:
    other = shutil.copytree(random_dir, tmp_path / "other")
    engine = load_engine(random_dir, max_batch_size=1)
    with background_server(engine) as url:
        answer_in_form(url)
        num_made = constraints._tokenizer.cache_info().misses
        engine.update_weights(other, version="other")
        shutil.rmtree(other)
        answer_in_form(url)
        assert constraints._tokenizer.cache_info().misses == num_made, "the tokenizer is the same one"


@needs_engine
def test_a_form_that_cannot_see_a_reasoning_end_begins_at_once(
    random_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt opens the reasoning, and what closes it is several tokens."""
    monkeypatch.setattr(constraints, "_think_ids", lambda *_: (None, None))
    monkeypatch.setattr(chat, "starts_in_reasoning", lambda _: True)
    with background_server(load_engine(random_dir, max_batch_size=1)) as url:
        message = answer_in_form(url)
    assert message["content"].startswith("{")
    assert message["reasoning_content"] is None
