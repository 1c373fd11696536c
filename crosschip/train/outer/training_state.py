"""A rank's model and optimizer for the exchange: the flat vector of its parameters, and its state for a peer to heal.

With FSDP2 a parameter is a DTensor, and what is meant is always this rank's part of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from crosschip.train.outer.errors import GroupsError

__all__ = ["FlatParameters", "Position", "TrainingState"]


class Position(Protocol):
    """How far the training is; the loop's own object."""

    step: int
    sequences: int
    tokens: int


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _spread(parameter: nn.Parameter) -> str:
    whole, own = tuple(parameter.shape), tuple(_local(parameter.detach()).shape)
    mesh = tuple(parameter.device_mesh.shape) if isinstance(parameter, DTensor) else ()
    return f"{own} of {whole} over {mesh}"


class FlatParameters:
    """The trained parameters in their order, as one flat fp32 vector on the CPU and back."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.sizes = [_local(parameter.detach()).numel() for parameter in self._parameters]
        self._starts = [sum(self.sizes[:number]) for number in range(len(self.sizes))]

    @property
    def num_elements(self) -> int:
        """Elements of this rank."""
        return sum(self.sizes)

    @property
    def spread(self) -> str:
        """How each parameter is cut among ranks. Where it differs, a flat vector of before means something else."""
        return " ".join(_spread(parameter) for parameter in self._parameters)

    def _parts(self, flat: torch.Tensor, first: int, last: int | None) -> Iterable[tuple[nn.Parameter, torch.Tensor]]:
        last = len(self.sizes) if last is None else last
        for number in range(first, last):
            start = self._starts[number]
            yield self._parameters[number], flat[start : start + self.sizes[number]]

    @torch.no_grad()
    def write(self, flat: torch.Tensor, first: int = 0, last: int | None = None) -> None:
        """Copy the parameters `first` to `last` to their places in the whole vector `flat`."""
        for parameter, part in self._parts(flat, first, last):
            part.copy_(_local(parameter).reshape(-1))

    @torch.no_grad()
    def read(self, flat: torch.Tensor, own_share: float = 0.0, first: int = 0, last: int | None = None) -> None:
        """Set the parameters from the whole vector `flat`; `own_share` of what they are now stays in them."""
        for parameter, part in self._parts(flat, first, last):
            local = _local(parameter)
            given = part.to(local.device).view(local.shape)
            if own_share == 0.0:
                local.copy_(given)
            else:
                local.copy_(torch.lerp(given, local, own_share))

    @torch.no_grad()
    def read_below(self, flat: torch.Tensor, sent: torch.Tensor, first: int = 0, last: int | None = None) -> None:
        """Set the parameters from `flat`, and what was trained since they were `sent` on top of it."""
        for (parameter, part), (_, before) in zip(
            self._parts(flat, first, last), self._parts(sent, first, last), strict=True
        ):
            local = _local(parameter)
            trained = local - before.to(local.device).view(local.shape)
            local.copy_(part.to(local.device).view(local.shape) + trained)

    @torch.no_grad()
    def write_gradients(self, flat: torch.Tensor) -> None:
        """Copy the gradients to `flat`; a parameter that no token reached has a gradient of zero."""
        for parameter, part in self._parts(flat, 0, None):
            if parameter.grad is None:
                part.zero_()
            else:
                part.copy_(_local(parameter.grad).reshape(-1))

    @torch.no_grad()
    def read_gradients(self, flat: torch.Tensor) -> None:
        """Set the gradients from `flat`."""
        for parameter, part in self._parts(flat, 0, None):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            local = _local(parameter.grad)
            local.copy_(part.to(local.device).view(local.shape))


class TrainingState:
    """Model, optimizer and position of one rank as named tensors and back: what a group that joins must have."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, position: Position) -> None:
        self._model, self._optimizer, self.position = model, optimizer, position

    def flat(self) -> FlatParameters:
        """The trained parameters as a flat vector."""
        return FlatParameters(self._model.parameters())

    def _named(self) -> list[tuple[str, torch.Tensor]]:
        """Parameters and those buffers that are saved with it (routers' biases)."""
        kept = self._model.state_dict().keys()
        buffers = [(name, buffer) for name, buffer in self._model.named_buffers() if name in kept]
        return [*self._model.named_parameters(), *buffers]

    def _floating_buffers(self) -> list[torch.Tensor]:
        parameters = dict(self._model.named_parameters())
        return [_local(each) for name, each in self._named() if name not in parameters and each.is_floating_point()]

    def buffers(self) -> list[float]:
        """The numbers in the floating-point buffers of the state, which no gradient moves."""
        return [float(number) for buffer in self._floating_buffers() for number in buffer.reshape(-1).tolist()]

    @torch.no_grad()
    def load_buffers(self, numbers: Sequence[float]) -> None:
        """Set the buffers from what `buffers` gave, or a mean of several."""
        start = 0
        for buffer in self._floating_buffers():
            part = torch.tensor(numbers[start : start + buffer.numel()], dtype=buffer.dtype)
            buffer.copy_(part.view(buffer.shape))
            start += buffer.numel()

    @property
    def num_bytes(self) -> int:
        """Enough for `tensors` after any step: AdamW's two moments beside each parameter, buffers, and rounding up."""
        parameters, buffers = list(self._model.parameters()), list(self._model.buffers())
        numel = sum(_local(each.detach()).numel() for each in [*parameters, *buffers])
        return 16 * numel + 512 * (len(parameters) + len(buffers))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything by name: `model/NAME`, and `optimizer/NAME/KEY` for parameters that have been updated."""
        found = {f"model/{name}": _local(tensor.detach()) for name, tensor in self._named()}
        for name, parameter in self._model.named_parameters():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                found[f"optimizer/{name}/{key}"] = _local(value)
        return found

    def donate(self) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        """The state for a peer, and the position."""
        position = self.position
        return self.tensors(), {"step": position.step, "sequences": position.sequences, "tokens": position.tokens}

    @torch.no_grad()
    def load(self, tensors: dict[str, torch.Tensor], position: dict[str, int]) -> None:
        """Become what a peer's `donate` gave.

        Raises:
            GroupsError: the peer's model has other tensors.
        """
        named = self._named()
        expected = {f"model/{name}" for name, _ in named}
        given = {name for name in tensors if name.startswith("model/")}
        if expected != given:
            raise GroupsError(
                f"another group's model has other tensors, such as {sorted(expected ^ given)[0]}",
                "start every group with the same recipe and the same crosschip",
            )
        for name, tensor in named:
            _local(tensor).copy_(tensors[f"model/{name}"])
        for name, parameter in self._model.named_parameters():
            self._load_optimizer(parameter, f"optimizer/{name}/", tensors)
        self.position.step = position["step"]
        self.position.sequences = position["sequences"]
        self.position.tokens = position["tokens"]

    def forget_optimizer(self) -> None:
        """Begin the optimizer's moments anew: those that a NaN went into hold it for ever."""
        self._optimizer.state.clear()

    def _load_optimizer(self, parameter: nn.Parameter, prefix: str, tensors: dict[str, torch.Tensor]) -> None:
        state = {}
        for name, tensor in tensors.items():
            if name.startswith(prefix):
                state[name.removeprefix(prefix)] = self._like(parameter, tensor)
        if state:
            self._optimizer.state[parameter] = state
        else:
            self._optimizer.state.pop(parameter, None)

    def _like(self, parameter: nn.Parameter, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a peer's optimizer tensor, on the parameter's device and distributed like it.

        AdamW keeps its count of steps on the CPU, or on the device when it is fused.
        """
        local = _local(parameter.detach())
        if tensor.shape != local.shape:
            is_fused = bool(self._optimizer.defaults.get("fused"))
            return tensor.to(local.device, copy=True) if is_fused else tensor.clone()
        copied = tensor.to(local.device, copy=True)
        if isinstance(parameter, DTensor):
            return DTensor.from_local(
                copied,
                parameter.device_mesh,
                parameter.placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
        return copied
