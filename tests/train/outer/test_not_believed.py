"""Parameters that the guard does not believe stay out of the common ones; and how a group with nothing to give ends.

Each step adds 1 to every parameter and trains 10 tokens (see `sidecar_here`).
"""

from __future__ import annotations

import pytest
import torch

from tests.train.outer.sidecar_here import Training, begun


def trained(training: Training, num_steps: int) -> Training:
    for _ in range(num_steps):
        training.step()
    return training


def tokens_sent(training: Training) -> list[int]:
    return [command.num_tokens for command in training.sidecar.sent]


def events(training: Training) -> list[str]:
    return [event.event for event in training.groups.new_events()]


def test_a_wrong_weight_that_is_finite_is_not_sent() -> None:
    training = trained(begun(interval=4, overlap_steps=2, num_fragments=2), 1)
    for part in training.weights.parts:
        part.data[0] = 1e36
        training.optimizer.state[part] = {"momentum_buffer": torch.ones_like(part)}
    training.step(change=0.0, updated=False)
    assert tokens_sent(training) == [0]
    assert not training.sidecar.memory.exchange.any()
    assert training.weights.values() == [{0.0}, {0.0}], "also of the fragment that is not due"
    assert not training.optimizer.state
    assert events(training) == ["excluded"]


def test_after_it_the_group_goes_on_from_what_is_common() -> None:
    training = trained(begun(interval=4, overlap_steps=2), 1)
    training.step(change=1e36, updated=False)
    trained(training, 3)
    assert tokens_sent(training) == [0, 30], "nobody had anything to give at first"
    assert training.weights.values() == [{3.0}, {3.0}]
    assert events(training) == ["excluded"]


def test_after_a_believed_step_a_batch_that_was_left_out_costs_its_own_tokens_alone() -> None:
    training = trained(begun(interval=4, overlap_steps=0), 2)
    training.step(change=0.0, updated=False)
    training.step()
    assert tokens_sent(training) == [30]
    assert training.weights.values() == [{3.0}, {3.0}]
    assert not events(training)


def test_a_roll_back_makes_parameters_that_are_believed() -> None:
    training = begun(interval=4, overlap_steps=2)
    training.step(updated=False)
    training.groups.take_common()
    training.step()
    assert tokens_sent(training) == [10]
    assert not events(training)


def test_at_the_end_the_same_holds() -> None:
    training = trained(begun(interval=4, overlap_steps=0), 1)
    training.step(change=1e36, updated=False)
    training.groups.finish()
    assert tokens_sent(training) == [0]
    assert training.weights.values() == [{0.0}, {0.0}]
    assert events(training) == ["excluded"]


@pytest.mark.parametrize(
    ("num_fragments", "num_steps", "sent"),
    [(1, 2, [20]), (1, 3, [20, 10]), (2, 2, [20, 20]), (2, 3, [20, 30, 10]), (2, 4, [20, 40, 20])],
)
def test_the_end_has_an_outer_step_for_each_fragment_that_was_trained(
    num_fragments: int, num_steps: int, sent: list[int]
) -> None:
    training = trained(begun(interval=2, overlap_steps=0, num_fragments=num_fragments), num_steps)
    training.groups.finish()
    assert tokens_sent(training) == sent
    assert training.weights.values() == [{float(num_steps)}, {float(num_steps)}]


@pytest.mark.parametrize("num_fragments", [1, 2])
def test_a_group_with_nothing_to_give_takes_part_in_the_end_all_the_same(num_fragments: int) -> None:
    training = trained(begun(interval=8, overlap_steps=0, num_fragments=num_fragments), 3)
    training.groups.take_common()
    training.groups.finish()
    assert tokens_sent(training) == [0] * num_fragments, "the others wait for it, and it takes what they have trained"
