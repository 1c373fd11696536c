"""One optimizer step: forward and backward over the parts of a batch, clipping, the update, the routers' bias.

Tensor names carry their shape: B sequences, T tokens, L mixture-of-experts layers, E experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from crosschip.data import NOT_TRAINED
from crosschip.errors import EXIT_FAIL, CrosschipError, DataError
from crosschip.recipe import StageSettings

if TYPE_CHECKING:
    from crosschip.data import Batch
    from crosschip.model import Transformer

__all__ = ["NonFiniteError", "StepResult", "train_step"]


class NonFiniteError(CrosschipError):
    """A loss or a gradient that is not a finite number; no weight was changed by the step."""

    exit_code = EXIT_FAIL


@dataclass(frozen=True)
class StepResult:
    """What a step measured. Losses are means per trained token, in nats.

    `gradient_norm` is the norm before clipping. `router_imbalance` is the load of the fullest expert over the mean
    load, averaged over layers: 1 is even. `num_positions` counts the tokens computed, padding included.
    """

    loss: float
    mtp_loss: float | None
    gradient_norm: float
    num_trained_tokens: int
    num_positions: int
    router_imbalance: float | None


@dataclass
class _Sums:
    """Sums over the parts of a batch, left on the device."""

    loss: torch.Tensor
    mtp_loss: torch.Tensor
    mtp_num_tokens: torch.Tensor
    expert_load_LE: torch.Tensor | None


def train_step(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    stage: StageSettings,
    compute_dtype: torch.dtype,
    step: int,
    learning_rate: float,
) -> StepResult:
    """Update the weights once with `batch`, computed in `stage.gradient_accumulation` parts.

    The gradient is that of the mean over all trained tokens of the batch, however they fall into parts. The device is
    waited for once, to look at loss and gradient norm before the update.

    Raises:
        NonFiniteError: loss or gradient is not finite; weights and optimizer are as before.
        DataError: no token of the batch is trained.
    """
    total_tokens = int((batch.labels_BT != NOT_TRAINED).sum())
    if total_tokens == 0:
        raise DataError(
            f"step {step}: none of the {batch.labels_BT.numel()} tokens of the batch is trained",
            "look for examples whose prompt alone fills seq_len; raise seq_len or the batch size",
        )
    optimizer.zero_grad(set_to_none=True)
    sums = _accumulate_gradients(model, batch, stage, compute_dtype, total_tokens)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), stage.gradient_clip)
    result = _read_result(sums, norm, total_tokens, batch.input_ids_BT.numel())
    _refuse_non_finite(result, step, learning_rate)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    if sums.expert_load_LE is not None and stage.router_bias_update_rate > 0:
        model.update_router_bias(sums.expert_load_LE, stage.router_bias_update_rate)
    return result


def _accumulate_gradients(
    model: Transformer, batch: Batch, stage: StageSettings, compute_dtype: torch.dtype, total_tokens: int
) -> _Sums:
    device = next(model.parameters()).device
    zero = torch.zeros((), device=device)
    sums = _Sums(zero.clone(), zero.clone(), zero.clone(), None)
    # The mean over prediction depths, each divided by the sequence's own length: DeepSeek-V3 paper, equations 24-25.
    mtp_weight = stage.mtp_loss_weight / max(1, model.config.num_nextn_predict_layers)
    parts = zip(
        batch.input_ids_BT.chunk(stage.gradient_accumulation),
        batch.labels_BT.chunk(stage.gradient_accumulation),
        strict=True,
    )
    for input_ids_BT, labels_BT in parts:
        found = model.loss(
            input_ids_BT.to(device, non_blocking=True), labels_BT.to(device, non_blocking=True), compute_dtype
        )
        ((found.loss_sum + mtp_weight * found.mtp_loss_sum) / total_tokens).backward()
        sums.loss += found.loss_sum.detach()
        sums.mtp_loss += found.mtp_loss_sum.detach()
        sums.mtp_num_tokens += found.mtp_num_tokens
        if found.expert_load_LE.numel():
            load_LE = found.expert_load_LE
            sums.expert_load_LE = load_LE if sums.expert_load_LE is None else sums.expert_load_LE + load_LE
    return sums


def _read_result(sums: _Sums, norm: torch.Tensor, total_tokens: int, num_positions: int) -> StepResult:
    """Bring the step's numbers to the host in one transfer."""
    numbers = [sums.loss, sums.mtp_loss, sums.mtp_num_tokens, norm]
    if sums.expert_load_LE is not None:
        load_LE = sums.expert_load_LE.float()
        numbers.append((load_LE.amax(dim=-1) / load_LE.mean(dim=-1)).mean())
    loss, mtp_loss, mtp_num_tokens, gradient_norm, *imbalance = torch.stack([n.float() for n in numbers]).tolist()
    return StepResult(
        loss=loss / total_tokens,
        mtp_loss=mtp_loss / mtp_num_tokens if mtp_num_tokens else None,
        gradient_norm=gradient_norm,
        num_trained_tokens=total_tokens,
        num_positions=num_positions,
        router_imbalance=imbalance[0] if imbalance else None,
    )


def _refuse_non_finite(result: StepResult, step: int, learning_rate: float) -> None:
    if math.isfinite(result.loss) and math.isfinite(result.gradient_norm) and math.isfinite(result.mtp_loss or 0.0):
        return
    raise NonFiniteError(
        f"step {step}: loss {result.loss}, gradient norm {result.gradient_norm} at learning rate {learning_rate:.3g}; "
        "the weights were not changed",
        "resume from the last checkpoint with a lower learning_rate or gradient_clip; if it comes back at the same "
        "step look at the data there, if it does not come back suspect the chip",
    )
