"""Rollouts as tensors."""

from __future__ import annotations

import numpy as np
import torch

from crosschip.data import NOT_TRAINED
from crosschip.train.rl.batch import OWN_CHOICE, RlBatch, batch_of_groups
from crosschip.train.rl.sample import Group
from tests.train.rl.made import group, problem, sample, settings


def made(**fields: object) -> RlBatch:
    groups = [
        Group(problem(0, (1, 5, 6)), (sample(1.0, (7, 8, 2), (-0.1, -0.2, -0.3)), sample(0.0, (9, 2), (-0.4, -0.5)))),
        Group(problem(1, (1, 4)), (sample(0.0, (3, 2), (-0.6, -0.7), engine="b"), sample(1.0, (3,), (-0.8,)))),
    ]
    return batch_of_groups(groups, ["a", "b"], settings(**fields), pad_id=0)


def test_labels_are_the_sampled_tokens_behind_the_prompt() -> None:
    batch = made()
    assert batch.input_ids_BT[0, :5].tolist() == [1, 5, 6, 7, 8]
    assert batch.labels_BT[0, :6].tolist() == [NOT_TRAINED, NOT_TRAINED, 7, 8, 2, NOT_TRAINED]
    assert batch.behaviour_BT[0, 2:5].tolist() == torch.tensor([-0.1, -0.2, -0.3]).tolist()
    assert batch.labels_BT[3, :3].tolist() == [NOT_TRAINED, 3, NOT_TRAINED]
    assert batch.engine_B.tolist() == [0, 0, 1, 0]


def test_an_answer_whose_reward_failed_has_no_trained_token() -> None:
    batch = batch_of_groups([group(1.0, None, 0.0)], ["a"], settings(), pad_id=0)
    assert (batch.labels_BT != NOT_TRAINED).any(1).tolist() == [True, False, True]


def test_by_answer_every_answer_counts_alike_and_all_tokens_as_many_as_they_are() -> None:
    batch = made(average="answer")
    per_token_BT = (batch.labels_BT != NOT_TRAINED) * batch.weight_B[:, None]
    assert torch.allclose(per_token_BT.sum(1), torch.full((4,), 2.0))  # 8 tokens in 4 answers
    assert made().weight_B.tolist() == [1.0] * 4


def test_parts_hold_every_answer_once_and_are_as_wide_as_their_longest() -> None:
    long = sample(1.0, range(10, 50), finished=False)
    batch = batch_of_groups([Group(problem(), (long, sample(0.0), sample(0.0), sample(1.0)))], ["a"], settings(), 0)
    short_part, long_part = batch.parts(2)
    assert short_part.input_ids_BT.shape == (2, 16)
    assert long_part.input_ids_BT.shape == (2, 48)
    trained = sum(int((part.labels_BT != NOT_TRAINED).sum()) for part in (short_part, long_part))
    assert trained == int((batch.labels_BT != NOT_TRAINED).sum())


def test_routes_of_engines_that_tell_none_are_left_to_the_router() -> None:
    routes = np.arange(10, dtype=np.uint8).reshape(5, 1, 2)
    told = Group(problem(), (sample(1.0, routes=routes), sample(0.0)))
    batch = batch_of_groups([told], ["a"], settings(), 0)
    assert batch.routes_BTLK is not None
    assert batch.routes_BTLK[0, :5].tolist() == routes.tolist()
    assert (batch.routes_BTLK[0, 5:] == OWN_CHOICE).all()
    assert (batch.routes_BTLK[1] == OWN_CHOICE).all()
    ignored = batch_of_groups([told], ["a"], settings(rollouts={"replay_routes": False}), 0)
    assert ignored.routes_BTLK is None


def test_widening_changes_nothing_that_counts() -> None:
    batch = made()
    wider = batch.widened(5, pad_id=0)
    assert wider.input_ids_BT.shape[1] == batch.input_ids_BT.shape[1] + 5
    again = wider.rows(torch.arange(4))
    for name, value in vars(batch.rows(torch.arange(4))).items():
        assert value is None or torch.equal(value, getattr(again, name)), name
