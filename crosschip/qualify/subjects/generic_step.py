"""A train step for any module: its loss, backward, clipping, AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from crosschip.errors import QualifyError
from crosschip.qualify.subjects.nested_values import tensors_inside
from crosschip.qualify.subjects.subject import StepMeasure
from crosschip.qualify.tracing.inputs import as_real
from crosschip.recipe import StageSettings
from crosschip.train.optimizer import build_optimizer

__all__ = ["GenericTrainer", "float_tensors", "loss_of", "narrow_states_note", "placed", "switch_dropout_off"]

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


def placed(module: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """Move the module to the device and its floating-point tensors to the dtype.

    Complex ones stay as wide as they are: `Module.to` would make them real numbers, without their imaginary parts.
    """
    return module._apply(lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None))


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
    """A module's output as a loss: the scalar, its `loss`, else the mean square of its floating-point tensors.

    Raises:
        QualifyError: it has no gradient.
    """
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
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return loss if isinstance(loss, torch.Tensor) else None


def float_tensors(output: Any) -> Iterator[torch.Tensor]:
    """The floating-point tensors inside an output, in order; complex ones as twice as many real numbers in a row."""
    for tensor in tensors_inside(output):
        real = as_real(torch.atleast_1d(tensor)).flatten(-2) if tensor.is_complex() else tensor
        if real.is_floating_point() and real.numel():
            yield real
