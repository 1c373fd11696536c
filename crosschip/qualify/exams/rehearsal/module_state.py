"""A module's weights and buffers, and its extra state, kept on the CPU and given to other modules of its kind."""

from __future__ import annotations

import copy
from typing import Any

import torch

__all__ = ["State", "copy_state", "load_state"]

State = dict[str, Any]  # by name: tensors, and whatever `get_extra_state` of its parts gives


def copy_state(module: torch.nn.Module) -> State:
    """A copy on the CPU that the module's next step does not change."""
    return {
        name: value.detach().cpu().clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)
        for name, value in module.state_dict().items()
    }


def load_state(module: torch.nn.Module, state: State) -> None:
    """Give the module a state, which may be given again: an extra state becomes the module's own, so it gets a copy."""
    module.load_state_dict(
        {name: value if isinstance(value, torch.Tensor) else copy.deepcopy(value) for name, value in state.items()}
    )
