"""The policy alone: who is computed when, for any traffic."""

from __future__ import annotations

import subprocess
import sys

from hypothesis import given, settings
from hypothesis import strategies as st

from crosschip.serve.engine.request import Request, SamplingParams
from crosschip.serve.engine.scheduler import Scheduler, Step


def request(num_prompt: int, max_tokens: int = 4) -> Request:
    return Request(list(range(num_prompt)), SamplingParams(max_tokens=max_tokens))


def lengths(step: Step) -> list[list[int]]:
    return [[chunk.length for chunk in group] for group in step.prefill]


def test_prompts_are_computed_before_they_decode() -> None:
    scheduler = Scheduler(num_slots=2, max_len=64, max_prefill_tokens=32)
    first = request(5)
    scheduler.add(first)
    step = scheduler.schedule()
    assert lengths(step) == [[5]]
    assert step.decode == ()
    scheduler.advance(step)
    step = scheduler.schedule()
    assert step.prefill == []
    assert list(step.decode) == [first]
    scheduler.advance(step)
    assert first.num_computed == 6


def test_a_long_prompt_never_holds_up_running_answers_for_more_than_its_share() -> None:
    scheduler = Scheduler(num_slots=2, max_len=200, max_prefill_tokens=32)
    running, long = request(4), request(100)
    scheduler.add(running)
    scheduler.advance(scheduler.schedule())
    scheduler.add(long)
    chunks = []
    for _ in range(4):
        step = scheduler.schedule()
        assert list(step.decode) == [running], "the running answer gets its token in every step"
        chunks += [chunk.length for group in step.prefill for chunk in group]
        scheduler.advance(step)
    assert chunks == [32, 32, 32, 4]
    assert set(scheduler.schedule().decode) == {running, long}


def test_the_decode_batch_is_the_same_object_until_it_changes() -> None:
    scheduler = Scheduler(num_slots=2, max_len=64, max_prefill_tokens=32)
    first, second = request(3), request(3)
    scheduler.add(first)
    scheduler.add(second)
    scheduler.advance(scheduler.schedule())
    before = scheduler.schedule()
    scheduler.advance(before)
    assert scheduler.schedule().decode is before.decode
    scheduler.remove([first])
    assert scheduler.schedule().decode is not before.decode


def test_similar_prompts_share_a_call_and_unlike_ones_do_not() -> None:
    scheduler = Scheduler(num_slots=4, max_len=64, max_prefill_tokens=1000)
    for length in (10, 50, 9, 48):
        scheduler.add(request(length))
    assert lengths(scheduler.schedule()) == [[50, 48], [10, 9]]


def test_padding_never_reaches_over_the_end_of_a_slot() -> None:
    scheduler = Scheduler(num_slots=2, max_len=40, max_prefill_tokens=30)
    scheduler.add(request(39, max_tokens=1))
    scheduler.advance(scheduler.schedule())
    scheduler.add(request(12))
    for group in scheduler.schedule().prefill:
        assert all(chunk.start + group[0].length <= 40 for chunk in group)


@settings(max_examples=200, deadline=None)
@given(
    prompts=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 6)), min_size=1, max_size=30),
    num_slots=st.integers(1, 5),
    budget=st.integers(1, 40),
)
def test_any_traffic_is_served_completely(prompts: list[tuple[int, int]], num_slots: int, budget: int) -> None:
    scheduler = Scheduler(num_slots, max_len=70, max_prefill_tokens=budget)
    pending = [request(*sizes) for sizes in prompts]
    for each in pending:
        scheduler.add(each)
    started: dict[Request, int] = {}
    for number in range(10_000):
        step = scheduler.schedule()
        if step.is_empty:
            break
        chunks = [chunk for group in step.prefill for chunk in group]
        rows = [chunk.request for chunk in chunks] + list(step.decode)
        assert len(rows) == len(set(rows)), "a request is in a step once"
        assert sum(chunk.length for chunk in chunks) <= budget
        assert len({each.slot for each in rows}) == len(rows)
        assert all(chunk.start == chunk.request.num_computed for chunk in chunks)
        assert all(chunk.start + group[0].length <= 70 for group in step.prefill for chunk in group)
        started |= {chunk.request: number for chunk in chunks if chunk.start == 0}
        scheduler.advance(step)
        tokened = [chunk.request for chunk in chunks if chunk.completes_prompt] + list(step.decode)
        for each in tokened:
            each.output_ids.append(0)
        scheduler.remove([each for each in tokened if each.finish_reason_after(0)])
    assert all(len(each.output_ids) == each.params.max_tokens for each in pending)
    begun = [started[each] for each in pending]
    assert begun == sorted(begun), "first come, first served"
    assert scheduler.num_free_slots == num_slots


def test_an_aborted_request_leaves_wherever_it_is() -> None:
    scheduler = Scheduler(num_slots=1, max_len=64, max_prefill_tokens=8)
    prefilling, waiting, other = request(20), request(5), request(5)
    for each in (prefilling, waiting, other):
        scheduler.add(each)
    scheduler.advance(scheduler.schedule())
    scheduler.remove([waiting, prefilling])
    assert scheduler.num_free_slots == 1
    step = scheduler.schedule()
    assert [chunk.request for group in step.prefill for chunk in group] == [other]
    scheduler.remove([waiting])
    assert scheduler.num_free_slots == 0, "removing twice frees nothing twice"


def test_the_policy_imports_no_torch() -> None:
    modules = "request, scheduler, engine"
    program = f"import sys\nfrom crosschip.serve.engine import {modules}\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
