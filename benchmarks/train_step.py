"""Training step: ours against transformers' with the same weights, batch and threads, and the measured product rate.

python benchmarks/train_step.py --json docs/results/train_step.json
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from peer import CONFIG, arguments, both_models, finish, medians, start

from crosschip.model import Transformer
from crosschip.train.flops import train_flops_per_token

BATCH, LENGTH = 16, 256
STEPS = 4  # a turn: training is many steps of one kind, not one step between two others


def our_step(model: Transformer, ids: torch.Tensor, dtype: torch.dtype) -> Callable[[], int]:
    """One step of our model: loss, gradients, clipping, fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> int:
        parts = model.loss(ids[:, :-1], ids[:, 1:], dtype)
        (parts.loss_sum / parts.num_tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.update_router_bias(parts.expert_load_LE, 1e-3)
        return BATCH * LENGTH

    return step


def their_step(model: Any, ids: torch.Tensor, autocast: bool) -> Callable[[], int]:
    """The same step of transformers' model; with autocast its products run in bf16."""
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> int:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=autocast):
            loss = model(inputs, labels=inputs, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return BATCH * LENGTH

    return step


def repeated(step: Callable[[], int]) -> Callable[[], int]:
    """A turn of `STEPS` steps."""
    return lambda: sum(step() for _ in range(STEPS))


def main() -> None:
    options = arguments(__doc__ or "")
    chip, rates = start(options)
    ours, theirs = both_models(chip)
    ids = torch.randint(0, CONFIG.vocab_size, (BATCH, LENGTH + 1)).to(chip.device)
    sides = {
        "ours_float32": our_step(ours, ids, torch.float32),
        "ours_bfloat16": our_step(copy.deepcopy(ours), ids, torch.bfloat16),
        "transformers_float32": their_step(theirs, ids, autocast=False),
        "transformers_bfloat16_autocast": their_step(copy.deepcopy(theirs), ids, autocast=True),
    }
    tokens = medians({name: repeated(step) for name, step in sides.items()}, chip, options.repeats)
    ours_best = max(tokens["ours_float32"], tokens["ours_bfloat16"])
    flops = train_flops_per_token(CONFIG, LENGTH)
    finish(
        options,
        chip,
        {
            "benchmark": "train_step",
            "batch": [BATCH, LENGTH],
            "steps_per_turn": STEPS,
            "tokens_per_s": tokens,
            "ratio_to_transformers_best": ours_best
            / max(tokens["transformers_float32"], tokens["transformers_bfloat16_autocast"]),
            "product_rate_flop_per_s": rates,
            "flop_per_token": flops,
            "share_of_product_rate": {
                dtype: tokens[f"ours_{dtype}"] * flops / rates[dtype] for dtype in ("float32", "bfloat16")
            },
        },
    )


if __name__ == "__main__":
    main()
