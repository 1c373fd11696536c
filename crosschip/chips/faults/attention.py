"""Faults of attention kernels: masks that are not honoured, weights that are not there, head sizes that are refused.

They act on the kernel `scaled_dot_product_attention`, forward and backward. Attention that a program writes as two
products and a softmax is not touched, as it is not on a chip whose fused kernel is at fault.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from crosschip.chips.faults.calls import base_name, named_arguments, with_arguments
from crosschip.chips.faults.fault import Compute
from crosschip.chips.faults.products import ATTENTION

__all__ = ["MaskDropped", "MaskIgnoredBeyond", "UnequalHeadSizesRejected", "UniformWeights"]


@dataclass
class MaskIgnoredBeyond:
    """Keys from position `limit` on are seen by every query, whatever the mask says.

    The kernel of the report has its limit at 512. The default is low enough for the sequences of a small recipe.
    """

    name: ClassVar[str] = "N1"
    limit: int = 64

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise ValueError(f"limit={self.limit} is not a position")

    def operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Compute) -> Any:
        """Hand the kernel a mask that hides nothing from `limit` on."""
        if base_name(op) not in ATTENTION:
            return compute(*args, **kwargs)
        named = named_arguments(op, args, kwargs)
        num_queries, num_keys = named["query"].shape[-2], named["key"].shape[-2]
        if num_keys <= self.limit or (named["attn_mask"] is None and not named["is_causal"]):
            return compute(*args, **kwargs)
        mask = self._open(named["attn_mask"], named["query"], num_queries, num_keys)
        new_args, new_kwargs = with_arguments(op, args, kwargs, attn_mask=mask, is_causal=False)
        found = compute(*new_args, **new_kwargs)
        given = named["attn_mask"]
        if base_name(op) == "attention_backward" and given is not None and len(found) > 3:
            found[3] = found[3].sum_to_size(given.shape)
        return found

    def _open(self, mask: Tensor | None, query: Tensor, num_queries: int, num_keys: int) -> Tensor:
        if mask is None:
            seen = query.new_ones((num_queries, num_keys), dtype=torch.bool).tril()
        else:
            seen = mask.expand(*mask.shape[:-1], num_keys).clone()
        seen[..., self.limit :] = True if seen.dtype == torch.bool else 0.0
        return seen


@dataclass
class MaskDropped:
    """Masks are dropped. `which` is `all`, `causal` (only the built-in causal one) or `given` (only mask tensors)."""

    name: ClassVar[str] = "N4"
    which: Literal["all", "causal", "given"] = "all"

    def operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Compute) -> Any:
        """Call the kernel without the mask."""
        if base_name(op) not in ATTENTION:
            return compute(*args, **kwargs)
        named = named_arguments(op, args, kwargs)
        mask, is_causal = named["attn_mask"], named["is_causal"]
        kept = mask if self.which == "causal" else None
        still_causal = is_causal and self.which == "given"
        if kept is mask and still_causal == is_causal:
            return compute(*args, **kwargs)
        new_args, new_kwargs = with_arguments(op, args, kwargs, attn_mask=kept, is_causal=still_causal)
        found = compute(*new_args, **new_kwargs)
        dropped_gradient = mask is not None and kept is None and mask.is_floating_point()
        if base_name(op) == "attention_backward" and dropped_gradient:
            found = [*found, torch.zeros_like(mask)]
        return found


@dataclass
class UniformWeights:
    """The weights are the same for every key that may be seen, so attention returns the values' average.

    `where` is `attention` (the fused kernel) or `softmax` (the bare operator, which written-out attention uses).
    """

    name: ClassVar[str] = "N2"
    where: Literal["attention", "softmax"] = "attention"

    def operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Compute) -> Any:
        """Hand the kernel scores that are all alike: queries of zeros, or scores of zeros where they are finite."""
        if self.where == "attention" and base_name(op) in ATTENTION:
            query = named_arguments(op, args, kwargs)["query"]
            new_args, new_kwargs = with_arguments(op, args, kwargs, query=torch.zeros_like(query))
            return compute(*new_args, **new_kwargs)
        if self.where == "softmax" and base_name(op) in ("_softmax", "_safe_softmax", "softmax"):
            scores = named_arguments(op, args, kwargs)["self"]
            alike = torch.where(scores.isfinite(), torch.zeros_like(scores), scores)
            new_args, new_kwargs = with_arguments(op, args, kwargs, self=alike)
            return compute(*new_args, **new_kwargs)
        return compute(*args, **kwargs)


@dataclass
class UnequalHeadSizesRejected:
    """The kernel refuses values whose heads are not as wide as those of the keys, as latent attention has them."""

    name: ClassVar[str] = "W13"

    def operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Compute) -> Any:
        """Raise for unequal head sizes."""
        if base_name(op) in ATTENTION:
            named = named_arguments(op, args, kwargs)
            of_keys, of_values = named["key"].shape[-1], named["value"].shape[-1]
            if of_keys != of_values:
                raise RuntimeError(
                    f"fused attention requires the same head size for key and value, got {of_keys} and {of_values}"
                )
        return compute(*args, **kwargs)
