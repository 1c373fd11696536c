"""Tokens are drawn from the distribution that was asked for, and the same ones in any company."""

from __future__ import annotations

import math

import pytest
import torch

from crosschip.serve.engine.request import Request, SamplingParams
from crosschip.serve.engine.sampling import choose_tokens, plan_sampling, top_logprobs

CPU = torch.device("cpu")


def request(**params: object) -> Request:
    return Request([0], SamplingParams(max_tokens=1, **params))  # type: ignore[arg-type]


def draw(logits: torch.Tensor, count: int, **params: object) -> torch.Tensor:
    """How often each token is drawn, as shares."""
    rows = [request(seed=seed, **params) for seed in range(count)]
    ids, _ = choose_tokens(logits.expand(count, -1).clone(), plan_sampling(rows, CPU))
    return torch.bincount(ids, minlength=logits.shape[-1]) / count


def test_greedy_takes_the_greatest_logit_and_makes_no_random_number() -> None:
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(1))
    rows = [request(temperature=0.0, seed=1) for _ in range(5)]
    plan = plan_sampling(rows, CPU)
    ids, greatest = choose_tokens(logits, plan)
    assert ids.tolist() == logits.argmax(-1).tolist()
    assert torch.equal(greatest, logits.max(-1).values)
    assert plan.drawn == []


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax_at_the_temperature(temperature: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    count = 20_000
    expected = torch.softmax(logits / temperature, -1)
    # Five standard deviations of a binomial share: a right sampler fails once in about a million.
    tolerance = 5 * torch.sqrt(expected * (1 - expected) / count)
    assert ((draw(logits, count, temperature=temperature) - expected).abs() <= tolerance).all()
    wrong = torch.softmax(logits / (temperature * 1.3), -1)
    assert not ((draw(logits, count, temperature=temperature) - wrong).abs() <= tolerance).all()


def test_top_k_and_top_p_keep_exactly_their_set() -> None:
    logits = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).log()[torch.tensor([3, 0, 4, 1, 2])]
    assert set(draw(logits, 2000, top_k=2).nonzero().flatten().tolist()) == {1, 3}
    assert set(draw(logits, 2000, top_p=0.6).nonzero().flatten().tolist()) == {1, 3}, "the set that reaches p"
    assert set(draw(logits, 2000, top_p=0.01).nonzero().flatten().tolist()) == {1}, "never fewer than one"
    both = draw(logits, 2000, top_k=3, top_p=0.75)
    assert set(both.nonzero().flatten().tolist()) == {1, 3}, "top-p is over what top-k left (0.59, 0.24, 0.18)"


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = torch.tensor([0.0, -math.inf, 0.0, -math.inf])
    for uniform in (0.0, 0.5, 1.0 - 2**-53):
        row = request()
        row.uniform.random = lambda value=uniform: value  # type: ignore[method-assign]
        ids, _ = choose_tokens(logits[None].clone(), plan_sampling([row], CPU))
        assert ids.item() in (0, 2)


def test_a_seeded_request_draws_the_same_in_any_company() -> None:
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(2)) * 3
    kinds: list[dict[str, object]] = [{}, {"top_p": 0.9}, {"top_k": 7}, {"temperature": 0.0}, {"temperature": 1.7}]
    for params in kinds:
        alone, _ = choose_tokens(logits.clone(), plan_sampling([request(seed=3, **params)], CPU))
        company = [request(seed=9, **other) for other in kinds]
        rows = [*company, request(seed=3, **params)]
        together, _ = choose_tokens(logits.expand(len(rows), -1).clone(), plan_sampling(rows, CPU))
        assert together[-1] == alone[0]


def test_nan_shows_in_the_greatest_logit() -> None:
    logits = torch.zeros(2, 8)
    logits[1, 5] = math.nan
    _, greatest = choose_tokens(logits, plan_sampling([request(temperature=0.0)] * 2, CPU))
    assert greatest.isfinite().tolist() == [True, False]


def test_logprobs_are_the_log_softmax() -> None:
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(4))
    ids = torch.tensor([3, 0, 39])
    own, top_ids, top = top_logprobs(logits, ids, 5)
    expected = torch.log_softmax(logits.double(), -1)
    # fp32 log-softmax over 40 terms: a few roundings of numbers below 8.
    torch.testing.assert_close(own.double(), expected.gather(1, ids[:, None]).squeeze(1), atol=4e-6, rtol=0)
    assert top_ids.tolist() == expected.topk(5).indices.tolist()
    assert (top.diff(dim=-1) <= 0).all()


def test_draws_do_not_depend_on_the_default_dtype() -> None:
    """In bf16, where transformers builds models, 0.4999 is 0.5, and that is the second token."""
    row = request()
    row.uniform.random = lambda: 0.4999  # type: ignore[method-assign]
    torch.set_default_dtype(torch.bfloat16)
    try:
        ids, _ = choose_tokens(torch.zeros(1, 2, dtype=torch.float32), plan_sampling([row], CPU))
    finally:
        torch.set_default_dtype(torch.float32)
    assert ids.item() == 0


LONG_KINDS: list[dict[str, object]] = [{}, {"top_p": 0.9}, {"top_k": 90_000}, {"min_p": 1e-4, "top_p": 0.99}]


def drawn_alone_and_together(device: torch.device, count: int, **params: object) -> tuple[list[int], list[int]]:
    """Many tokens that are about as likely: sums in another order, or of other parts, give others of them."""
    logits = torch.randn(count, 120_000, generator=torch.Generator().manual_seed(6)).mul_(0.1).to(device)
    rows = lambda: [request(seed=seed, **params) for seed in range(count)]  # noqa: E731
    together, _ = choose_tokens(logits.clone(), plan_sampling(rows(), device))
    alone = [choose_tokens(logits[n : n + 1].clone(), plan_sampling([row], device))[0] for n, row in enumerate(rows())]
    return torch.cat(alone).tolist(), together.tolist()


@pytest.mark.parametrize("params", LONG_KINDS)
def test_long_rows_are_drawn_alike_in_any_company_by_several_threads(params: dict[str, object]) -> None:
    torch.set_num_threads(2)
    alone, together = drawn_alone_and_together(CPU, 24, **params)
    assert alone == together


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("params", LONG_KINDS)
def test_long_rows_are_drawn_alike_in_any_company_on_a_gpu(params: dict[str, object]) -> None:
    """At temperature 1, where CUDA may add in another order from call to call."""
    alone, together = drawn_alone_and_together(torch.device("cuda"), 1000, **params)
    assert alone == together
