"""Held-out problems while a stage goes on: which are asked, and that there are some."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from crosschip.data import ChatTokenizer, Message, Row, open_source, train_tokenizer
from crosschip.errors import DataError
from crosschip.model import ModelConfig, Transformer, init_weights
from crosschip.recipe import DataSettings, RlSettings
from crosschip.rewards import CHECKERS
from crosschip.train.evaluate.opening import opening_of
from crosschip.train.rl.scoring import HeldOutProblems

SOURCE = open_source(DataSettings(source="arithmetic", levels=[1], num_problems=400), seed=1)


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return train_tokenizer([row.as_text() for row in SOURCE.rows("train")][:200], 300)


def settings_of(**more: object) -> RlSettings:
    return RlSettings.model_validate(
        {"steps": 3, "seq_len": 80, "max_new_tokens": 16, "validation_sequences": 5} | more
    )


def test_as_many_as_asked_for_are_answered(tokenizer: ChatTokenizer) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 1}
    heads = {
        "num_attention_heads": 2,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "kv_lora_rank": 16,
    }
    experts = {"n_routed_experts": 2, "num_experts_per_tok": 1, "max_position_embeddings": 128}
    model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, **sizes, **heads, **experts))
    init_weights(model, 0)
    found = HeldOutProblems(SOURCE, tokenizer, settings_of()).score(model)
    assert (found.num_problems, found.num_right) == (5, 0)
    assert 1 <= found.mean_tokens <= 16


def test_no_room_for_any_prompt_is_told(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(DataError, match="no held-out question with an answer has at most 2 tokens"):
        HeldOutProblems(SOURCE, tokenizer, settings_of(seq_len=18))


def test_a_row_that_ends_with_the_user_has_no_answer_to_score_by(tokenizer: ChatTokenizer) -> None:
    user = Message("user", "What is 2 + 3?")
    rows = [Row(messages=(user, Message("assistant", "5"), user)), Row(messages=(user, Message("assistant", "5")))]
    source: Any = SimpleNamespace(rows=lambda split: rows)
    held_out = HeldOutProblems(source, tokenizer, settings_of())
    assert [(question.text, question.expected) for question in held_out._questions] == [("What is 2 + 3?", "5")]


def test_the_expected_answer_is_the_whole_one_as_in_training(tokenizer: ChatTokenizer) -> None:
    answer = "Two and three are five.\n#### 5"
    row = Row(messages=(Message("user", "What is 2 + 3?"), Message("assistant", answer)))
    source: Any = SimpleNamespace(rows=lambda split: [row])
    (question,) = HeldOutProblems(source, tokenizer, settings_of())._questions
    assert question.expected == answer


def writes(monkeypatch: pytest.MonkeyPatch, answers: list[list[int]]) -> None:
    """The model writes these answers."""
    monkeypatch.setattr("crosschip.train.rl.scoring.answer_all", lambda *_: enumerate(answers))
    monkeypatch.setattr("crosschip.train.rl.scoring.Decoder", lambda *_, **__: None)


def test_answers_are_judged_by_the_checker_that_counts_most(
    tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CHECKERS, "arithmetic", lambda attempt: float("good" in attempt.answer))
    monkeypatch.setitem(CHECKERS, "format", lambda attempt: 1 / 0)
    texts = ["good", "bad", "good", "good", "bad"]
    writes(monkeypatch, [tokenizer.encode(text) for text in texts])
    terms = [{"checker": "format", "weight": 0.5}, {"checker": "arithmetic", "weight": 2.0}]
    found = HeldOutProblems(SOURCE, tokenizer, settings_of(rewards=terms)).score(None)  # type: ignore[arg-type]
    assert (found.num_right, found.num_errors) == (3, 0)
    failing = HeldOutProblems(SOURCE, tokenizer, settings_of(rewards=terms[:1])).score(None)  # type: ignore[arg-type]
    assert (failing.num_right, failing.num_errors) == (0, 5)


def test_each_answer_that_is_judged_is_a_sign_of_life(
    tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    monkeypatch.setitem(CHECKERS, "arithmetic", lambda attempt: float(len(happened.append("judged") or "")))  # type: ignore[func-returns-value]
    writes(monkeypatch, [tokenizer.encode("5")] * 5)
    HeldOutProblems(SOURCE, tokenizer, settings_of()).score(None, lambda: happened.append("beat"))  # type: ignore[arg-type]
    assert happened == ["judged", "beat"] * 5


def test_reasoning_that_the_prompt_opened_and_nobody_closed_is_no_answer(
    tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = HeldOutProblems(SOURCE, tokenizer, settings_of())
    writes(monkeypatch, [tokenizer.encode(f"I try {question.expected}") for question in held_out._questions])
    assert held_out.score(None).num_right == 5  # type: ignore[arg-type]
    monkeypatch.setattr("crosschip.train.evaluate.judging.opening_of", lambda *_: "<think>")
    assert held_out.score(None).num_right == 0  # type: ignore[arg-type]


def test_a_prompt_that_ends_with_the_tag_opens_the_reasoning(tokenizer: ChatTokenizer) -> None:
    assert opening_of(tokenizer, tokenizer.encode_with_controls("Question? <think>\n")) == "<think>"
    assert opening_of(tokenizer, tokenizer.encode_with_controls("<think></think> Question?")) == ""
