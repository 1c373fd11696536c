"""The engine on a real tiny model: batches give what each request gives alone, and slots come back."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from crosschip.errors import ServeError
from crosschip.model import Decoder, load_model
from crosschip.serve import load_engine
from crosschip.serve.engine.engine import Engine, EngineInfo
from crosschip.serve.engine.refusals import EngineClosed
from crosschip.serve.engine.request import SamplingParams, TokenEvent
from crosschip.serve.engine.runner import Runner
from crosschip.serve.engine.scheduler import Scheduler
from tests.serve.engine.engines import running

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, num_logprobs=2)
# Log-probs of fp32 logits of size ~10: sums of a few hundred products in another order differ by some 1e-6 each.
TOLERANCE = 1e-4


def make_engine(directory: Path, num_slots: int, max_prefill_tokens: int = 1024) -> Engine:
    """Like `load_engine`, with another bound on prompt tokens per step."""
    decoder = Decoder(load_model(directory))
    info = EngineInfo(directory, "cpu", "float32", decoder.config.vocab_size, 0, 512, num_slots)
    runner = Runner(decoder, num_slots, 512, torch.device("cpu"))
    return Engine(runner, Scheduler(num_slots, 512, max_prefill_tokens), info)


@pytest.fixture(scope="module")
def engine(random_dir: Path) -> Iterator[Engine]:
    made = load_engine(random_dir, max_batch_size=4)
    yield made
    made.close()


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    sizes = torch.randint(1, 40, (count,), generator=generator).tolist()
    return [torch.randint(3, 300, (size,), generator=generator).tolist() for size in sizes]


def answer(engine: Engine, prompt: list[int], params: SamplingParams = GREEDY) -> list[TokenEvent]:
    return list(engine.submit(prompt, params))


def logprobs_of(directory: Path, ids: list[int]) -> torch.Tensor:
    """Teacher-forced log-probs by the training model's own forward pass, [tokens, vocabulary]."""
    model = load_model(directory)
    with torch.no_grad():
        return torch.log_softmax(model.forward(torch.tensor([ids]))[0].double(), -1)


def assert_is_greedy(directory: Path, prompt: list[int], events: list[TokenEvent]) -> None:
    """Each token is the model's best one, or as good within the tolerance, and its log-prob is the model's."""
    ids = [event.token_id for event in events]
    assert all(token is not None for token in ids)
    expected = logprobs_of(directory, prompt + ids)  # type: ignore[operator]
    for position, event in enumerate(events, start=len(prompt) - 1):
        own = expected[position, event.token_id].item()
        assert own >= expected[position].max().item() - TOLERANCE
        assert event.score is not None
        assert event.score.logprob == pytest.approx(own, abs=TOLERANCE)
        assert event.score.top[0][1] >= event.score.top[1][1]


def test_more_requests_than_slots_each_get_their_own_greedy_answer(engine: Engine, random_dir: Path) -> None:
    many = prompts(9)
    handles = [engine.submit(prompt, GREEDY) for prompt in many]
    for prompt, handle in zip(many, handles, strict=True):
        events = list(handle)
        assert [event.finish_reason for event in events] == [None] * 11 + ["length"]
        assert_is_greedy(random_dir, prompt, events)
    assert engine.load.free_slots == 4


def test_a_prompt_in_chunks_is_the_same_prompt(random_dir: Path) -> None:
    chunked = make_engine(random_dir, num_slots=3, max_prefill_tokens=7)
    try:
        many = prompts(5)
        handles = [chunked.submit(prompt, GREEDY) for prompt in many]
        for prompt, handle in zip(many, handles, strict=True):
            assert_is_greedy(random_dir, prompt, list(handle))
    finally:
        chunked.close()


def test_a_wrong_position_would_be_noticed(random_dir: Path, engine: Engine) -> None:
    """The negative control of the tests above: an answer to another prompt does not pass for greedy."""
    first, second = [5, 6, 7, 8, 9, 10], [5, 6, 7, 9, 8, 10]
    with pytest.raises(AssertionError):
        assert_is_greedy(random_dir, second, answer(engine, first))


@pytest.mark.parametrize("max_prefill_tokens", [1024, 5])
def test_prompt_scores_are_the_forward_pass(random_dir: Path, max_prefill_tokens: int) -> None:
    scoring = make_engine(random_dir, 2, max_prefill_tokens)
    try:
        prompt = prompts(3)[1] + [7, 8, 9]
        events = answer(scoring, prompt, SamplingParams(max_tokens=0, num_prompt_logprobs=3))
        assert len(events) == 1
        assert events[0].finish_reason == "length"
        scores = events[0].prompt_scores
        assert scores is not None
        assert scores[0] is None
        expected = logprobs_of(random_dir, prompt)
        for position, score in enumerate(scores[1:]):
            assert score is not None
            assert score.logprob == pytest.approx(expected[position, prompt[position + 1]].item(), abs=TOLERANCE)
            best = expected[position].topk(3).values.tolist()
            assert [value for _, value in score.top] == pytest.approx(best, abs=TOLERANCE)
        assert scoring.load.free_slots == 2
    finally:
        scoring.close()


def test_bfloat16_serves_rounded_log_probs(random_dir: Path) -> None:
    rounded = load_engine(random_dir, max_batch_size=2, dtype=torch.bfloat16)
    try:
        assert rounded.info.dtype == "bfloat16"
        prompt = torch.randint(3, 300, (400,), generator=torch.Generator().manual_seed(4)).tolist()
        (event,) = answer(rounded, prompt, SamplingParams(max_tokens=0, num_prompt_logprobs=1))
        assert event.prompt_scores is not None
        found = torch.tensor([score.logprob for score in event.prompt_scores if score is not None])
        places = torch.arange(len(prompt) - 1), torch.tensor(prompt[1:])
        exact = logprobs_of(random_dir, prompt)[places]
        with torch.no_grad():
            logits = load_model(random_dir).forward(torch.tensor([prompt]), torch.bfloat16)[0]
        control = (torch.log_softmax(logits, -1)[places] - exact).square().mean().sqrt()
        # The training model's own bf16 forward is an honest implementation: no more than 2.5 times its error.
        assert 0 < (found - exact).square().mean().sqrt() < 2.5 * control
    finally:
        rounded.close()


def test_a_stop_id_is_the_last_event(engine: Engine) -> None:
    prompt = [11, 12, 13]
    ids = [event.token_id for event in answer(engine, prompt)]
    stop = ids[4]
    params = SamplingParams(max_tokens=12, temperature=0.0, stop_ids=frozenset({stop}))  # type: ignore[arg-type]
    events = answer(engine, prompt, params)
    assert [event.token_id for event in events] == ids[: ids.index(stop) + 1]
    assert events[-1].finish_reason == "stop"


def test_an_abort_frees_the_slot_of_a_running_request(engine: Engine) -> None:
    handle = engine.submit([1, 2, 3], SamplingParams(max_tokens=400, temperature=0.0))
    events = iter(handle)
    next(events)
    handle.abort()
    assert list(events)[-1].finish_reason == "abort"
    assert engine.load.free_slots == 4
    handle.abort()
    assert len(answer(engine, [1, 2, 3])) == 12, "the engine goes on"


def test_a_seeded_answer_is_the_same_alone_and_in_company(engine: Engine) -> None:
    params = SamplingParams(max_tokens=10, temperature=0.7, seed="a")
    alone = [event.token_id for event in answer(engine, [9, 8, 7], params)]
    company = [engine.submit(prompt, SamplingParams(max_tokens=10)) for prompt in prompts(3)]
    together = [event.token_id for event in answer(engine, [9, 8, 7], params)]
    for handle in company:
        list(handle)
    assert together == alone
    other = SamplingParams(max_tokens=10, temperature=0.7, seed="b")
    assert [event.token_id for event in answer(engine, [9, 8, 7], other)] != alone


def test_a_request_that_cannot_be_served_is_refused_with_numbers(engine: Engine) -> None:
    for prompt, tokens, words in (([], 1, "empty"), ([400], 1, "400"), ([-1], 1, "-1"), ([1] * 2040, 9, "2048")):
        with pytest.raises(ServeError, match=words):
            engine.submit(prompt, SamplingParams(max_tokens=tokens))


def test_settings_that_make_no_sense_are_refused_by_name(engine: Engine) -> None:
    wrong: list[tuple[str, object]] = [
        ("max_tokens", -1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("min_p", 1.5),
        ("top_k", -1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 3e-170),
        ("repetition_penalty", 1e30),
        ("presence_penalty", float("inf")),
        ("frequency_penalty", float("nan")),
        ("logit_bias", ((5, float("-inf")),)),
        ("logit_bias", ((100_000, 1.0),)),
    ]
    for name, value in wrong:
        params = SamplingParams(**({"max_tokens": 1} | {name: value}))  # type: ignore[arg-type]
        with pytest.raises(ServeError, match=name):
            engine.submit([1], params)


def test_nan_ends_the_request_with_an_error(random_dir: Path) -> None:
    model = load_model(random_dir)
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    decoder = Decoder(model)
    info = EngineInfo(random_dir, "cpu", "float32", decoder.config.vocab_size, 0, 64, 1)
    broken = Engine(Runner(decoder, 1, 64, torch.device("cpu")), Scheduler(1, 64, 64), info)
    try:
        last = answer(broken, [1, 2, 3])[-1]
        assert last.finish_reason == "error"
        assert "not finite" in (last.error or "")
        assert broken.load.free_slots == 1
    finally:
        broken.close()


def test_scores_of_a_prompt_that_are_no_numbers_end_the_request_with_an_error(random_dir: Path) -> None:
    model = load_model(random_dir)
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    decoder, prompt = Decoder(model), list(range(3, 43))
    info = EngineInfo(random_dir, "cpu", "float32", decoder.config.vocab_size, 0, 64, 1)
    scheduler = Scheduler(1, 64, 64)
    broken = Engine(Runner(decoder, 1, 64, torch.device("cpu")), scheduler, info)
    try:
        (only,) = broken.submit(prompt, SamplingParams(0, num_prompt_logprobs=2))
        assert only.finish_reason == "error"
        assert "not finite" in (only.error or "")
        list(broken.submit(prompt, SamplingParams(1)))
        assert scheduler.blocks.counts.found == 0, "nobody finds what it computed"
    finally:
        broken.close()


def test_a_failing_step_ends_its_requests_and_not_the_engine(random_dir: Path) -> None:
    shaky = make_engine(random_dir, num_slots=2)
    try:
        run = shaky._runner.run

        def fail_once(step: object) -> object:
            shaky._runner.run = run  # type: ignore[method-assign]
            raise RuntimeError("the chip said no")

        shaky._runner.run = fail_once  # type: ignore[method-assign, assignment]
        last = answer(shaky, [1, 2])[-1]
        assert last.finish_reason == "error"
        assert "the chip said no" in (last.error or "")
        assert answer(shaky, [1, 2])[-1].finish_reason == "length"
    finally:
        shaky.close()


@pytest.mark.parametrize("max_len", [8, 64], ids=["short", "long"])
def test_after_a_failed_step_nothing_it_may_have_left_is_found(random_dir: Path, max_len: int) -> None:
    prompt, params = list(range(3, 3 + max_len - 4)), SamplingParams(4, temperature=0.0, num_logprobs=2)
    with running(random_dir, max_batch_size=2, max_model_len=max_len) as engine:
        before = answer(engine, prompt, params)
        run = engine._runner.run

        def fail_once(step: object) -> object:
            engine._runner.run = run  # type: ignore[method-assign]
            raise RuntimeError("out of memory")

        engine._runner.run = fail_once  # type: ignore[method-assign, assignment]
        assert answer(engine, prompt, params)[-1].finish_reason == "error"
        found = engine.load.prefix_tokens_found
        assert answer(engine, prompt, params) == before
        assert engine.load.prefix_tokens_found == found


def test_a_chip_that_computes_nothing_any_more_ends_the_engine(random_dir: Path) -> None:
    dead = make_engine(random_dir, num_slots=1)

    def fail(step: object) -> object:
        raise RuntimeError("an illegal memory access was encountered")

    dead._runner.run = fail  # type: ignore[method-assign, assignment]
    first, second = dead.submit([1, 2], SamplingParams(max_tokens=5)), None
    with contextlib.suppress(EngineClosed):
        second = dead.submit([1, 2], SamplingParams(max_tokens=5))
    assert list(first)[-1].error == "RuntimeError: an illegal memory access was encountered"
    if second is not None:
        assert list(second)[-1].ended_by == "server_ended"
    dead._thread.join(20)
    assert not dead.load.alive
    with pytest.raises(EngineClosed):
        dead.submit([1], SamplingParams(max_tokens=1))


def test_what_arrives_while_the_engine_stops_is_told(random_dir: Path) -> None:
    """By a defect, as the first request has begun and the second was not yet seen."""
    broken, fails, arrived = make_engine(random_dir, num_slots=2), threading.Event(), threading.Event()

    def schedule() -> object:
        fails.set()
        assert arrived.wait(20)
        raise AssertionError("a defect")

    broken._scheduler.schedule = schedule  # type: ignore[method-assign, assignment]
    first = broken.submit([1, 2], SamplingParams(max_tokens=5))
    assert fails.wait(20)
    second = broken.submit([1, 2], SamplingParams(max_tokens=5))
    arrived.set()
    broken._thread.join(20)
    for handle in (first, second):
        assert handle._events.get(timeout=20).ended_by == "server_ended"
    assert not broken.load.alive


def test_closing_ends_what_is_under_way(random_dir: Path) -> None:
    closing = make_engine(random_dir, num_slots=1)
    handle = closing.submit([1, 2], SamplingParams(max_tokens=500, temperature=0.0))
    waiting = closing.submit([1, 2], SamplingParams(max_tokens=5))
    threading.Thread(target=lambda: (time.sleep(0.05), closing.close())).start()
    assert list(handle)[-1].finish_reason == "abort"
    assert list(waiting)[-1].finish_reason == "abort"
    with pytest.raises(ServeError, match="closed"):
        closing.submit([1], SamplingParams(max_tokens=1))
