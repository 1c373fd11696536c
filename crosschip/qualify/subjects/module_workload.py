"""The steps of any module on given inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

from crosschip.errors import QualifyError
from crosschip.qualify.subjects.generic_step import (
    GenericTrainer,
    float_tensors,
    narrow_states_note,
    placed,
    switch_dropout_off,
)
from crosschip.qualify.subjects.nested_values import Leaf, mapped, parts_of, tensors_inside
from crosschip.qualify.subjects.subject import StepMeasure

__all__ = ["Inputs", "ModuleWorkload"]

Inputs = tuple[Any, ...] | dict[str, Any]

_SMALL_ROWS = 4


class ModuleWorkload:
    """A module and the inputs of its forward, on one device. Each step has the same inputs."""

    def __init__(
        self,
        module: torch.nn.Module,
        inputs: Inputs,
        device: torch.device,
        dtype: torch.dtype,
        origin: str,
        small: bool = False,
    ) -> None:
        self.phase = "prefill"
        self.notes = narrow_states_note(dtype) + switch_dropout_off(module)
        self.module = placed(module, device, dtype)
        self._origin, self._device = origin, device
        self._rows = _num_rows(inputs)
        self._inputs: Inputs = mapped(inputs, lambda leaf: _moved(leaf, device, dtype))
        if small and self._rows > _SMALL_ROWS:
            self._inputs = self._taken(list(range(_SMALL_ROWS)))
            self._rows = _SMALL_ROWS
        self._place_of_rows: int | None = None  # among the results; not looked for yet
        self._trainer = GenericTrainer(self.module, origin)

    def train_step(self, index: int) -> StepMeasure:
        """Forward and backward in training mode, clipping, AdamW."""
        self.module.train()
        for tensor in tensors_inside(self._inputs):
            tensor.grad = None
        return self._trainer.step(lambda: self._forward(self._inputs))

    def serve_step(self) -> torch.Tensor:
        """The output of forward in evaluation mode: its floating-point tensors as rows, those of one width together."""
        outputs = self._evaluate(self._inputs)
        width = outputs[-1].shape[-1] if outputs[-1].dim() else 1
        wide = [output.reshape(-1, width) for output in outputs if (output.shape[-1] if output.dim() else 1) == width]
        return torch.cat([output.cpu().float() for output in wide])

    def serve_rows(self, rows: list[int]) -> torch.Tensor:
        """What these rows of the inputs give, as one batch; [rows, width], at the last place of each row.

        Where the output has no rows (a loss), it is the last inner result that has.

        Raises:
            QualifyError: the inputs or what is computed from them have no rows.
        """
        if self._place_of_rows is None:
            self._place_of_rows = self._found_place_of_rows()
        found = self._last_results(rows)[self._place_of_rows]
        return found.reshape(len(rows), -1, found.shape[-1])[:, -1].cpu().float()

    def _found_place_of_rows(self) -> int:
        """Which of the results has as many rows as the inputs; one look could take a state's layers for them."""
        with torch.random.fork_rng(devices=[]):  # what a step draws does not depend on this one look
            two, three = self._last_results([0, 1]), self._last_results([0, 1, 2])
        for place, (one, other) in enumerate(zip(two, three, strict=False)):
            if self._rows and one.dim() >= 2 and (one.shape[0], other.shape[0]) == (2, 3):
                return place
        raise QualifyError(
            f"nothing that {self._origin} computes has one row for each row of its inputs",
            "let all input tensors begin with the batch dimension",
        )

    def _last_results(self, rows: list[int]) -> list[torch.Tensor]:
        """What these rows of the inputs give and all inner results, the last first."""
        inner: list[torch.Tensor] = []
        hooks = [
            module.register_forward_hook(lambda _module, _args, output: inner.extend(float_tensors(output)))
            for module in self.module.modules()
        ]
        try:
            outputs = self._evaluate(self._taken([row % max(1, self._rows) for row in rows]))
        finally:
            for hook in hooks:
                hook.remove()
        return [*reversed(outputs), *reversed(inner)]

    def _forward(self, inputs: Inputs) -> Any:
        return self.module(**inputs) if isinstance(inputs, dict) else self.module(*inputs)

    @torch.inference_mode()
    def _evaluate(self, inputs: Inputs) -> list[torch.Tensor]:
        self.module.eval()
        outputs = list(float_tensors(self._forward(inputs)))
        if not outputs:
            raise QualifyError(
                f"the module of {self._origin} gives no floating-point tensor", "let its forward return one"
            )
        return outputs

    def _taken(self, rows: list[int]) -> Inputs:
        """The inputs with only these rows of the tensors that begin with the batch dimension."""
        if not self._rows:
            return self._inputs
        index = torch.tensor(rows, device=self._device)

        def take(tensor: torch.Tensor) -> torch.Tensor:
            has_rows = tensor.dim() > 0 and tensor.shape[0] == self._rows
            return _leaf(tensor.index_select(0, index), tensor) if has_rows else tensor

        taken: Inputs = mapped(self._inputs, take)
        return taken


def _moved(leaf: Leaf, device: torch.device, dtype: torch.dtype) -> Leaf:
    if isinstance(leaf, PackedSequence):  # its batch sizes are read on the CPU, whatever the device
        there = leaf.to(device)  # type: ignore[arg-type]  # typed by the first of the signatures that it shares
        return there._replace(data=_moved_tensor(leaf.data, device, dtype))
    return _moved_tensor(leaf, device, dtype)


def _moved_tensor(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    moved = tensor.detach().to(device)
    return _leaf(moved.to(dtype) if moved.is_floating_point() else moved, tensor)


def _leaf(made: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """The tensor as an input of its own, with a gradient where the one that it was made from has one."""
    return made.detach().requires_grad_(given.requires_grad)


def _num_rows(inputs: Inputs) -> int:
    """The batch size: the first dimension of the first tensor that has one.

    0 where none has, or where sequences are packed: they lie one in the other.
    """
    if any(isinstance(part, PackedSequence) for part in parts_of(inputs)):
        return 0
    return next((int(tensor.shape[0]) for tensor in tensors_inside(inputs) if tensor.dim() > 0), 0)
