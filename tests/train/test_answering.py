"""Answers to many prompts at once are those that each prompt gets by itself."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from crosschip.model import Decoder, ModelConfig, generate
from crosschip.train import answering
from crosschip.train.answering import Asking, Limits, answer_all
from tests.model.configs import random_model

CONFIG = ModelConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, max_position_embeddings=96)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder(random_model(CONFIG))


def prompts(num: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 50, (num,), generator=generator).tolist()
    return [tuple(torch.randint(0, 97, (length,), generator=generator).tolist()) for length in lengths]


def alone(decoder: Decoder, prompt: tuple[int, ...], limits: Limits) -> list[int]:
    return generate(decoder, [list(prompt)], limits.max_new_tokens, set(limits.stop_ids))[0]


@pytest.mark.parametrize("batch_size", [3, 7, 64])
def test_greedy_answers_are_those_of_each_prompt_alone(decoder: Decoder, batch_size: int) -> None:
    """Rows end at different times by four stop tokens, so they move, and others take their places."""
    limits = Limits(40, frozenset({3, 17, 40, 80}), batch_size=batch_size)
    asked = prompts(20)
    found = dict(answer_all(decoder, [Asking(prompt) for prompt in asked], limits))
    expected = {number: alone(decoder, prompt, limits) for number, prompt in enumerate(asked)}
    assert len({len(answer) for answer in expected.values()}) > 5  # they do end at different times
    assert found == expected


def test_every_token_that_is_written_is_a_sign_of_life(decoder: Decoder) -> None:
    beats: list[None] = []
    limits = Limits(12, frozenset())
    found = answer_all(decoder, [Asking(prompt) for prompt in prompts(3)], limits, lambda: beats.append(None))
    next(found)
    assert len(beats) == 12  # before the first answer is whole


def test_a_row_that_is_not_moved_properly_is_seen(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above: without the copy of the cache the answers differ."""
    limits = Limits(40, frozenset({3, 17, 40, 80}), batch_size=7)

    def forget_the_cache(self: answering._Answering, source: int, target: int) -> None:
        self._rows[target] = self._rows[source]

    monkeypatch.setattr(answering._Answering, "_move", forget_the_cache)
    asked = prompts(20)
    found = dict(answer_all(decoder, [Asking(prompt) for prompt in asked], limits))
    assert found != {number: alone(decoder, prompt, limits) for number, prompt in enumerate(asked)}


def test_what_is_drawn_follows_from_the_key_and_not_from_the_company(decoder: Decoder) -> None:
    asked = [Asking(prompt, ("test", 1, sample)) for prompt in prompts(3) for sample in range(4)]
    limits = Limits(20, frozenset({3}), batch_size=5)
    together = dict(answer_all(decoder, asked, limits))
    for number, asking in enumerate(asked):
        assert dict(answer_all(decoder, [asking], limits))[0] == together[number]
    assert len({tuple(together[number]) for number in range(4)}) == 4


def test_drawn_tokens_have_the_models_distribution(decoder: Decoder) -> None:
    """Chi-square of 2,000 first tokens at temperature 0.7; 99.9 % point of 96 degrees of freedom: 144.6."""
    prompt, num = (5, 6, 7), 2_000
    logits = random_model(CONFIG)(torch.tensor([prompt]))[0, -1].detach() / 0.7
    expected = torch.softmax(logits, dim=-1) * num
    asked = [Asking(prompt, ("draw", number)) for number in range(num)]
    counts = Counter(ids[0] for _, ids in answer_all(decoder, asked, Limits(1, frozenset(), 0.7, batch_size=500)))
    seen = torch.tensor([float(counts[token]) for token in range(97)])
    assert float(((seen - expected) ** 2 / expected).sum()) < 144.6


def test_limits(decoder: Decoder) -> None:
    """No room at all, no prompt at all, and less room than `max_new_tokens`."""
    asked = [Asking((1,) * 96), Asking(()), Asking((1,) * 90), Asking((1, 2))]
    found = dict(answer_all(decoder, asked, Limits(50, frozenset())))
    assert [len(found[number]) for number in range(4)] == [0, 0, 6, 50]
    assert dict(answer_all(decoder, [], Limits(5, frozenset()))) == {}


def test_a_small_cache_takes_fewer_rows_at_a_time(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(10, frozenset())
    whole = dict(answer_all(decoder, [Asking(prompt) for prompt in prompts(8)], limits))
    for name, value in (("_PROMPT_TOKENS", 60), ("_CACHE_BYTES", 1)):
        monkeypatch.setattr(answering, name, value)
        assert dict(answer_all(decoder, [Asking(prompt) for prompt in prompts(8)], limits)) == whole
