"""Deterministic mode: a request's tokens and the bits of its log-probs depend on nothing but the request."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from crosschip.model import Decoder, load_model, save_model
from crosschip.serve.engine.engine import Engine
from crosschip.serve.engine.request import SamplingParams
from crosschip.serve.engine.row_independence import rows_are_independent
from tests.serve.conftest import make_model, tiny_config
from tests.serve.engine.engines import Forward, greedy, ids_of, logprobs_of, made_prompts, running

OPTIONS: dict[str, Any] = {"max_batch_size": 5, "max_model_len": 192, "cache_tokens": 960}
PROMPT = made_prompts(1, 75, 76, seed=21)[0]


def in_company(engine: Engine, repeats: int, seed: int = 0) -> set[tuple[Any, ...]]:
    """The distinct answers to one request, asked again and again among others that come and go."""
    draw = random.Random(seed)
    answers = set()
    for start in range(0, repeats, 4):
        handles, company = [], []
        for _ in range(min(4, repeats - start)):
            others = made_prompts(draw.randrange(3), 1, 90, seed=draw.randrange(10**6))
            company += [engine.submit(prompt, SamplingParams(draw.randrange(1, 9), seed=start)) for prompt in others]
            handles.append(engine.submit(PROMPT, greedy(6)))
        for handle in company[::5]:
            handle.abort()
        for handle in handles:
            events = list(handle)
            answers.add((tuple(ids_of(events)), tuple(logprobs_of(events))))
    return answers


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_one_request_in_changing_company_has_one_answer(random_dir: Path, prefix_cache: bool) -> None:
    with running(random_dir, deterministic=True, prefix_cache=prefix_cache, **OPTIONS) as engine:
        alone = list(engine.submit(PROMPT, greedy(6)))
        Forward(random_dir).assert_greedy(PROMPT, alone)
        assert in_company(engine, 24) == {(tuple(ids_of(alone)), tuple(logprobs_of(alone)))}
        if prefix_cache:
            assert engine.load.prefix_tokens_found > 0, "hits give the same bits as the first, which missed"


def test_rows_that_are_not_independent_are_computed_alone(
    random_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chip whose result depends on the row's place, and experts whose calls depend on the company."""
    extend = Decoder.extend

    def by_place(self: Decoder, tokens_BT: torch.Tensor, *rest: Any) -> torch.Tensor:
        places = torch.arange(tokens_BT.shape[0])[:, None, None]
        return extend(self, tokens_BT, *rest) * (1 + 1e-6 * places)

    many = tmp_path / "many-experts"
    save_model(make_model(tiny_config(300, n_routed_experts=20, initializer_range=0.2), 4), many, torch.float32)
    for directory, faulty in ((random_dir, False), (random_dir, True), (many, False)):
        with monkeypatch.context() as patched:
            if faulty:
                patched.setattr(Decoder, "extend", by_place)
            assert rows_are_independent(Decoder(load_model(directory)), 8) == (directory == random_dir and not faulty)
            with running(directory, deterministic=True, **OPTIONS) as engine:
                assert len(in_company(engine, 12)) == 1


def test_a_last_row_that_differs_now_and_then_is_seen(random_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the last numbers of a call go through another function: a bit of one row in some."""
    extend = Decoder.extend

    def at_times(self: Decoder, tokens_BT: torch.Tensor, *rest: Any) -> torch.Tensor:
        hidden_BTD = extend(self, tokens_BT, *rest)
        last_D = hidden_BTD[-1, -1]
        up_D = torch.nextafter(last_D, torch.full_like(last_D, torch.inf))
        last_D[-1:] = torch.where(last_D[:1] > last_D.mean() + last_D.std(), up_D, last_D)[-1:]
        return hidden_BTD

    decoder = Decoder(load_model(random_dir))
    assert rows_are_independent(decoder, 8)
    monkeypatch.setattr(Decoder, "extend", at_times)
    assert not rows_are_independent(decoder, 8)


def test_new_weights_pass_the_probe_in_the_mode(random_dir: Path) -> None:
    with running(random_dir, deterministic=True, **OPTIONS) as engine:
        before = in_company(engine, 4)
        engine.update_weights(random_dir)
        assert in_company(engine, 4) == before


@pytest.mark.slow
def test_a_thousand_repeats_have_one_answer(random_dir: Path) -> None:
    with running(random_dir, deterministic=True, **OPTIONS) as engine:
        assert len(in_company(engine, 1000)) == 1


def batch_dependent(extend: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The fault N22: the result depends on how many rows a call has. One part in a million, as other orders give."""

    def faulty(self: Decoder, tokens_BT: torch.Tensor, *rest: Any) -> torch.Tensor:
        return extend(self, tokens_BT, *rest) * (1 + 1e-6 * tokens_BT.shape[0])

    return faulty


def test_a_dependence_on_the_batch_is_seen_without_the_mode_and_not_with_it(
    random_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: the check can see the fault, and the mode keeps it out."""
    monkeypatch.setattr(Decoder, "extend", batch_dependent(Decoder.extend))
    with running(random_dir, **OPTIONS) as engine:
        assert len(in_company(engine, 24)) > 1
    with running(random_dir, deterministic=True, **OPTIONS) as engine:
        assert len(in_company(engine, 24)) == 1


def test_siblings_and_seeds_keep_their_bits(random_dir: Path) -> None:
    ways = [greedy(5), SamplingParams(5, seed=4, num_logprobs=0, top_p=0.9), greedy(5)]
    with running(random_dir, deterministic=True, **OPTIONS) as engine:
        together = [list(handle) for handle in engine.submit_all(PROMPT, ways)]
        alone = [list(engine.submit(PROMPT, params)) for params in ways]
    for one, other in zip(together, alone, strict=True):
        assert ids_of(one) == ids_of(other)
        assert logprobs_of(one) == logprobs_of(other)


def test_prompt_log_probs_keep_their_bits(random_dir: Path) -> None:
    with running(random_dir, deterministic=True, **OPTIONS) as engine:
        params = SamplingParams(0, num_prompt_logprobs=2)
        (alone,) = engine.submit(PROMPT, params)
        company = [engine.submit(prompt, greedy(4)) for prompt in made_prompts(4, seed=2)]
        (together,) = engine.submit(PROMPT, params)
        for handle in company:
            list(handle)
    assert alone.prompt_scores == together.prompt_scores
