"""Low-rank adapters (LoRA, arXiv 2106.09685) on attention and experts: optimizer states of a few per cent.

The model always holds the merged weights, W + scale * B A, so whatever reads it - checkpoints, engines, the handoff -
knows nothing of adapters. The gradient of W is made one matrix at a time, carried over to A and B, and let go of; after
each update the change of B A is added to W.

O rows and I columns of a matrix (an expert's come stacked), R the rank.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from crosschip.errors import RecipeError

if TYPE_CHECKING:
    from crosschip.model import Transformer

__all__ = ["Adapters", "attach_adapters"]

_ADAPTED = (".self_attn.", ".mlp.experts.", ".mlp.shared_experts.", ".mlp.gate_up_proj", ".mlp.down_proj")


class Adapters(nn.Module):
    """The matrices A and B of a model, and what keeps its weights merged. It is the model's `adapters`."""

    def __init__(self, model: Transformer, rank: int, alpha: float, seed: int) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        self._merged: dict[str, tuple[Tensor, Tensor]] = {}
        self._weights: dict[str, nn.Parameter] = {}
        for name, weight in model.named_parameters():
            weight.requires_grad_(False)
            if weight.dim() < 2 or not any(part in f".{name}" for part in _ADAPTED) or name.startswith("mtp."):
                continue
            key = name.replace(".", "-")  # a dictionary of parameters takes no dots
            *stacked, rows, columns = weight.shape
            self.down[key] = nn.Parameter(_drawn((*stacked, rank, columns), seed, name).to(weight.device))
            self.up[key] = nn.Parameter(weight.new_zeros((*stacked, rows, rank)))
            self._weights[key] = weight
            weight.requires_grad_(True)
            weight.register_post_accumulate_grad_hook(self._hook(key))
        self.remember()

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters())

    def _hook(self, key: str) -> Callable[[Tensor], None]:
        def carry_over(weight: Tensor) -> None:
            gradient, down_RI, up_OR = weight.grad, self.down[key], self.up[key]
            assert gradient is not None
            weight.grad = None
            _add_gradient(down_RI, up_OR.detach().mT @ gradient, self.scale)
            _add_gradient(up_OR, gradient @ down_RI.detach().mT, self.scale)

        return carry_over

    @torch.no_grad()
    def merge(self) -> None:
        """Bring the weights up to date with A and B."""
        for key, weight in self._weights.items():
            down_RI, up_OR = self._merged[key]
            change = self.up[key] @ self.down[key] - up_OR @ down_RI
            weight.add_(change, alpha=self.scale)
        self.remember()

    @torch.no_grad()
    def remember(self) -> None:
        """The weights hold A and B as they are now."""
        self._merged = {key: (self.down[key].clone(), self.up[key].clone()) for key in self._weights}


def _add_gradient(parameter: nn.Parameter, gradient: Tensor, scale: float) -> None:
    gradient = gradient * scale
    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def _drawn(shape: tuple[int, ...], seed: int, name: str) -> Tensor:
    """Normal with the deviation 1 / sqrt(I), on the CPU from a generator of its own: the same on every chip."""
    digest = hashlib.sha256(f"{seed}:adapter:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.empty(shape).normal_(generator=generator) / math.sqrt(shape[-1])


def attach_adapters(model: Transformer, rank: int, alpha: float, seed: int, num_ranks: int) -> Adapters:
    """Give a model adapters; only they are trained from then on.

    Raises:
        RecipeError: the model is sharded over several ranks.
    """
    if num_ranks > 1:
        raise RecipeError(
            f"lora_rank={rank} with {num_ranks} ranks: adapters are for a model that one process holds",
            "leave out lora_rank, or start one process",
        )
    adapters = Adapters(model, rank, alpha, seed)
    model.adapters = adapters
    return adapters
