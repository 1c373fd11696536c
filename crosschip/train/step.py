"""One optimizer step: forward and backward over the parts of a batch, clipping, the update, the routers' bias.

Tensor names carry their shape: B sequences, T tokens, L mixture-of-experts layers, E experts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

import torch

from crosschip.data import NOT_TRAINED
from crosschip.errors import EXIT_FAIL, CrosschipError, DataError
from crosschip.recipe import StageSettings
from crosschip.train.group.sharding import local_part
from crosschip.train.group.world import ALONE, World

if TYPE_CHECKING:
    from crosschip.data import Batch
    from crosschip.model import Transformer

__all__ = [
    "NO_HOOKS",
    "Judgement",
    "NextToken",
    "NonFiniteError",
    "Objective",
    "StepHooks",
    "StepResult",
    "StepSums",
    "refuse_non_finite",
    "train_step",
]

Judgement = Literal["update", "skip"]


class NonFiniteError(CrosschipError):
    """A loss or a gradient that is not a finite number; no weight was changed by the step."""

    exit_code = EXIT_FAIL


@dataclass(frozen=True)
class StepResult:
    """What a step measured. Losses are means per trained token, in nats.

    `gradient_norm` is the norm before clipping. `router_imbalance` is the load of the fullest expert over the mean
    load, averaged over layers: 1 is even. `num_positions` counts the tokens computed, padding included. `updated` is
    false where the step was judged not to touch the weights. `extra` is what the objective tells besides, as means per
    trained token. With several ranks all of it is about all of them.
    """

    loss: float
    mtp_loss: float | None
    gradient_norm: float
    num_trained_tokens: int
    num_positions: int
    router_imbalance: float | None
    updated: bool = True
    extra: dict[str, float] = field(default_factory=dict)


def refuse_non_finite(step: int, result: StepResult) -> Judgement:
    """Let a step update the weights if its loss and gradient are finite.

    Raises:
        NonFiniteError: they are not.
    """
    if math.isfinite(result.loss) and math.isfinite(result.gradient_norm) and math.isfinite(result.mtp_loss or 0.0):
        return "update"
    raise NonFiniteError(
        f"step {step}: loss {result.loss}, gradient norm {result.gradient_norm}; the weights were not changed",
        "resume from the last checkpoint with a lower learning_rate or gradient_clip; if it comes back at the same "
        "step look at the data there, if it does not come back suspect the chip",
    )


@dataclass(frozen=True)
class StepSums:
    """What a step has summed over the parts of its batch and over the ranks.

    `numbers` is on the device: losses in nats of the main model and of multi-token prediction, the latter's number of
    tokens, what the objective tells besides, X numbers, then the tokens that each expert of each layer got,
    [3 + X + L * E].
    """

    num_trained_tokens: int
    num_positions: int
    numbers: torch.Tensor


class Objective(Protocol):
    """What a step minimises."""

    @property
    def extra_names(self) -> tuple[str, ...]:
        """What it tells besides the losses."""

    def __call__(
        self, model: Transformer, part: Batch, compute_dtype: torch.dtype, total_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is minimised of a part of the batch, a scalar, and the part's share of `StepSums.numbers`.

        `total_tokens` are the trained ones of the whole batch, over which the step takes the mean.
        """


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy of the next token, and of those after it with `mtp_weight` where the model predicts several."""

    mtp_weight: float
    extra_names: tuple[str, ...] = ()

    def __call__(
        self, model: Transformer, part: Batch, compute_dtype: torch.dtype, total_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Objective`."""
        device = next(model.parameters()).device
        found = model.loss(
            part.input_ids_BT.to(device, non_blocking=True), part.labels_BT.to(device, non_blocking=True), compute_dtype
        )
        # The mean over prediction depths, each divided by the sequence's own length: DeepSeek-V3 paper, (24) and (25).
        mtp_weight = self.mtp_weight / max(1, model.config.num_nextn_predict_layers)
        minimised = (found.loss_sum + mtp_weight * found.mtp_loss_sum) / total_tokens
        loss_sum, mtp_loss_sum = found.loss_sum.detach(), found.mtp_loss_sum.detach()
        losses = torch.stack((loss_sum, mtp_loss_sum, found.mtp_num_tokens.to(loss_sum.dtype)))
        return minimised, torch.cat((losses, found.expert_load_LE.flatten().to(losses.dtype)))


def _nothing(model: Transformer, sums: StepSums) -> StepSums:
    """Leave the gradients alone."""
    return sums


@dataclass(frozen=True)
class StepHooks:
    """What acts within a step: `after_backward(model, sums)` may average gradients and sums with other groups', each
    the mean over the step's trained tokens by then; `judge(step, result)` says whether the weights are updated, or
    raises; it must say the same on every rank.
    """

    after_backward: Callable[[Transformer, StepSums], StepSums] = _nothing
    judge: Callable[[int, StepResult], Judgement] = refuse_non_finite


NO_HOOKS = StepHooks()


def train_step(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    stage: StageSettings,
    compute_dtype: torch.dtype,
    step: int,
    learning_rate: float,
    world: World = ALONE,
    hooks: StepHooks = NO_HOOKS,
    objective: Objective | None = None,
) -> StepResult:
    """Update the weights once with `batch`, this rank's share, computed in `stage.gradient_accumulation` parts.

    The gradient is that of the mean over all trained tokens of all ranks, however they fall on ranks and into parts.
    `objective` None is the cross-entropy of the next tokens.
    The device is waited for once, to look at loss and gradient norm before the update.

    Raises:
        NonFiniteError: loss or gradient is not finite; weights and optimizer are as before.
        DataError: no token of the batch is trained.
    """
    trained = int((batch.labels_BT != NOT_TRAINED).sum())
    total_tokens, num_positions = world.totals([trained, batch.labels_BT.numel()])
    if total_tokens == 0:
        raise DataError(
            f"step {step}: none of the {num_positions} tokens of the batch is trained",
            "look for examples whose prompt alone fills seq_len; raise seq_len or the batch size",
        )
    optimizer.zero_grad(set_to_none=True)
    objective = objective or NextToken(stage.mtp_loss_weight)
    parts = batch.parts(stage.gradient_accumulation)
    numbers = world.sum(_accumulate_gradients(model, parts, objective, compute_dtype, total_tokens))
    sums = hooks.after_backward(model, StepSums(total_tokens, num_positions, numbers))
    gradients = [local_part(p.grad) for p in model.parameters() if p.grad is not None]
    norm = world.norm(torch.nn.utils.get_total_norm(gradients))
    load_LE = sums.numbers[3 + len(objective.extra_names) :].view(-1, model.config.n_routed_experts)
    result = _read_result(sums, norm, load_LE, objective.extra_names)
    if hooks.judge(step, result) == "skip":
        return dataclasses.replace(result, updated=False)
    _clip(gradients, stage.gradient_clip, norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    if len(load_LE) and stage.router_bias_update_rate > 0:
        model.update_router_bias(load_LE, stage.router_bias_update_rate)
    return result


def _clip(gradients: list[torch.Tensor], most: float, norm: torch.Tensor) -> None:
    """Scale the gradients down to a norm of at most `most`, without waiting for the device."""
    torch._foreach_mul_(gradients, (most / (norm + 1e-6)).clamp(max=1.0))


def _accumulate_gradients(
    model: Transformer, parts: list[Batch], objective: Objective, compute_dtype: torch.dtype, total_tokens: int
) -> torch.Tensor:
    """Forward and backward over the parts; the sums as `StepSums.numbers` has them, left on the device."""
    sums: torch.Tensor | None = None
    for part in parts:
        minimised, numbers = objective(model, part, compute_dtype, total_tokens)
        minimised.backward()
        sums = numbers if sums is None else sums + numbers
    assert sums is not None
    return sums


def _read_result(sums: StepSums, norm: torch.Tensor, load_LE: torch.Tensor, extra_names: tuple[str, ...]) -> StepResult:
    """Bring the step's numbers to the host in one transfer."""
    num_told = 3 + len(extra_names)
    numbers = [*sums.numbers[:num_told].unbind(), norm.to(sums.numbers.dtype)]
    if len(load_LE):
        mean_L = load_LE.mean(dim=-1)  # 0 in layers that were not computed
        numbers.append((load_LE.amax(dim=-1) / mean_L).masked_fill(mean_L == 0, 0.0).sum() / (mean_L != 0).sum())
    read = torch.stack(numbers).tolist()
    (loss, mtp_loss, mtp_num_tokens), extra = read[:3], read[3:num_told]
    gradient_norm, *imbalance = read[num_told:]
    return StepResult(
        loss=loss / sums.num_trained_tokens,
        mtp_loss=mtp_loss / mtp_num_tokens if mtp_num_tokens else None,
        gradient_norm=gradient_norm,
        num_trained_tokens=sums.num_trained_tokens,
        num_positions=sums.num_positions,
        router_imbalance=imbalance[0] if imbalance else None,
        extra={name: number / sums.num_trained_tokens for name, number in zip(extra_names, extra, strict=True)},
    )
