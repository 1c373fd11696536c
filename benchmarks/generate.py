"""Greedy generation: ours against transformers' `generate` with the same weights, prompts and threads.

python benchmarks/generate.py --json docs/results/generate.json
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peer import CONFIG, arguments, both_models, finish, medians, start

from crosschip.model import Decoder, generate
from crosschip.train.flops import train_flops_per_token

PROMPT, NEW = 32, 64
BATCHES = (1, 16)


def our_side(decoder: Decoder, prompts: torch.Tensor) -> Callable[[], int]:
    """Generate greedily; the tokens made."""

    def side() -> int:
        return sum(map(len, generate(decoder, prompts.tolist(), NEW, set())))

    return side


def their_side(model: Any, prompts: torch.Tensor) -> Callable[[], int]:
    """The same with transformers."""

    def side() -> int:
        with torch.inference_mode():
            out = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                do_sample=False,
            )
        return out[:, PROMPT:].numel()

    return side


def main() -> None:
    options = arguments(__doc__ or "")
    chip, rates = start(options)
    model, theirs = both_models(chip)
    decoder = Decoder(model)
    result: dict[str, Any] = {"benchmark": "generate", "prompt": PROMPT, "new_tokens": NEW, "dtype": "float32"}
    flops = train_flops_per_token(CONFIG, PROMPT + NEW) / 3  # a forward pass is a third of a training step
    for batch in BATCHES:
        prompts = torch.randint(0, CONFIG.vocab_size, (batch, PROMPT)).to(chip.device)
        sides = {"ours": our_side(decoder, prompts), "transformers": their_side(theirs, prompts)}
        ours, peer = _both_answers(decoder, theirs, prompts)
        tokens = medians(sides, chip, options.repeats)
        result[f"batch_{batch}"] = {
            "tokens_per_s": tokens,
            "ratio_to_transformers": tokens["ours"] / tokens["transformers"],
            "same_tokens": torch.equal(ours, peer),
            "share_of_product_rate": tokens["ours"] * flops / rates["float32"],
        }
    finish(options, chip, {**result, "product_rate_flop_per_s": rates})


def _both_answers(decoder: Decoder, theirs: Any, prompts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What both say, so that nobody is fast by saying something else."""
    ours = torch.tensor(generate(decoder, prompts.tolist(), NEW, set()))
    with torch.inference_mode():
        peer = theirs.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
        )
    return ours, peer[:, PROMPT:].cpu()


if __name__ == "__main__":
    main()
