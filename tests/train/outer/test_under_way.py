"""What comes between a part's sending and its return: a roll-back, a checkpoint, the end of the sidecar.

Each step adds 1 to every parameter, and an outer step of one group alone makes what it sent the common parameters: so a
group has trained as many steps as its parameters say, wherever they went back to.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from crosschip.train.outer.outer_files import load_outer_state
from tests.train.outer.sidecar_here import Training, begun


def trained(training: Training, num_steps: int) -> Training:
    for _ in range(num_steps):
        training.step()
    return training


def test_what_comes_back_has_the_steps_since_it_was_sent_on_top() -> None:
    training = trained(begun(interval=4, overlap_steps=2), 4)
    assert training.weights.values() == [{4.0}, {4.0}]
    assert set(training.sidecar.outer.parameters(0).tolist()) == {2.0}


@pytest.mark.parametrize("is_committed", [False, True], ids=["not-yet-committed", "committed"])
@pytest.mark.parametrize("num_fragments", [1, 2])
def test_after_a_roll_back_only_what_was_trained_since_is_on_top(num_fragments: int, is_committed: bool) -> None:
    training = trained(begun(interval=4, overlap_steps=2, num_fragments=num_fragments), 2)  # two steps are sent
    training.step(1e6)
    if is_committed:
        training.sidecar.commit()
    assert training.groups.take_common()
    assert training.weights.values() == [{0.0}, {0.0}], "what the part was sent with, committed or not"
    training.step()
    untaken = {1.0} if num_fragments == 2 else {3.0}  # of two fragments the first alone was under way
    assert training.weights.values() == [{3.0}, untaken]


def test_a_roll_back_before_the_sending_leaves_no_trace() -> None:
    training = trained(begun(interval=4, overlap_steps=2), 1)
    training.groups.take_common()
    trained(training, 3)  # one is sent, two follow
    assert training.weights.values() == [{3.0}, {3.0}]


def test_with_a_share_of_its_own_nothing_is_subtracted() -> None:
    training = trained(begun(interval=4, overlap_steps=2, own_share=0.5), 3)
    training.groups.take_common()
    training.step()
    assert training.weights.values() == [{1.5}, {1.5}], "half of 2, which was sent, and half of 1"


@pytest.mark.parametrize("is_committed", [False, True], ids=["not-yet-committed", "committed"])
@pytest.mark.parametrize("num_fragments", [1, 2])
def test_a_part_that_is_under_way_at_a_save_is_sent_again(num_fragments: int, is_committed: bool) -> None:
    words = {"interval": 4, "overlap_steps": 2, "num_fragments": num_fragments}
    training = trained(begun(**words), 6)  # type: ignore[arg-type]
    assert training.groups.outer.commits == 1
    if is_committed:
        training.sidecar.commit()
    tensors, counts = training.groups.export()
    assert (counts["commits"], counts["inner_steps"]) == (1, 2)
    assert sorted(set(tensors["parameters"].tolist())) == ([0.0, 2.0] if num_fragments == 2 else [2.0])

    again = begun(**words)  # type: ignore[arg-type]
    again.groups.load(tensors, counts)
    again.groups.join()
    again.weights.train_by(6)
    again.step()  # sends the same fragment, with all that was trained of it
    trained(again, 1)
    trained(training, 2)
    assert again.groups.outer.commits == training.groups.outer.commits == 2
    assert again.weights.values() == training.weights.values() == [{8.0}, {8.0}]


def test_a_save_holds_what_compression_had_lost_when_the_part_was_sent() -> None:
    training = begun(interval=4, overlap_steps=2, num_fragments=2, compression="int8")
    training.sidecar.memory.residual.fill_(0.25)
    trained(training, 2)
    first = training.groups.outer.fragments[0]
    training.sidecar.memory.residual[first.start : first.stop] = 0.75  # as a sidecar does that commits
    tensors, _ = training.groups.export()
    assert set(tensors["residual"].tolist()) == {0.25}
    trained(training, 2)
    tensors, _ = training.groups.export()
    assert sorted(set(tensors["residual"].tolist())) == [0.25, 0.75]


def test_no_mixture_of_two_groups_states_is_saved(tmp_path: Path) -> None:
    training = trained(begun(interval=4, overlap_steps=2), 3)
    training.groups.save(tmp_path, 3)
    training.sidecar.memory.count_healing()
    training.groups.save(tmp_path, 4)
    assert [load_outer_state(tmp_path, 0, step) is not None for step in (3, 4)] == [True, False]
    (event,) = training.groups.new_events()
    assert event.event == "outer-state-not-saved"


@pytest.mark.parametrize("num_fragments", [1, 2])
def test_a_sidecar_that_was_lost_after_its_commit_gives_the_part_back_all_the_same(num_fragments: int) -> None:
    training = trained(begun(interval=4, overlap_steps=2, num_fragments=num_fragments), 3)
    training.sidecar.commit()
    training.sidecar.outer.parameters(0).add_(10)  # what other groups have trained
    training.sidecar.is_lost = True
    training.step()
    assert [command.num_tokens for command in training.sidecar.sent] == [20, 0]
    assert training.weights.values() == [{14.0}, {4.0} if num_fragments == 2 else {14.0}]
    tensors, counts = training.groups.export()
    assert counts["commits"] == 1
    assert counts["tokens_since_0"] == 0
    assert torch.equal(tensors["parameters"][:3], torch.full((3,), 12.0))
