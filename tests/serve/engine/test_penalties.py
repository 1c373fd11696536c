"""Penalties and biases against the definitions, written out token by token."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LogitsProcessorList, MinPLogitsWarper, RepetitionPenaltyLogitsProcessor

from crosschip.serve.engine.request import Request, SamplingParams
from crosschip.serve.engine.sampling import choose_tokens, plan_sampling

CPU = torch.device("cpu")
LOGITS = torch.randn(1, 40, generator=torch.Generator().manual_seed(1)) * 2


def chosen(request: Request, logits: torch.Tensor = LOGITS) -> int:
    before = logits.clone()
    ids, greatest = choose_tokens(logits, plan_sampling([request], CPU))
    assert torch.equal(logits, before), "log-probs are read from the logits afterwards"
    assert greatest.item() == before.max()
    return int(ids)


def request(prompt: list[int], answer: list[int], **params: object) -> Request:
    made = Request(prompt, SamplingParams(max_tokens=9, **({"temperature": 0.0} | params)))  # type: ignore[arg-type]
    made.output_ids = list(answer)
    return made


def test_repetition_penalty_is_that_of_transformers() -> None:
    prompt, answer = [3, 5, 5], [7, int(LOGITS.argmax())]
    for penalty in (1.3, 5.0, 0.5):
        theirs = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty)])
        expected = int(theirs(torch.tensor([prompt + answer]), LOGITS.clone()).argmax())
        assert chosen(request(prompt, answer, repetition_penalty=penalty)) == expected
    assert chosen(request(prompt, answer, repetition_penalty=5.0)) != int(LOGITS.argmax()), "it does something"


def test_a_penalty_never_makes_a_logit_infinite() -> None:
    """The engine refuses such values (`refuse_impossible`); what gets past it must still not end in NaN."""
    logits = torch.tensor([[3e38, 2.0, -3e38, 0.0]])
    for penalty in (0.01, 100.0, 1e-30, 1e30, 3e-170):
        drawn = request([0, 2], [], repetition_penalty=penalty, temperature=1.0, seed=1)
        assert chosen(drawn, logits) in (0, 1, 3)


def test_presence_and_frequency_count_the_answer_and_not_the_prompt() -> None:
    best, second = LOGITS[0].topk(2).indices.tolist()
    gap = float(LOGITS[0, best] - LOGITS[0, second])
    assert chosen(request([best] * 9, [], presence_penalty=2.0, frequency_penalty=2.0)) == best
    assert chosen(request([1], [best], presence_penalty=gap * 0.99)) == best
    assert chosen(request([1], [best], presence_penalty=gap * 1.01)) == second
    assert chosen(request([1], [best] * 3, presence_penalty=gap * 0.99)) == best, "once, however often it stands there"
    assert chosen(request([1], [best] * 3, frequency_penalty=gap * 0.34)) == second, "three times a third"
    assert chosen(request([1], [best] * 2, frequency_penalty=gap * 0.34)) == best


def test_counts_follow_a_growing_answer() -> None:
    best, second = LOGITS[0].topk(2).indices.tolist()
    gap = float(LOGITS[0, best] - LOGITS[0, second])
    growing = request([1], [], frequency_penalty=gap * 0.34)
    plan = plan_sampling([growing], CPU)
    for expected in (best, best, best, second):
        ids, _ = choose_tokens(LOGITS, plan)
        assert int(ids) == expected
        growing.output_ids.append(int(ids))


def test_logit_bias_bans_and_forces() -> None:
    best = int(LOGITS.argmax())
    assert chosen(request([1], [], logit_bias=((best, -100.0),))) == int(LOGITS[0].topk(2).indices[1])
    assert chosen(request([1], [], logit_bias=((17, 100.0), (best, 1.0)))) == 17
    for seed in range(50):
        assert chosen(request([1], [], temperature=1.0, seed=seed, logit_bias=((17, 100.0),))) == 17


def test_only_the_rows_that_ask_are_changed() -> None:
    best = int(LOGITS.argmax())
    rows = [request([1], []), request([1], [], logit_bias=((4, 100.0),)), request([1], [])]
    ids, _ = choose_tokens(LOGITS.expand(3, -1), plan_sampling(rows, CPU))
    assert ids.tolist() == [best, 4, best]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_min_p_keeps_the_set_that_transformers_keeps(temperature: float) -> None:
    logits = torch.tensor([[0.0, -0.4, -1.0, -2.5, -4.0, -9.0]])
    kept = MinPLogitsWarper(0.3)(torch.tensor([[0]]), logits / temperature).isfinite()[0]
    expected = torch.softmax(torch.where(kept, logits[0] / temperature, -math.inf), -1)
    count = 4000
    rows = [request([0], [], temperature=temperature, min_p=0.3, seed=seed) for seed in range(count)]
    ids, _ = choose_tokens(logits.expand(count, -1), plan_sampling(rows, CPU))
    shares = torch.bincount(ids, minlength=6) / count
    # Five standard deviations of a binomial share.
    assert ((shares - expected).abs() <= 5 * torch.sqrt(expected * (1 - expected) / count)).all()
