"""The engine on a shared pool of blocks: right answers under preemption, from known prefixes and for siblings, and
everything given back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from crosschip.errors import ServeError
from crosschip.model import Decoder
from crosschip.serve.engine.blocks import digests_of
from crosschip.serve.engine.engine import Engine
from crosschip.serve.engine.request import SamplingParams
from tests.serve.engine.engines import TOLERANCE, Forward, greedy, ids_of, logprobs_of, made_prompts, running


@pytest.fixture(scope="module")
def forward(random_dir: Path) -> Forward:
    return Forward(random_dir)


@pytest.fixture(scope="module")
def engine(random_dir: Path) -> Iterator[Engine]:
    with running(random_dir, max_batch_size=4, max_model_len=256, cache_tokens=1024) as made:
        yield made


def all_free(engine: Engine) -> bool:
    load = engine.load
    return load.free_blocks == load.num_blocks and load.free_slots == engine.info.max_batch_size


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_a_pool_that_is_too_small_for_all_gives_right_answers(
    random_dir: Path, forward: Forward, prefix_cache: bool
) -> None:
    options = {"max_batch_size": 6, "max_model_len": 128, "cache_tokens": 160, "prefix_cache": prefix_cache}
    with running(random_dir, **options) as small:
        prompts = made_prompts(8, 20, 40)
        params = greedy(40)
        for prompt, handle in zip(prompts, [small.submit(prompt, params) for prompt in prompts], strict=True):
            events = list(handle)
            assert len(ids_of(events)) == 40
            forward.assert_greedy(prompt, events)
        assert small.load.preemptions > 0
        assert all_free(small)


def test_a_preempted_request_has_its_prompt_scored_once(random_dir: Path, forward: Forward) -> None:
    with running(random_dir, max_batch_size=4, max_model_len=128, cache_tokens=128, prefix_cache=False) as small:
        prompts = made_prompts(4, 25, 31)
        handles = [small.submit(prompt, greedy(40, num_prompt_logprobs=1)) for prompt in prompts]
        for prompt, handle in zip(prompts, handles, strict=True):
            scored = [event.prompt_scores for event in handle if event.prompt_scores is not None]
            assert len(scored) == 1
            expected = forward.logprobs(prompt)
            found = [score.logprob for score in scored[0] if score is not None]
            own = [expected[place, token].item() for place, token in enumerate(prompt[1:])]
            assert found == pytest.approx(own, abs=TOLERANCE)
        assert small.load.preemptions > 0


def test_a_request_longer_than_the_pool_is_refused(random_dir: Path) -> None:
    with running(random_dir, cache_tokens=64) as small:
        assert small.info.max_model_len == 64, "lowered to what the cache holds"
        with pytest.raises(ServeError, match="64"):
            small.submit([1] * 60, SamplingParams(max_tokens=5))
    with pytest.raises(ServeError, match="100"), running(random_dir, cache_tokens=64, max_model_len=100):
        pass
    with pytest.raises(ServeError, match="31"), running(random_dir, cache_tokens=31):
        pass


def test_a_known_prefix_gives_the_same_log_probs(engine: Engine, forward: Forward) -> None:
    prompt = made_prompts(1, 100, 101, seed=7)[0]
    missed = list(engine.submit(prompt, greedy(8)))
    before = engine.load.prefix_tokens_found
    found = list(engine.submit(prompt, greedy(8)))
    assert engine.load.prefix_tokens_found - before == 96
    assert ids_of(found) == ids_of(missed)
    assert logprobs_of(found) == pytest.approx(logprobs_of(missed), abs=TOLERANCE)
    chat = prompt + ids_of(missed) + made_prompts(1, 30, 31, seed=8)[0]
    forward.assert_greedy(chat, list(engine.submit(chat, greedy(8))))
    scored = list(engine.submit(prompt, greedy(1, num_prompt_logprobs=0)))
    assert scored[0].prompt_scores is not None
    assert len(scored[0].prompt_scores) == 100, "nothing of a prompt that is scored is skipped"
    other = [prompt[0] + 1, *prompt[1:]]
    forward.assert_greedy(other, list(engine.submit(other, greedy(8))))


def test_a_wrong_block_for_a_prefix_would_be_noticed(
    random_dir: Path, forward: Forward, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: with digests that leave out what came before a block, wrong contents are found."""

    def forgetful(token_ids: list[int], known: list[bytes], num_blocks: int) -> list[bytes]:
        return [str(token_ids[32 * block : 32 * block + 32]).encode() for block in range(num_blocks)]

    first, second = made_prompts(2, 70, 71, seed=11)
    mixed = first[:32] + second[32:]
    for digests, is_right in ((digests_of, True), (forgetful, False)):
        monkeypatch.setattr("crosschip.serve.engine.holdings.digests_of", digests)
        with running(random_dir, max_batch_size=2, cache_tokens=512, max_model_len=128) as engine:
            for prompt in (first, second):
                forward.assert_greedy(prompt, list(engine.submit(prompt, greedy(4))))
            events = list(engine.submit(mixed, greedy(4)))
        if is_right:
            forward.assert_greedy(mixed, events)
        else:
            with pytest.raises(AssertionError):
                forward.assert_greedy(mixed, events)


@pytest.mark.parametrize("length", [1, 5, 33, 70])
def test_several_answers_to_one_prompt_compute_it_once(
    random_dir: Path, forward: Forward, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    tokens = 0
    extend = Decoder.extend

    def count(self, tokens_BT, *rest):  # type: ignore[no-untyped-def]
        nonlocal tokens
        tokens += tokens_BT.numel()
        return extend(self, tokens_BT, *rest)

    prompt = made_prompts(1, length, length + 1, seed=5)[0]
    ways = [greedy(10), SamplingParams(10, seed=1, num_logprobs=0), SamplingParams(10, seed=2), greedy(10)]
    with running(random_dir, max_batch_size=4, cache_tokens=1024, max_model_len=256, prefix_cache=False) as engine:
        monkeypatch.setattr(Decoder, "extend", count)
        answers = [list(handle) for handle in engine.submit_all(prompt, ways)]
        assert tokens <= length + 3 + 4 * 9, "the prompt once, its last token for each sibling, then one a token"
        forward.assert_greedy(prompt, answers[0])
        forward.assert_greedy(prompt, answers[3])
        for params, answer in zip(ways, answers, strict=True):
            assert ids_of(list(engine.submit(prompt, params))) == ids_of(answer), "as if it had been asked alone"
        assert ids_of(answers[1]) != ids_of(answers[2])
        assert all_free(engine)


def test_siblings_get_the_prompts_scores_and_one_token_answers(engine: Engine) -> None:
    handles = engine.submit_all([5, 6, 7], [greedy(1, num_prompt_logprobs=0)] * 3)
    answers = [list(handle) for handle in handles]
    assert all(answer[-1].finish_reason == "length" for answer in answers)
    assert all(any(event.prompt_scores for event in answer) for answer in answers)
    assert all_free(engine)


def test_aborts_at_any_moment_leave_nothing_behind(engine: Engine) -> None:
    draw = random.Random(3)
    prompts = made_prompts(150, 1, 120, seed=9)
    handles = []
    for number, prompt in enumerate(prompts):
        params = [SamplingParams(draw.randrange(0, 12), seed=number) for _ in range(draw.randrange(1, 4))]
        handles += engine.submit_all(prompt, params)
        for _ in range(draw.randrange(3)):
            draw.choice(handles).abort()
    reasons = [list(handle)[-1].finish_reason for handle in handles]
    assert set(reasons) == {"length", "abort"}
    assert all_free(engine)
    assert not engine._handles
    assert not engine._scheduler._leader_of
    assert engine._scheduler.num_waiting == 0


@pytest.mark.slow
def test_thousands_of_requests_leave_nothing_behind(engine: Engine) -> None:
    for _ in range(25):
        handles = [engine.submit(prompt, greedy(3)) for prompt in made_prompts(100, 1, 60)]
        for handle in handles[::10]:
            handle.abort()
        for handle in handles:
            list(handle)
        assert all_free(engine)
    assert engine.load.known_blocks <= engine.load.num_blocks


def test_one_requests_nan_is_nobody_elses(random_dir: Path, forward: Forward, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that gives NaN for one row ends that request; what it left in the cache reaches nobody, then or later."""
    extend = Decoder.extend
    poisoned = 299

    def poison(self, tokens_BT, start_B, slots_B, cache):  # type: ignore[no-untyped-def]
        hidden = extend(self, tokens_BT, start_B, slots_B, cache)
        for row in (tokens_BT == poisoned).any(dim=1).nonzero().flatten().tolist():
            hidden[row] = float("nan")
            places = cache.places(slots_B.tolist(), start_B[:, None] + torch.arange(tokens_BT.shape[1]), 1)
            width = tokens_BT.shape[1]
            for rows in cache.rows:
                rows[places.written_M[row * width : (row + 1) * width]] = float("nan")
        return hidden

    monkeypatch.setattr(Decoder, "extend", poison)
    with running(random_dir, max_batch_size=3, max_model_len=128, cache_tokens=384) as engine:
        good = made_prompts(6, 40, 60, seed=6)
        bad = [*made_prompts(1, 70, 71, seed=7)[0], poisoned]
        for _ in range(2):
            handles = [engine.submit(prompt, greedy(20)) for prompt in (good[0], bad, good[1], *good[2:], bad)]
            answers = [list(handle) for handle in handles]
            assert [answer[-1].finish_reason for answer in answers].count("error") == 2
            for prompt, answer in zip([good[0], bad, *good[1:]], answers[:-1], strict=True):
                if prompt is not bad:
                    forward.assert_greedy(prompt, answer)
        assert all(rows.isfinite().all() for rows in engine._runner._cache.rows)
