"""What the benchmarks share: one model in our form and in transformers', the machine's product rate, fair timing."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from crosschip.chips import Chip, find_chip, fingerprint, keep_freed_memory, product_rate, synchronize
from crosschip.model import ModelConfig, Transformer, init_weights, save_model

CONFIG = ModelConfig(
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=768,
    moe_intermediate_size=128,
    num_hidden_layers=6,
    num_attention_heads=4,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_shared_experts=1,
    first_k_dense_replace=1,
    kv_lora_rank=128,
    qk_rope_head_dim=32,
    qk_nope_head_dim=64,
    v_head_dim=64,
    max_position_embeddings=512,
)


def arguments(description: str) -> argparse.Namespace:
    """The options all benchmarks take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--chip", default="auto")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=5, help="rounds; in each every side runs once, in turn")
    parser.add_argument("--json", type=Path, help="write the result here, too")
    return parser.parse_args()


def both_models(chip: Chip) -> tuple[Transformer, Any]:
    """The same weights as our model and as transformers'."""
    ours = Transformer(CONFIG)
    init_weights(ours, seed=1)
    with tempfile.TemporaryDirectory() as directory:
        save_model(ours, Path(directory))
        transformers.logging.set_verbosity_error()
        theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return ours.to(chip.device), theirs.to(chip.device)


def medians(sides: dict[str, Callable[[], int]], chip: Chip, repeats: int) -> dict[str, float]:
    """Median of units per second for each side; each call returns the units of work it did. Sides take turns."""
    for side in sides.values():
        side()
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            synchronize(chip)
            start = time.perf_counter()
            units = side()
            synchronize(chip)
            rates[name].append(units / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in rates.items()}


def start(options: argparse.Namespace) -> tuple[Chip, dict[str, float]]:
    """Set the threads and the allocator, for all sides alike; find the chip and measure its product rates."""
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    chip = find_chip(options.chip)
    return chip, {str(dtype)[6:]: product_rate(chip, dtype) for dtype in (torch.float32, torch.bfloat16)}


def finish(options: argparse.Namespace, chip: Chip, result: dict[str, Any]) -> None:
    """Print the result and write it with the machine's fingerprint."""
    document = {
        **result,
        "num_parameters": sum(p.numel() for p in Transformer(CONFIG).parameters()),
        "transformers": transformers.__version__,
        "fingerprint": fingerprint(chip),
    }
    text = json.dumps(document, indent=2)
    print(text)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n", encoding="utf-8")
