from __future__ import annotations

from dataclasses import replace

import pytest

from crosschip.agreement import GreedyAnswer, agreement_document, first_difference

ANSWER = GreedyAnswer("What is 2 + 2?", "<think>2 + 2 = 4</think>4", True, 9, [5, 6, 7])


def test_first_difference() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 9, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
    assert first_difference("", "a") == 0


def test_equal_answers() -> None:
    document = agreement_document([ANSWER] * 3, [ANSWER] * 3)
    assert (document["compared"], document["num_asked"], document["num_same"]) == ("token", 3, 3)
    assert document["differences"] == []


def test_one_differing_token_is_found_even_where_the_text_is_the_same() -> None:
    document = agreement_document([ANSWER, ANSWER], [ANSWER, replace(ANSWER, token_ids=[5, 6, 8])])
    assert (document["num_same"], document["differences"][0]["position"]) == (1, 2)


def test_without_recorded_tokens_text_is_compared() -> None:
    before = replace(ANSWER, token_ids=None)
    after = replace(ANSWER, text="<think>2 + 2 = 5</think>5", right=False)
    document = agreement_document([before, before], [after, ANSWER])
    assert (document["compared"], document["num_same"]) == ("text", 1)
    assert (document["num_right_before"], document["num_right_after"]) == (2, 1)
    assert document["differences"][0]["position"] == 15


def test_long_answers_are_shown_around_the_difference() -> None:
    one, other = (replace(ANSWER, text="a" * 500 + end + "c" * 500, token_ids=None) for end in ("x", "y"))
    shown = agreement_document([one], [other])["differences"][0]
    assert len(shown["before"]) < 200
    assert "ax" in shown["before"]
    assert "ay" in shown["after"]


def test_answers_to_other_questions_are_a_defect() -> None:
    with pytest.raises(AssertionError):
        agreement_document([ANSWER], [replace(ANSWER, question="What is 3 + 3?")])
