"""One optimizer step: forward and backward over the parts of a batch, clipping, the update, the routers' bias.

Tensor names carry their shape: B sequences, T tokens, L mixture-of-experts layers, E experts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

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
    "NonFiniteError",
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
    false where the step was judged not to touch the weights. With several ranks all of it is about all of them.
    """

    loss: float
    mtp_loss: float | None
    gradient_norm: float
    num_trained_tokens: int
    num_positions: int
    router_imbalance: float | None
    updated: bool = True


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
    tokens, then the tokens that each expert of each layer got, [3 + L * E].
    """

    num_trained_tokens: int
    num_positions: int
    numbers: torch.Tensor


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
) -> StepResult:
    """Update the weights once with `batch`, this rank's share, computed in `stage.gradient_accumulation` parts.

    The gradient is that of the mean over all trained tokens of all ranks, however they fall on ranks and into parts.
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
    numbers = world.sum(_accumulate_gradients(model, batch, stage, compute_dtype, total_tokens))
    sums = hooks.after_backward(model, StepSums(total_tokens, num_positions, numbers))
    gradients = [local_part(p.grad) for p in model.parameters() if p.grad is not None]
    norm = world.norm(torch.nn.utils.get_total_norm(gradients))
    load_LE = sums.numbers[3:].view(-1, model.config.n_routed_experts)
    result = _read_result(sums, norm, load_LE)
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
    model: Transformer, batch: Batch, stage: StageSettings, compute_dtype: torch.dtype, total_tokens: int
) -> torch.Tensor:
    """Forward and backward over the parts; the sums as `StepSums.numbers` has them, left on the device."""
    device = next(model.parameters()).device
    # The mean over prediction depths, each divided by the sequence's own length: DeepSeek-V3 paper, equations 24-25.
    mtp_weight = stage.mtp_loss_weight / max(1, model.config.num_nextn_predict_layers)
    parts = zip(
        batch.input_ids_BT.chunk(stage.gradient_accumulation),
        batch.labels_BT.chunk(stage.gradient_accumulation),
        strict=True,
    )
    sums: torch.Tensor | None = None
    for input_ids_BT, labels_BT in parts:
        found = model.loss(
            input_ids_BT.to(device, non_blocking=True), labels_BT.to(device, non_blocking=True), compute_dtype
        )
        ((found.loss_sum + mtp_weight * found.mtp_loss_sum) / total_tokens).backward()
        loss_sum, mtp_loss_sum = found.loss_sum.detach(), found.mtp_loss_sum.detach()
        losses = torch.stack((loss_sum, mtp_loss_sum, found.mtp_num_tokens.to(loss_sum.dtype)))
        numbers = torch.cat((losses, found.expert_load_LE.flatten().to(losses.dtype)))
        sums = numbers if sums is None else sums + numbers
    assert sums is not None
    return sums


def _read_result(sums: StepSums, norm: torch.Tensor, load_LE: torch.Tensor) -> StepResult:
    """Bring the step's numbers to the host in one transfer."""
    numbers = [*sums.numbers[:3].unbind(), norm.to(sums.numbers.dtype)]
    if len(load_LE):
        numbers.append((load_LE.amax(dim=-1) / load_LE.mean(dim=-1)).mean())
    loss, mtp_loss, mtp_num_tokens, gradient_norm, *imbalance = torch.stack(numbers).tolist()
    return StepResult(
        loss=loss / sums.num_trained_tokens,
        mtp_loss=mtp_loss / mtp_num_tokens if mtp_num_tokens else None,
        gradient_norm=gradient_norm,
        num_trained_tokens=sums.num_trained_tokens,
        num_positions=sums.num_positions,
        router_imbalance=imbalance[0] if imbalance else None,
    )
