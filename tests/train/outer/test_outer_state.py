from __future__ import annotations

import os

import pytest
import torch

from crosschip.train.outer.memory import Layout, SharedMemory, open_descriptor
from crosschip.train.outer.outer_state import OuterState
from crosschip.train.outer.placement import split_into_fragments

SIZES = [70, 30, 50, 50, 100]


def new_state(num_fragments: int) -> tuple[OuterState, SharedMemory, int]:
    layout = Layout(sum(SIZES), 4096, has_outer_state=True)
    descriptor = open_descriptor(layout)
    memory = SharedMemory(descriptor, layout)
    state = OuterState(memory, split_into_fragments(SIZES, num_fragments))
    state.begin(torch.randn(sum(SIZES), generator=torch.Generator().manual_seed(0)))
    return state, memory, descriptor


def gradient(state: OuterState) -> torch.Tensor:
    here = state.fragments[state.due]
    return torch.randn(here.stop - here.start, generator=torch.Generator().manual_seed(state.commits))


def test_it_is_the_nesterov_sgd_of_torch() -> None:
    state, _, _ = new_state(1)
    reference = torch.nn.Parameter(state.parameters(0).double())
    optimizer = torch.optim.SGD([reference], lr=0.7, momentum=0.9, nesterov=True)
    magnitude = float(reference.detach().abs().max())
    for _ in range(10):
        reference.grad = gradient(state).double()
        state.step(gradient(state), 0.7, 0.9)
        optimizer.step()
        magnitude = max(magnitude, float(reference.detach().abs().max()))
    # Six roundings a step, of numbers up to the largest parameter or ten gradients' sum of momenta.
    bound = 10 * 6 * torch.finfo(torch.float32).eps * max(magnitude, 40.0)
    assert float((state.parameters(0) - reference.detach()).abs().max()) < bound


@pytest.mark.parametrize("num_fragments", [1, 2, 3])
def test_fragments_take_turns_and_leave_the_others_alone(num_fragments: int) -> None:
    state, _, _ = new_state(num_fragments)
    for commits in range(7):
        assert state.due == commits % num_fragments
        before = [state.parameters(each).clone() for each in range(num_fragments)]
        due = state.due
        state.step(gradient(state), 0.7, 0.9)
        for each in range(num_fragments):
            assert torch.equal(state.parameters(each), before[each]) == (each != due)


def test_a_step_that_was_cut_off_leaves_the_state_before_it() -> None:
    state, memory, descriptor = new_state(2)
    state.step(gradient(state), 0.7, 0.9)
    before = state.export(state.commits)
    commits = state.commits
    state.step(gradient(state), 0.7, 0.9)
    memory.commits = commits  # as if the process had been killed before its last store
    again = OuterState(SharedMemory(os.dup(descriptor), memory.layout), state.fragments)  # another process's view
    assert torch.equal(again.export(again.commits), before)
    state.step(gradient(state), 0.7, 0.9)
    assert not torch.equal(again.export(again.commits), before)


@pytest.mark.parametrize("num_fragments", [1, 3])
def test_the_state_before_the_last_step_is_still_there(num_fragments: int) -> None:
    state, _, _ = new_state(num_fragments)
    for commits in range(5):
        before = state.export(commits)
        state.step(gradient(state), 0.7, 0.9)
        assert torch.equal(state.export(commits), before)
        assert not torch.equal(state.export(commits + 1), before)


@pytest.mark.parametrize("commits", [0, 1, 2, 5])
def test_what_was_exported_is_taken_over_at_any_count(commits: int) -> None:
    donor, _, _ = new_state(3)
    for _ in range(commits):
        donor.step(gradient(donor), 0.7, 0.9)
    other, _, _ = new_state(3)
    other.step(gradient(other), 0.1, 0.9)
    other.load(donor.export(donor.commits), donor.commits)
    for _ in range(4):
        assert torch.equal(other.export(other.commits), donor.export(donor.commits))
        assert other.due == donor.due
        donor.step(gradient(donor), 0.7, 0.9)
        other.step(gradient(other), 0.7, 0.9)
