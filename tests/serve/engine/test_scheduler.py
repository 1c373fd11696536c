"""The policy alone: who is computed when, for any traffic."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crosschip.serve.engine.blocks import BLOCK_TOKENS, BlockManager
from crosschip.serve.engine.holdings import blocks_for
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
        for each in rows:  # who found all but its last token in a known prefix begins among those that decode
            started.setdefault(each, number)
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
    modules = "request, blocks, holdings, scheduler, engine, engine_info, refusals, overwrite"
    program = f"import sys\nfrom crosschip.serve.engine import {modules}\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


class _Traffic:
    """Runs a scheduler over any traffic, with a model of what lies in each block, and checks every step."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.content: dict[int, list[int | None]] = {}  # what each block's positions hold, as tokens

    def step(self) -> tuple[Step, list[Request]]:
        step = self.scheduler.schedule()
        for source, target in step.copies:
            self.content[target] = list(self.content[source])
        for chunk in (chunk for group in step.prefill for chunk in group):
            self._write(chunk.request, chunk.start, chunk.length)
        for each in step.decode:
            self._write(each, each.num_computed, 1)
        self.scheduler.advance(step)
        tokened = [chunk.request for group in step.prefill for chunk in group if chunk.completes_prompt]
        return step, tokened + list(step.decode)

    def _write(self, request: Request, start: int, length: int) -> None:
        """What a call does: all that came before must lie in the request's blocks, the new is written to its own."""
        ids = request.token_ids(0, start + length)
        for position in range(start):
            block = request.blocks[position // BLOCK_TOKENS]
            assert self.content[block][position % BLOCK_TOKENS] == ids[position], "another one's content"
        for position in range(start, start + length):
            block = request.blocks[position // BLOCK_TOKENS]
            held = self.content.setdefault(block, [None] * BLOCK_TOKENS)
            shared = self.scheduler.blocks.references(block) > 1
            assert not shared or held[position % BLOCK_TOKENS] in (None, ids[position]) or position >= len(ids) - 1
            held[position % BLOCK_TOKENS] = ids[position]


@settings(max_examples=150, deadline=None)
@given(
    prompts=st.lists(st.tuples(st.integers(1, 120), st.integers(1, 50), st.integers(0, 3)), min_size=1, max_size=12),
    num_slots=st.integers(1, 5),
    spare_blocks=st.integers(0, 8),
    budget=st.integers(1, 90),
    prefix_cache=st.booleans(),
    deterministic=st.booleans(),
    leaving=st.sets(st.integers(0, 30)),
)
def test_any_traffic_is_served_by_any_pool(
    prompts: list[tuple[int, int, int]],
    num_slots: int,
    spare_blocks: int,
    budget: int,
    prefix_cache: bool,
    deterministic: bool,
    leaving: set[int],
) -> None:
    """Preemption, shared prefixes, siblings and aborts in any mixture: all end, and every block comes back."""
    num_blocks = spare_blocks + max(blocks_for(length + max_tokens) for length, max_tokens, _ in prompts)
    manager = BlockManager(num_blocks, prefix_cache)
    scheduler = Scheduler(num_slots, 192, budget, manager, deterministic)
    traffic = _Traffic(scheduler)
    pending = []
    for length, max_tokens, num_siblings in prompts:
        leader, *siblings = (request(length, max_tokens) for _ in range(1 + num_siblings))
        leader.siblings = list(siblings)
        scheduler.add(leader)
        pending += [leader, *siblings]
    assert scheduler.num_waiting == len(pending)
    aborted = [pending[number] for number in leaving if number < len(pending)]
    for number in range(5000):
        if number % 3 == 0 and aborted:
            scheduler.remove([aborted.pop()])
        step, tokened = traffic.step()
        if step.is_empty:
            assert not aborted or scheduler.num_waiting == 0
            break
        assert len(tokened) == len(set(tokened)), "one token a step"
        for each in tokened:
            each.output_ids.append(len(each.output_ids) + 1000 * pending.index(each))
        scheduler.remove([each for each in tokened if each.finish_reason_after(-1)])
    gone = {pending[number] for number in leaving if number < len(pending)}
    assert all(len(each.output_ids) == each.params.max_tokens for each in pending if each not in gone)
    assert manager.num_free == num_blocks
    assert all(manager.references(block) == 0 for block in range(num_blocks))
    assert scheduler.num_free_slots == num_slots
    assert scheduler.num_waiting == 0
    assert not deterministic or scheduler.num_preemptions == 0


def test_the_newest_is_preempted_and_computed_again_with_its_answer() -> None:
    scheduler = Scheduler(2, 128, 1000, BlockManager(3, prefix_cache=False))
    traffic = _Traffic(scheduler)
    old, new = request(31, 30), request(31, 30)
    scheduler.add(old)
    scheduler.add(new)
    for _ in range(3):
        for each in traffic.step()[1]:
            each.output_ids.append(7)
    assert scheduler.num_preemptions == 1
    assert old.slot >= 0
    assert new.slot == -1
    assert new.prefill_end == 31 + len(new.output_ids)
    assert scheduler.schedule().prefill == [], "no room yet"
    scheduler.remove([old])
    (group,) = scheduler.schedule().prefill
    assert group[0].length == 31 + len(new.output_ids)


def test_siblings_share_blocks_and_copy_the_last_one() -> None:
    scheduler = Scheduler(3, 128, 1000, BlockManager(12))
    leader, sibling = request(40, 9), request(40, 9)
    leader.siblings = [sibling]
    scheduler.add(leader)
    first = scheduler.schedule()
    assert lengths(first) == [[40]], "the sibling waits"
    scheduler.advance(first)
    step = scheduler.schedule()
    assert step.prefill == []
    assert list(step.decode) == [leader, sibling], "its last token needs no call of its own"
    assert sibling.next_input == 39
    assert step.copies == [(leader.blocks[1], sibling.blocks[1])]
    assert sibling.blocks[0] == leader.blocks[0]
    assert scheduler.blocks.references(leader.blocks[0]) == 2
    assert scheduler.blocks.references(leader.blocks[1]) == 1


@pytest.mark.parametrize(("num_blocks", "num_prompt"), [(2, 60), (2, 40), (4, 120)])
def test_a_sibling_gives_back_what_it_holds_where_that_leaves_no_room_for_its_own(
    num_blocks: int, num_prompt: int
) -> None:
    scheduler = Scheduler(2, 192, 1000, BlockManager(num_blocks))
    traffic = _Traffic(scheduler)
    leader, *siblings = pending = [request(num_prompt, 4) for _ in range(4)]
    leader.siblings = list(siblings)
    scheduler.add(leader)
    while scheduler.num_waiting or scheduler.active:
        step, tokened = traffic.step()
        assert not step.is_empty, "requests are left, and nothing will ever be computed"
        for each in tokened:
            each.output_ids.append(0)
        scheduler.remove([each for each in tokened if each.finish_reason_after(-1)])
    assert [len(each.output_ids) for each in pending] == [4] * 4
    assert scheduler.blocks.num_free == num_blocks


def test_a_leader_that_leaves_hands_on_its_prompt() -> None:
    scheduler = Scheduler(2, 128, 8, BlockManager(12))
    leader, *siblings = (request(40, 2) for _ in range(3))
    leader.siblings = list(siblings)
    scheduler.add(leader)
    scheduler.advance(scheduler.schedule())
    scheduler.remove([leader])
    assert scheduler.num_waiting == 2
    assert [chunk.request for group in scheduler.schedule().prefill for chunk in group] == [siblings[0]]
    scheduler.remove(siblings)
    assert scheduler.num_waiting == 0
    assert scheduler.blocks.num_free == 12


def test_a_known_beginning_is_not_computed_again_unless_it_must_be_scored() -> None:
    scheduler = Scheduler(2, 128, 1000, BlockManager(12))
    scheduler.add(request(70, 1))
    scheduler.advance(scheduler.schedule())
    scheduler.remove(scheduler.active)
    again, scored = request(70, 1), Request(list(range(70)), SamplingParams(1, num_prompt_logprobs=0))
    scheduler.add(again)
    scheduler.add(scored)
    chunks = {chunk.request: chunk for group in scheduler.schedule().prefill for chunk in group}
    assert chunks[again].start == 64
    assert chunks[scored].start == 0
    assert (scheduler.blocks.counts.found, scheduler.blocks.counts.asked) == (64, 210)


def test_deterministic_chunks_depend_on_the_prompt_alone() -> None:
    for budget in (5, 33, 1000):
        scheduler = Scheduler(3, 128, budget, BlockManager(12), deterministic=True)
        for length in (40, 100):
            scheduler.add(request(length))
        spans: dict[int, list[tuple[int, int]]] = {40: [], 100: []}
        for _ in range(9):
            step = scheduler.schedule()
            assert all(len(group) == 1 for group in step.prefill)
            for (chunk,) in step.prefill:
                spans[len(chunk.request.prompt_ids)].append((chunk.start, chunk.length))
            scheduler.advance(step)
        assert spans == {40: [(0, 32), (32, 8)], 100: [(0, 32), (32, 32), (64, 32), (96, 4)]}
