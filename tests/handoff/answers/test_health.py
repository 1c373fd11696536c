"""Loops, reasoning without an end, halves of characters and improper stops, with and without a reasoning field."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crosschip.data import make_problem
from crosschip.handoff.answers.engine import Reply
from crosschip.handoff.answers.health import examine_reply, health_of, is_loop

PROSE = "First add the ones, then the tens; carry where it is needed, and write the sum below the line. "


@pytest.mark.parametrize(
    "text",
    [
        "We add. " + "Wait, let me check again. " * 5,
        "7" * 100,
        "So 2 + 2 = 4. " * 40,
        PROSE + "a b c d " * 20 + "a b",
        "数字" * 60,
    ],
)
def test_loops(text: str) -> None:
    assert is_loop(text)


@pytest.mark.parametrize(
    "text",
    ["", "7", PROSE, "12 + 30 = 42\n" * 3, "Wait. " * 10, "Wait, let me check again. " * 5 + PROSE],
)
def test_no_loops(text: str) -> None:
    """Short repeats are answers, and a repeat that was left again is no loop."""
    assert not is_loop(text)


def test_reasoning_that_training_writes_is_no_loop() -> None:
    problems = [make_problem(level, 0, index) for level in range(1, 7) for index in range(200)]
    assert [problem for problem in problems if is_loop(problem.reasoning)] == []


@given(st.text(min_size=1, max_size=60), st.integers(4, 12), st.text(max_size=20))
@settings(max_examples=100, deadline=None)
def test_every_repeated_passage_is_a_loop(passage: str, repeats: int, before: str) -> None:
    text = before + passage * repeats
    if len((passage * repeats).rstrip()) - len(passage) >= 96 and repeats >= 5:
        assert is_loop(text)


@pytest.mark.parametrize(
    ("reply", "wrong"),
    [
        (Reply("42", "2 + 40", "stop"), ""),
        (Reply("<think>2 + 40</think>42", "", "stop"), ""),
        (Reply("2 + 40</think>42", "", "stop"), ""),
        (Reply("42", "", "stop"), ""),
        (Reply("", "2 + 40", "length"), "reasoning_closed"),
        (Reply("<think>2 + 40", "", "stop"), "reasoning_closed"),
        (Reply("", "", "stop"), "has_one_answer"),
        (Reply("42</think>43", "2 + 40", "stop"), "reasoning"),
        (Reply("<think>x</think>42 <think>y</think>", "", "stop"), "has_one_answer"),
        (Reply(r"\boxed{42} or \boxed{43}", "", "stop"), "has_one_answer"),
        (Reply(r"\boxed{42}, that is \boxed{42}", "", "stop"), ""),
        (Reply("42", "2 + 40", "length"), "stops"),
        (Reply("42", "2 + 40", None), "stops"),
        (Reply("42", "again and " * 40, "stop"), "loops"),
        (Reply("4\ufffd", "", "stop", is_utf8=False), "is_utf8"),
        (Reply("", "", "tool_calls", calls=(("weather", "{}"),)), ""),
        (Reply("", "I need the weather", "tool_calls", calls=(("weather", "{}"),)), ""),
    ],
)
def test_validity(reply: Reply, wrong: str) -> None:
    health = examine_reply(reply)
    assert health.is_valid == (wrong in ("", "reasoning"))
    if wrong and wrong != "reasoning":
        assert getattr(health, wrong) == (wrong == "loops")


def test_counts_of_a_side() -> None:
    replies = [
        Reply("42", "2 + 40", "stop", 10),
        Reply("", "2 + 2 + " * 40, "length", 100),
        Reply(refusal="HTTP 400: no"),
    ]
    assert health_of(replies) == {
        "num_replies": 3,
        "num_refused": 1,
        "first_refusal": "HTTP 400: no",
        "num_reasoning": 2,
        "num_reasoning_open": 1,
        "num_without_one_answer": 1,
        "num_loops": 1,
        "num_not_utf8": 0,
        "stop_reasons": {"stop": 1, "length": 1},
        "mean_tokens": 55.0,
        "median_tokens": 55.0,
        "most_tokens": 100,
    }
    assert health_of([])["mean_tokens"] is None
