"""The objective of GRPO, with the engine's own log-probs taken into account. B answers, T positions.

The loss of a token is -w * min(r * A, clip(r) * A): A the answer's advantage, r the ratio of the present policy to the
trainer's own before this batch, w the truncated weight of that over what the engine sampled with (arXiv 2402.03300;
asymmetric clipping: 2503.14476; the two ratios apart: 2505.24298; truncation: 2502.20066 names why it is needed).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from crosschip.data import NOT_TRAINED, Batch
from crosschip.recipe import RlSettings
from crosschip.train.rl.batch import RlBatch

if TYPE_CHECKING:
    from crosschip.model import TokenLogprobs, Transformer

__all__ = ["Agreement", "GrpoObjective", "score_batch", "token_losses"]


@dataclass(frozen=True)
class TokenLosses:
    """What is minimised, each [B, T]; `kept_B` says which answers were neither rejected nor vetoed."""

    loss_BT: Tensor
    importance_BT: Tensor
    clipped_BT: Tensor
    truncated_BT: Tensor
    kl_BT: Tensor
    kept_B: Tensor


@dataclass(frozen=True)
class Agreement:
    """How an engine's probabilities agree with the trainer's over some answers; a row for each, [B, 6].

    Columns: trained tokens, sum of |dp|, largest |dp|, sum of k3, truncated tokens, 1 where the answer was left out.
    """

    engine_B: Tensor
    sums_B6: Tensor


def token_losses(logprobs_BT: Tensor, batch: RlBatch, settings: RlSettings) -> TokenLosses:
    """The loss of each token from the present policy's log-probs, which carry the gradient.

    Positions without a trained label hold zeros throughout.
    """
    trained_BT = batch.labels_BT != NOT_TRAINED
    old_BT = logprobs_BT.detach() if batch.old_BT is None else batch.old_BT
    gap_BT = (old_BT - batch.behaviour_BT) * trained_BT
    kept_B = _kept(gap_BT, trained_BT, settings)
    weight_BT = gap_BT.exp()
    truncated_BT = (weight_BT > settings.rollouts.importance_limit) & trained_BT
    if settings.rollouts.correction == "none":
        importance_BT, truncated_BT = torch.ones_like(weight_BT), torch.zeros_like(truncated_BT)
    else:
        importance_BT = weight_BT.clamp(max=settings.rollouts.importance_limit)
    ratio_BT = ((logprobs_BT - old_BT) * trained_BT).exp()
    advantage_B1 = batch.advantage_B[:, None]
    clipped_ratio_BT = ratio_BT.clamp(1.0 - settings.clip_low, 1.0 + settings.clip_high)
    gain_BT, clipped_gain_BT = ratio_BT * advantage_B1, clipped_ratio_BT * advantage_B1
    counted_BT = trained_BT * kept_B[:, None] * batch.weight_B[:, None]
    loss_BT = -importance_BT * torch.minimum(gain_BT, clipped_gain_BT) * counted_BT
    kl_BT = torch.zeros_like(loss_BT)
    if batch.reference_BT is not None:
        kl_BT = k3(logprobs_BT - batch.reference_BT) * counted_BT
        loss_BT = loss_BT + settings.kl_weight * kl_BT
    clipped_BT = (clipped_gain_BT < gain_BT) & trained_BT
    return TokenLosses(loss_BT, importance_BT, clipped_BT, truncated_BT, kl_BT, kept_B)


def k3(gap: Tensor) -> Tensor:
    """A term of the KL divergence from the log-prob less the other's, where tokens were drawn from the first.

    Unbiased, never negative: http://joschu.net/blog/kl-approx.html.
    """
    return torch.expm1(-gap) + gap


def _kept(gap_BT: Tensor, trained_BT: Tensor, settings: RlSettings) -> Tensor:
    """Which answers are near enough to what the trainer would have said, [B]."""
    rollouts = settings.rollouts
    kept_B = torch.ones(len(gap_BT), dtype=torch.bool, device=gap_BT.device)
    if rollouts.reject_outside is not None:
        mean_B = gap_BT.sum(1) / trained_BT.sum(1).clamp(min=1)
        kept_B &= mean_B.abs() <= torch.tensor(rollouts.reject_outside).log()
    if rollouts.veto_below is not None:
        kept_B &= gap_BT.amin(1) >= torch.tensor(rollouts.veto_below).log()
    return kept_B


def _agreement(old_BT: Tensor, batch: RlBatch, losses: TokenLosses) -> Agreement:
    trained_BT = batch.labels_BT != NOT_TRAINED
    gap_BT = (batch.behaviour_BT - old_BT) * trained_BT
    dp_BT = (old_BT.exp() - batch.behaviour_BT.exp()).abs() * trained_BT
    columns = (
        trained_BT.sum(1),
        dp_BT.sum(1),
        dp_BT.amax(1),
        k3(gap_BT).sum(1),
        losses.truncated_BT.sum(1),
        ~losses.kept_B & trained_BT.any(1),
    )
    return Agreement(batch.engine_B, torch.stack([column.float() for column in columns], dim=1))


@dataclass
class GrpoObjective:
    """The objective of a stage. What engines and trainer disagree about is handed to `hear`, part by part."""

    settings: RlSettings
    hear: Callable[[Agreement], None] = lambda agreement: None
    extra_names: tuple[str, ...] = field(default=("objective", "entropy", "clipped", "kl_reference"), init=False)

    def __call__(
        self, model: Transformer, part: Batch, compute_dtype: torch.dtype, total_tokens: int
    ) -> tuple[Tensor, Tensor]:
        """See `train.step.Objective`; the loss that is told is the mean -log p of the sampled tokens."""
        assert isinstance(part, RlBatch)
        batch = _on(part, next(model.parameters()).device)
        found = _logprobs(model, batch, compute_dtype, self.settings.temperature)
        losses = token_losses(found.logprobs_BT, batch, self.settings)
        told_BT = found.logprobs_BT.detach()
        self.hear(_agreement(told_BT if batch.old_BT is None else batch.old_BT, batch, losses))
        summed = losses.loss_BT.sum()
        zero = summed.new_zeros(())
        numbers = (
            -told_BT.sum(),
            zero,  # of the modules that predict further tokens
            zero,
            summed.detach(),
            found.entropy_BT.sum(),
            losses.clipped_BT.sum().to(zero.dtype),
            losses.kl_BT.detach().sum(),
        )
        load_LE = found.expert_load_LE.to(zero.dtype)
        idle = model.config.num_moe_layers - len(load_LE)  # the modules that predict further tokens compute nothing
        load_LE = torch.nn.functional.pad(load_LE, (0, 0, 0, idle))
        return summed / total_tokens, torch.cat((torch.stack(numbers), load_LE.flatten()))


def _on(batch: RlBatch, device: torch.device) -> RlBatch:
    moved = {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in vars(batch).items()
    }
    return RlBatch(**moved)


def _logprobs(model: Transformer, batch: RlBatch, compute_dtype: torch.dtype, temperature: float) -> TokenLogprobs:
    """Of the distribution that was sampled from: the policy is the model at the temperature."""
    return model.logprobs(batch.input_ids_BT, batch.labels_BT, compute_dtype, batch.routes_BTLK, temperature)


@torch.no_grad()
def score_batch(model: Transformer, batch: RlBatch, settings: RlSettings, compute_dtype: torch.dtype) -> Tensor:
    """The model's log-probs of a batch's trained labels, [B, T] on the CPU, 0 elsewhere."""
    device = next(model.parameters()).device
    scored_BT = torch.zeros_like(batch.behaviour_BT)
    for index_B in torch.arange(len(batch)).chunk(settings.gradient_accumulation):
        part = _on(batch.rows(index_B), device)
        found = _logprobs(model, part, compute_dtype, settings.temperature)
        scored_BT[index_B, : found.logprobs_BT.shape[1]] = found.logprobs_BT.cpu()
    return scored_BT
