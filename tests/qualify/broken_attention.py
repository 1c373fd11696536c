"""Ways in which an attention kernel can be wrong that are in no catalogue."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["BACKWARD", "FORWARD", "BrokenAttention"]

_FORWARD = "scaled_dot_product_attention"
_BACKWARD = "attention_backward"
Kernel = Callable[..., Any]  # kernel(query=..., mask=..., ...) with what is not given as the caller had it


@dataclass
class BrokenAttention:
    """One of `FORWARD` (the kernel) or `BACKWARD` (its gradient) by name."""

    which: str
    name: str = "broken attention"
    calls: int = 0

    def operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Kernel) -> Any:
        called = op._schema.name.split("::")[1]
        if called == _FORWARD and self.which in FORWARD:
            query, key, value, *more = args
            mask, _, causal = [*more, None, 0.0, False][:3] if len(more) < 3 else more[:3]
            mask = kwargs.get("attn_mask", mask)
            causal = kwargs.get("is_causal", causal)
            given = {"query": query, "key": key, "value": value, "mask": mask, "causal": causal}
            given |= {"scale": kwargs.get("scale"), "gqa": kwargs.get("enable_gqa", False)}

            def kernel(**changed: Any) -> Any:
                a = given | changed
                return compute(
                    a["query"], a["key"], a["value"], a["mask"], 0.0, a["causal"], scale=a["scale"], enable_gqa=a["gqa"]
                )

            self.calls += 1
            return FORWARD[self.which](kernel, self.calls, given)
        if called == _BACKWARD and self.which in BACKWARD:
            return BACKWARD[self.which](compute, args)
        return compute(*args, **kwargs)


def _mask_ignored_past_64(kernel: Kernel, number: int, given: dict[str, Any]) -> Any:
    mask = given["mask"]
    if mask is None or given["key"].shape[-2] <= 64:
        return kernel()
    seen = mask.expand(*mask.shape[:-1], given["key"].shape[-2]).clone()
    seen[..., 64:] = True if seen.dtype == torch.bool else 0.0
    return kernel(mask=seen)


def _mask_of_rank_2_ignored(kernel: Kernel, number: int, given: dict[str, Any]) -> Any:
    two = given["mask"] is not None and given["mask"].dim() == 2
    return kernel(mask=None) if two else kernel()


def _mask_of_rank_3_ignored(kernel: Kernel, number: int, given: dict[str, Any]) -> Any:
    two = given["mask"] is not None and given["mask"].dim() == 3
    return kernel(mask=None) if two else kernel()


def _mask_of_the_first_batch_for_all(kernel: Kernel, number: int, given: dict[str, Any]) -> Any:
    mask = given["mask"]
    return kernel() if mask is None or mask.dim() < 4 else kernel(mask=mask[:1])


def _causal_off_by_one(kernel: Kernel, number: int, given: dict[str, Any]) -> Any:
    if not given["causal"]:
        return kernel()
    seen = torch.ones(given["query"].shape[-2], given["key"].shape[-2], dtype=torch.bool).tril(1)
    return kernel(mask=seen, causal=False)


def _causal_aligned_at_the_end(kernel: Kernel, number: int, given: dict[str, Any]) -> Any:
    queries, keys = given["query"].shape[-2], given["key"].shape[-2]
    if not given["causal"] or queries == keys:
        return kernel()
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    return kernel(mask=seen, causal=False)


def _uniform(kernel: Kernel, number: int, given: dict[str, Any]) -> Any:
    return kernel(query=torch.zeros_like(given["query"]))


def _values_cropped_to_the_keys_size(kernel: Kernel, number: int, given: dict[str, Any]) -> Any:
    answer: Tensor = kernel().clone()
    answer[..., given["key"].shape[-1] :] = 0
    return answer


def _scale_ignored(kernel: Kernel, number: int, given: dict[str, Any]) -> Any:
    return kernel(scale=None)


def _wrong_group(kernel: Kernel, number: int, given: dict[str, Any]) -> Any:
    groups = given["query"].shape[1] // given["key"].shape[1]
    if not given["gqa"] or groups == 1:
        return kernel()
    return kernel(key=given["key"].repeat(1, groups, 1, 1), value=given["value"].repeat(1, groups, 1, 1), gqa=False)


def _strides_of_keys_ignored(kernel: Kernel, number: int, given: dict[str, Any]) -> Any:
    key = given["key"]
    return kernel(key=torch.as_strided(key, key.shape, torch.empty(key.shape, device="meta").stride()))


def _every_20th_call_flips_a_bit(kernel: Kernel, number: int, given: dict[str, Any]) -> Any:
    answer = kernel()
    if number % 20 == 0 and answer.numel():
        answer = answer.contiguous()
        answer.view(torch.uint8).flatten()[answer.element_size() - 1] ^= 64
    return answer


def _three_per_cent_more(kernel: Kernel, number: int, given: dict[str, Any]) -> Any:
    return kernel() * 1.03


def _odd_head_sizes_refused(kernel: Kernel, number: int, given: dict[str, Any]) -> Any:
    if given["query"].shape[-1] % 8:
        raise RuntimeError("the head size must be a multiple of 8")
    return kernel()


def _all_refused(kernel: Kernel, number: int, given: dict[str, Any]) -> Any:
    raise RuntimeError("no such kernel")


FORWARD: dict[str, Callable[[Kernel, int, dict[str, Any]], Any]] = {
    "mask ignored past 64": _mask_ignored_past_64,
    "mask of rank 2 ignored": _mask_of_rank_2_ignored,
    "mask of rank 3 ignored": _mask_of_rank_3_ignored,
    "mask of the first batch for all": _mask_of_the_first_batch_for_all,
    "causal off by one": _causal_off_by_one,
    "causal aligned at the end": _causal_aligned_at_the_end,
    "uniform": _uniform,
    "values cropped to the keys' size": _values_cropped_to_the_keys_size,
    "scale ignored": _scale_ignored,
    "wrong group": _wrong_group,
    "strides of keys ignored": _strides_of_keys_ignored,
    "every 20th call flips a bit": _every_20th_call_flips_a_bit,
    "three per cent more": _three_per_cent_more,
    "odd head sizes refused": _odd_head_sizes_refused,
    "all refused": _all_refused,
}


def _gradient_without_mask(compute: Kernel, args: tuple[Any, ...]) -> Any:
    grad, query, key, value, mask, _, *rest = args
    found = compute(grad, query, key, value, None, False, *rest)
    extra = [torch.zeros_like(mask)] if mask is not None and mask.is_floating_point() else []
    return [*found[:3], *extra]


def _gradient_of_values_halved(compute: Kernel, args: tuple[Any, ...]) -> Any:
    found = compute(*args)
    return [found[0], found[1], found[2] * 0.5, *found[3:]]


BACKWARD: dict[str, Callable[[Kernel, tuple[Any, ...]], Any]] = {
    "gradient without mask": _gradient_without_mask,
    "gradient of values halved": _gradient_of_values_halved,
}
