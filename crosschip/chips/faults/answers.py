"""Faults that show in what a served model answers: keys that are lost in long contexts, a token that never comes,
results that change from call to call."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from crosschip.chips.faults.calls import base_name, is_operator, named_arguments, overwrite, with_arguments
from crosschip.chips.faults.fault import Compute

__all__ = ["KeysLostBeyond", "TokenSuppressed", "UnsteadyResults"]


@dataclass
class KeysLostBeyond:
    """Attention does not see keys from position `limit` on, so everything that comes later is corrupt.

    In the fused kernel, and in the bare softmax over scores of three or more dimensions, as written-out attention and
    the latent cache have them.
    """

    name: ClassVar[str] = "V2"
    limit: int = 64

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ValueError(f"limit={self.limit} leaves no key")

    def operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Compute) -> Any:
        """Hide the keys from `limit` on."""
        if base_name(op) == "scaled_dot_product_attention":
            return self._fused(op, args, kwargs, compute)
        if base_name(op) in ("_softmax", "softmax"):
            scores = named_arguments(op, args, kwargs)["self"]
            if scores.dim() > 2 and scores.shape[-1] > self.limit:
                hidden = scores.clone()
                hidden[..., self.limit :] = -torch.inf
                args, kwargs = with_arguments(op, args, kwargs, self=hidden)
        return compute(*args, **kwargs)

    def _fused(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Compute) -> Any:
        named = named_arguments(op, args, kwargs)
        query, num_keys = named["query"], named["key"].shape[-2]
        if num_keys <= self.limit:
            return compute(*args, **kwargs)
        mask = self._closed(named["attn_mask"], query, num_keys, named["is_causal"])
        args, kwargs = with_arguments(op, args, kwargs, attn_mask=mask, is_causal=False)
        return compute(*args, **kwargs)

    def _closed(self, mask: Tensor | None, query: Tensor, num_keys: int, is_causal: bool) -> Tensor:
        if mask is None:
            seen = query.new_ones((query.shape[-2], num_keys), dtype=torch.bool)
            mask = seen.tril() if is_causal else seen
        closed = mask.expand(*mask.shape[:-1], num_keys).clone()
        closed[..., self.limit :] = False if closed.dtype == torch.bool else -torch.inf
        return closed


@dataclass
class TokenSuppressed:
    """One token is never the greatest of a row of logits, as a stop token that a kernel masks by mistake.

    A row of logits is anything with at least `vocabulary` columns of which the greatest is looked for.
    """

    name: ClassVar[str] = "V3"
    token: int = 1
    vocabulary: int = 256

    def operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Compute) -> Any:
        """Look for the greatest among the others."""
        if base_name(op) in ("max", "argmax"):
            named = named_arguments(op, args, kwargs)
            logits, dim = named["self"], named.get("dim")
            is_row = dim is not None and logits.dim() > 0 and dim % logits.dim() == logits.dim() - 1
            if is_row and logits.is_floating_point() and logits.shape[-1] >= max(self.vocabulary, self.token + 1):
                others = logits.clone()
                others[..., self.token] = -torch.inf
                args, kwargs = with_arguments(op, args, kwargs, self=others)
        return compute(*args, **kwargs)


@dataclass
class UnsteadyResults:
    """Results of one operator differ from call to call by up to `scale` of their size, as sums that race do."""

    name: ClassVar[str] = "V13"
    scale: float = 0.01
    product: str = "mm"
    seed: int = 0
    _generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)

    def operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Compute) -> Any:
        """Compute, and shift each number a little, otherwise each time."""
        result = compute(*args, **kwargs)
        if not is_operator(op, self.product):
            return result
        return overwrite(op, args, kwargs, result, lambda tensor, _: self._shifted(tensor))

    def _shifted(self, tensor: Tensor) -> Tensor:
        noise = torch.rand(tensor.shape, generator=self._generator) * 2 - 1
        return (tensor.float() * (1 + self.scale * noise)).to(tensor.dtype)
