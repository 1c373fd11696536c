"""Batches of rollouts cut into the batches of steps."""

from __future__ import annotations

import pytest
import torch

from crosschip.data import NOT_TRAINED
from crosschip.train.rl.batch import RlBatch, batch_of_groups
from crosschip.train.rl.stream import RolloutStream
from tests.train.rl.made import group, settings


class Collector:
    def __init__(self) -> None:
        self.num_collected = 0

    def __call__(self) -> RlBatch:
        self.num_collected += 1
        groups = [group(1.0, 0.0, 0.0, 1.0, logprobs=(-0.1 * self.num_collected,) * 3, number=n) for n in range(2)]
        return batch_of_groups(groups, ["a"], settings(), 0)


def test_a_batch_of_rollouts_is_dealt_out_once_and_can_be_had_again() -> None:
    collect = Collector()
    stream = RolloutStream(settings(updates_per_batch=2), 0, collect)
    first, second = stream.batch(0, 4), stream.batch(4, 4)
    assert collect.num_collected == 1
    assert torch.equal(stream.batch(0, 4).behaviour_BT, first.behaviour_BT)
    third = stream.batch(8, 4)
    assert collect.num_collected == 2
    assert third.behaviour_BT.min() < first.behaviour_BT.min()
    advantages = torch.cat((first.advantage_B, second.advantage_B)).sort().values
    assert advantages.tolist() == [-1.0] * 4 + [1.0] * 4  # every answer once


@pytest.mark.parametrize("seed", range(8))
def test_each_update_gets_its_share_of_the_answers_that_train_anything(seed: int) -> None:
    def collect() -> RlBatch:
        """Three of eight answers have a reward; the others are left out."""
        groups = [group(1.0, None, 0.0, None), group(None, None, None, 1.0, number=1)]
        return batch_of_groups(groups, ["a"], settings(), 0)

    stream = RolloutStream(settings(updates_per_batch=2), seed, collect)
    trains = [(stream.batch(place, 4).labels_BT != NOT_TRAINED).any(1) for place in (0, 4)]
    assert [int(each.sum()) for each in trains] == [2, 1]


def test_ranks_get_their_shares_of_one_batch() -> None:
    collect = Collector()
    streams = [RolloutStream(settings(updates_per_batch=2), 0, collect, rank) for rank in range(2)]
    whole = RolloutStream(settings(updates_per_batch=2), 0, collect)
    for step in (3, 4):  # the first step that is asked for is not the first of all, nor a multiple of the batch
        parts = [stream.batch(4 * step + 2 * rank, 2) for rank, stream in enumerate(streams)]
        step_whole = whole.batch(4 * step, 4)
        assert torch.equal(torch.cat([part.advantage_B for part in parts]), step_whole.advantage_B)
    assert collect.num_collected == 3  # one for each stream


def test_a_step_that_begins_at_no_multiple_of_the_batch_has_a_whole_batch() -> None:
    stream = RolloutStream(settings(), 0, Collector())
    assert len(stream.batch(20, 8)) == 8
    assert len(stream.batch(28, 8)) == 8


def test_after_a_roll_back_the_place_gets_new_rollouts() -> None:
    collect = Collector()
    stream = RolloutStream(settings(), 0, collect)
    for place in (0, 8, 16, 24):
        stream.batch(place, 8)
    stream.batch(0, 8)  # forgotten by now
    assert collect.num_collected == 5
    stream.batch(8, 8)
    assert collect.num_collected == 6


def test_what_is_forgotten_is_collected_anew() -> None:
    collect = Collector()
    stream = RolloutStream(settings(), 0, collect)
    stream.batch(0, 8)
    stream.forget()
    stream.batch(0, 8)
    assert collect.num_collected == 2
