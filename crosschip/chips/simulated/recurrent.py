"""Recurrent cells: torch expects one fused kernel of every accelerator, and the CPU, which computes here, has none."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["register_recurrent"]


def _lstm_cell(
    input_gates: Tensor,
    hidden_gates: Tensor,
    cx: Tensor,
    input_bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    gates = _with_biases(input_gates, input_bias) + _with_biases(hidden_gates, hidden_bias)
    into, forget, cell, out = gates.chunk(4, 1)
    cy = forget.sigmoid() * cx + into.sigmoid() * cell.tanh()
    return out.sigmoid() * cy.tanh(), cy, gates


def _gru_cell(
    input_gates: Tensor,
    hidden_gates: Tensor,
    hx: Tensor,
    input_bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    input_gates = _with_biases(input_gates, input_bias)
    input_reset, input_update, input_new = input_gates.chunk(3, 1)
    hidden_reset, hidden_update, hidden_new = _with_biases(hidden_gates, hidden_bias).chunk(3, 1)
    reset = (hidden_reset + input_reset).sigmoid()
    update = (hidden_update + input_update).sigmoid()
    new = (input_new + hidden_new * reset).tanh()
    return (hx - new) * update + new, input_gates


def _with_biases(gates: Tensor, bias: Tensor | None) -> Tensor:
    return gates if bias is None else gates + bias


def register_recurrent(libraries: list[torch.library.Library]) -> None:
    """Compose the cells of operators, below autograd and above it; the registrations live as long as `libraries`."""
    kernels = torch.library.Library("aten", "IMPL")
    for key in ("PrivateUse1", "AutogradPrivateUse1"):
        kernels.impl("_thnn_fused_lstm_cell", _lstm_cell, key)
        kernels.impl("_thnn_fused_gru_cell", _gru_cell, key)
    libraries.append(kernels)
