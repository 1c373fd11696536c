"""The objective of GRPO against plain formulas, and what it sees of a mismatch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from crosschip.data import NOT_TRAINED
from crosschip.train.rl.batch import RlBatch
from crosschip.train.rl.objective import Agreement, GrpoObjective, k3, token_losses
from crosschip.train.rl.panel import panel
from tests.model.configs import random_model
from tests.train.rl.made import settings, small_config


def batch(behaviour: list[list[float]], advantage: list[float], old: list[list[float]] | None = None) -> RlBatch:
    """Each row one answer; a behaviour log-prob of 0 marks a position that is not trained."""
    behaviour_BT = torch.tensor(behaviour)
    labels_BT = torch.where(behaviour_BT != 0, 3, NOT_TRAINED)
    return RlBatch(
        torch.full_like(labels_BT, 1),
        labels_BT,
        torch.tensor(advantage),
        torch.ones(len(advantage)),
        behaviour_BT,
        torch.zeros(len(advantage), dtype=torch.int64),
        old_BT=None if old is None else torch.tensor(old),
    )


def test_on_policy_the_gradient_is_that_of_the_advantage_times_the_log_prob() -> None:
    logprobs = torch.tensor([[-1.0, -2.0], [-0.5, 0.0]], requires_grad=True)
    made = batch([[-1.0, -2.0], [-0.5, 0.0]], [2.0, -1.0])
    token_losses(logprobs, made, settings()).loss_BT.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[-2.0, -2.0], [1.0, 0.0]]


@pytest.mark.parametrize(
    ("gap", "advantage", "is_clipped"),
    [(0.5, 1.0, True), (0.5, -1.0, False), (-0.5, -1.0, True), (-0.5, 1.0, False), (0.2, 1.0, False)],
)
def test_the_ratio_is_clipped_on_the_side_where_it_gains(gap: float, advantage: float, is_clipped: bool) -> None:
    logprobs = torch.tensor([[-1.0 + gap]], requires_grad=True)
    made = batch([[-1.0]], [advantage], old=[[-1.0]])
    losses = token_losses(logprobs, made, settings(clip_low=0.2, clip_high=0.28))
    losses.loss_BT.sum().backward()
    assert logprobs.grad is not None
    assert losses.clipped_BT.item() is is_clipped
    assert (logprobs.grad.item() == 0.0) is is_clipped


def test_importance_weights_are_truncated_and_not_differentiated() -> None:
    logprobs = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    made = batch([[-3.0, -1.2]], [1.0])  # e^2 = 7.4 times as likely for the trainer, and e^0.2 = 1.22
    losses = token_losses(logprobs, made, settings(rollouts={"importance_limit": 2.0}))
    assert losses.importance_BT.tolist() == [pytest.approx([2.0, 1.2214], rel=1e-4)]
    assert losses.truncated_BT.tolist() == [[True, False]]
    losses.loss_BT.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [pytest.approx([-2.0, -1.2214], rel=1e-4)]
    uncorrected = token_losses(logprobs, made, settings(rollouts={"correction": "none"}))
    assert uncorrected.importance_BT.tolist() == [[1.0, 1.0]]


def test_answers_far_from_the_trainers_are_rejected_or_vetoed() -> None:
    logprobs = torch.full((3, 2), -1.0)
    made = batch([[-1.0, -1.1], [-2.0, -2.0], [-0.01, -1.0]], [1.0, 1.0, 1.0])
    rejecting = settings(rollouts={"reject_outside": 2.0})
    assert token_losses(logprobs, made, rejecting).kept_B.tolist() == [True, False, True]
    vetoing = settings(rollouts={"veto_below": 0.5})
    losses = token_losses(logprobs, made, vetoing)
    assert losses.kept_B.tolist() == [True, True, False]
    assert losses.loss_BT[2].abs().sum() == 0.0


def test_the_pull_towards_the_reference_is_zero_there_and_grows_away_from_it() -> None:
    made = replace(batch([[-1.0]], [0.0]), reference_BT=torch.tensor([[-1.0]]))
    pulls = [
        token_losses(torch.tensor([[value]]), made, settings(kl_weight=0.1)).loss_BT.item() for value in (-1.0, -1.5)
    ]
    assert pulls[0] == 0.0
    assert pulls[1] > 0.0


def test_k3_is_unbiased_where_tokens_come_from_the_first_distribution() -> None:
    first, second = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.3, 0.2])
    expected = (first * (first / second).log()).sum()
    assert (first * k3(first.log() - second.log())).sum() == pytest.approx(float(expected), rel=1e-5)


def test_the_objective_tells_what_engine_and_trainer_disagree_about() -> None:
    model, heard = random_model(small_config()), list[Agreement]()
    made = batch([[0.0, -1.0, -2.0], [0.0, -1.0, 0.0]], [1.0, -1.0])
    objective = GrpoObjective(settings(), heard.append)
    minimised, numbers = objective(model, made, torch.float32, 3)
    minimised.backward()
    found = model.logprobs(made.input_ids_BT, made.labels_BT).logprobs_BT.detach()
    assert numbers[0] == pytest.approx(-float(found.sum()), rel=1e-5)
    (agreement,) = panel(heard, {"engine": "cpu"})
    expected_dp = (found.exp() - made.behaviour_BT.exp()).abs()[made.labels_BT != NOT_TRAINED]
    assert agreement.num_tokens == 3
    assert agreement.mean_dp == pytest.approx(float(expected_dp.mean()), rel=1e-4)
    assert agreement.max_dp == pytest.approx(float(expected_dp.max()), rel=1e-4)
    assert agreement.k3 > 0.0
    assert model.lm_head.weight.grad is not None
    assert model.lm_head.weight.grad.abs().sum() > 0


def test_an_engine_that_agrees_shows_nothing() -> None:
    model, heard = random_model(small_config()), list[Agreement]()
    made = batch([[0.0, -1.0, -2.0]], [1.0])
    own = model.logprobs(made.input_ids_BT, made.labels_BT).logprobs_BT.detach()
    GrpoObjective(settings(), heard.append)(model, replace(made, behaviour_BT=own), torch.float32, 2)
    (agreement,) = panel(heard, {"engine": "cpu"})
    assert agreement.k3 < 1e-9
    assert agreement.max_dp < 1e-6
