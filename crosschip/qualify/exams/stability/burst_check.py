"""Attention over long prompts, alone and in company, as a check. Needs torch only: reproducers hold its source."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch

__all__ = ["attention_in_company_is_wrong", "attention_over", "attention_prompts"]


def attention_prompts(
    device: str | torch.device, dtype: str, shapes: list[list[int]], seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value of these shapes, drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(shape, generator=generator).to(getattr(torch, dtype)).to(device) for shape in shapes
    )
    return query, key, value


def attention_over(prompts: tuple[torch.Tensor, torch.Tensor, torch.Tensor], scale: float | None) -> torch.Tensor:
    """Causal attention, with grouped heads where there are fewer of keys than of queries."""
    query, key, value = prompts
    with torch.inference_mode():
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )


def attention_in_company_is_wrong(
    device: str, dtype: str, shapes: list[list[int]], scale: float | None, seeds: list[int], number: int
) -> tuple[bool, str, str]:
    """Call attention once for each seed, then `number` times more, all seeds at once in a thread each.

    Wrong: a result has other bits than the first time, or a call raises.
    """
    prompts = [attention_prompts(device, dtype, shapes, seed) for seed in seeds]

    def bits(which: int) -> torch.Tensor:
        return attention_over(prompts[which], scale).cpu().contiguous().view(torch.uint8)

    firsts = [bits(each) for each in range(len(seeds))]

    begin = Barrier(len(seeds))

    def differing(which: int) -> int:
        begin.wait()
        return sum(not torch.equal(bits(which), firsts[which]) for _ in range(number))

    with ThreadPoolExecutor(len(seeds)) as pool:
        odd = sum(pool.map(differing, range(len(seeds))))
    expected = f"the same bits {number} times more, {len(seeds)} calls at a time"
    return odd > 0, expected, f"{odd} of {number * len(seeds)} results have other bits than the first"
