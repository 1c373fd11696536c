"""Answers to one request that end otherwise although no token differs: empty ones, cut ones, and what is no fault."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from crosschip.qualify.serving.answers import Answer, Token
from crosschip.qualify.serving.answers_alike import unlike_end
from crosschip.qualify.serving.repeating import examine_determinism
from crosschip.qualify.serving.shown import early_end
from tests.qualify.serving.sitting_made import sitting

NUM = 24


def whole(rival: float = -9.0) -> Answer:
    tokens = [
        Token(f"token_id:{place}", -0.1, {f"token_id:{place}": -0.1, "token_id:99": rival}) for place in range(NUM)
    ]
    return Answer("x" * NUM, tokens=tokens, finish_reason="length", usage={"completion_tokens": NUM})


def cut(answer: Answer, num: int, **more: Any) -> Answer:
    shorter = replace(answer, text=answer.text[:num], tokens=answer.tokens[:num], usage={"completion_tokens": num})
    return replace(shorter, **more)


WHOLE = whole()


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (cut(WHOLE, 0), "ends after 0 of 24 tokens"),
        (cut(WHOLE, 7), "ends after 7 of 24 tokens"),
        (cut(WHOLE, 7, finish_reason="stop"), "ends after 7 of 24 tokens"),
        (replace(WHOLE, text=""), "the same tokens come with another text"),
        (replace(WHOLE, text="y" + "x" * 23), "the same tokens come with another text"),
        (replace(WHOLE, usage={"completion_tokens": 3}), "another number of tokens in the usage"),
        (replace(WHOLE, finish_reason="stop"), "another finish reason"),
    ],
)
def test_another_end_is_a_failure_whichever_comes_first(other: Answer, words: str, tmp_path: Path) -> None:
    for one, two in ((WHOLE, other), (other, WHOLE)):
        answers = [one, two] * 50
        made = sitting(tmp_path, lambda body, path, answers=answers: answers.pop(0))
        examine_determinism(made)
        found = [each for each in made.record.findings if each.check == "run to run"]
        assert {each.verdict for each in found} == {"FAIL"}
        assert words in found[0].message


@pytest.mark.parametrize(
    "other", [WHOLE, replace(WHOLE, usage={}), replace(WHOLE, usage={"completion_tokens": NUM, "cached_tokens": 9})]
)
def test_the_same_answer_ends_alike(other: Answer) -> None:
    assert unlike_end(WHOLE, other) is None


def test_fewer_log_probs_of_the_same_text_are_a_limit(tmp_path: Path) -> None:
    """As llama.cpp's, which has none for parts of characters."""
    answers = [WHOLE, replace(WHOLE, tokens=WHOLE.tokens[:-1])] * 50
    made = sitting(tmp_path, lambda body, path: answers.pop(0))
    examine_determinism(made)
    found = {(each.check, each.verdict) for each in made.record.findings}
    assert found == {("run to run: log-probs left out", "PASS WITH LIMITS")}


def test_an_end_that_was_nearly_as_likely_as_the_next_token_is_a_near_tie(tmp_path: Path) -> None:
    """Of an engine that passes over `ignore_eos`; one that cut the answer off says "length"."""
    close = whole(rival=-0.101)
    answers = [close, cut(close, 5, finish_reason="stop")] * 50
    made = sitting(tmp_path, lambda body, path: answers.pop(0))
    examine_determinism(made)
    assert {each.verdict for each in made.record.findings} == {"PASS WITH LIMITS"}
    assert "a near tie" in made.record.findings[0].message
    assert (unlike_end(close, cut(close, 5)) or pytest.fail("unseen")).margin is None


def test_reproducers_see_an_early_end() -> None:
    def choice(text: str, num: int, reason: str = "length") -> dict[str, Any]:
        names = [f"t{place}" for place in range(num)]
        return {"text": text, "finish_reason": reason, "logprobs": {"tokens": names, "token_logprobs": [-1.0] * num}}

    assert early_end(choice("abc", 3), choice("abc", 3)) == early_end(choice("abc", 3), choice("abc", 2)) == ""
    assert "ends after 1 of 3 tokens ('stop', not 'length')" in early_end(choice("abc", 3), choice("a", 1, "stop"))
