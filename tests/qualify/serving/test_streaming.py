"""Which differences of a stream may come from two tokens that were as likely."""

from __future__ import annotations

from crosschip.qualify.serving.answers import Answer, Token
from crosschip.qualify.serving.judge import Limits
from crosschip.qualify.serving.streaming import may_be_near_tie

LIMITS = Limits(mean=0.01, point=0.02, source="a test")


def answer(text: str, *tokens: tuple[str, float], **more: str) -> Answer:
    return Answer(text=text, tokens=[Token(name, logprob) for name, logprob in tokens], **more)


def test_tokens_left_out_by_a_model_that_is_sure_of_all_of_them_are_no_tie() -> None:
    whole = answer("one two three", ("one", -0.001), (" two", -0.001), (" three", -0.001))
    assert not may_be_near_tie(whole, answer("one two three", ("one", -0.001), (" three", -0.001)), LIMITS)


def test_other_text_after_two_tokens_as_likely_is_a_tie() -> None:
    whole = answer("one two", ("one", -0.001), (" two", -0.70))
    assert may_be_near_tie(whole, answer("one ten", ("one", -0.001), (" ten", -0.69)), LIMITS)
    assert not may_be_near_tie(whole, answer("one ten", ("one", -0.001), (" ten", -3.0)), LIMITS)


def test_without_log_probs_any_difference_may_be_a_tie() -> None:
    assert may_be_near_tie(answer("one two"), answer("one ten"), LIMITS)
