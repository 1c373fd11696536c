"""A train step for any module: its loss, backward, clipping, AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from crosschip.errors import QualifyError
from crosschip.qualify.subjects.subject import StepMeasure
from crosschip.recipe import StageSettings
from crosschip.train.optimizer import build_optimizer

__all__ = ["GenericTrainer", "float_tensors", "loss_of", "narrow_states_note", "switch_dropout_off"]

_STAGE = StageSettings(steps=1000, learning_rate=1e-3)


class GenericTrainer:
    """A module's optimizer, made at the first step with the settings that a recipe has by default."""

    def __init__(self, module: torch.nn.Module, origin: str) -> None:
        self._module, self._origin = module, origin
        self._optimizer: torch.optim.Optimizer | None = None

    def step(self, forward: Callable[[], Any]) -> StepMeasure:
        """One step on the loss that `forward` gives; the weights stay as they are where it is not finite.

        Raises:
            QualifyError: the module has nothing to train, or its output gives no loss.
        """
        if self._optimizer is None:
            if not any(parameter.requires_grad for parameter in self._module.parameters()):
                raise QualifyError(
                    f"the module of {self._origin} has no parameter to train", "examine it with --role serve"
                )
            self._optimizer = build_optimizer(self._module, _STAGE)
        self._optimizer.zero_grad(set_to_none=True)
        loss = loss_of(forward(), self._origin)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self._module.parameters(), _STAGE.gradient_clip)
        found = StepMeasure(float(loss.detach()), float(norm))
        if math.isfinite(found.loss) and math.isfinite(found.gradient_norm):
            self._optimizer.step()
        return found


def narrow_states_note(dtype: torch.dtype) -> list[str]:
    """What is to be said of modules that do not cast their weights: they and the optimizer are as narrow."""
    if dtype == torch.float32:
        return []
    return [f"weights and optimizer states are {str(dtype).removeprefix('torch.')}, too"]


def switch_dropout_off(module: torch.nn.Module) -> list[str]:
    """Set every share that is dropped to 0, as chips draw other random numbers; says so if there was one.

    That of a dropout layer, and what other modules keep under a name with `drop` in it.
    """
    found = False
    for each in module.modules():
        is_layer = isinstance(each, torch.nn.modules.dropout._DropoutNd)
        for name, value in list(vars(each).items()):
            if isinstance(value, float) and value > 0 and ("drop" in name or (is_layer and name == "p")):
                setattr(each, name, 0.0)
                found = True
    return ["dropout is switched off, so that two chips can be compared"] if found else []


def loss_of(output: Any, origin: str) -> torch.Tensor:
    """A module's output as a loss: the scalar, its `loss`, else the mean square of its floating-point tensors."""
    loss = _own_loss(output)
    if loss is None and (squares := [tensor.float().square().mean() for tensor in float_tensors(output)]):
        loss = torch.stack(squares).sum()
    if loss is None or not loss.requires_grad:
        raise QualifyError(
            f"the module of {origin} gives a {type(output).__name__} without a tensor that has gradients",
            "let it return a loss, something with .loss, or tensors that depend on its parameters; or use --role serve",
        )
    return loss


def _own_loss(output: Any) -> torch.Tensor | None:
    if isinstance(output, torch.Tensor) and output.dim() == 0 and output.is_floating_point():
        return output
    loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    return loss if isinstance(loss, torch.Tensor) else None


def float_tensors(output: Any) -> Iterator[torch.Tensor]:
    """The floating-point tensors inside an output, in order."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point() and output.numel():
            yield output
    elif isinstance(output, dict):
        for each in output.values():
            yield from float_tensors(each)
    elif isinstance(output, list | tuple):
        for each in output:
            yield from float_tensors(each)
    elif is_dataclass(output) and not isinstance(output, type):
        for field in fields(output):
            yield from float_tensors(getattr(output, field.name))
