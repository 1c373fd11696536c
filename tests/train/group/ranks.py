"""Short trainings of several ranks: `python -m tests.train.group.ranks OUT CASE...` in each rank's environment.

The same functions train in one process, for comparison. Not a test itself.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from crosschip.data import NOT_TRAINED, Batch
from crosschip.model import ModelConfig, Transformer, init_weights
from crosschip.recipe import ParallelSettings, StageSettings
from crosschip.train.group.full_model import gather_model
from crosschip.train.group.sharding import shard_model
from crosschip.train.group.share import share_of_batch
from crosschip.train.group.world import ALONE, Ranks, World, join_world
from crosschip.train.optimizer import build_optimizer
from crosschip.train.step import train_step
from crosschip.train.validation import measure_validation

STEPS = 4
PAD = 0
CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=3,
    num_attention_heads=2, n_routed_experts=8, num_experts_per_tok=2, kv_lora_rank=16, qk_rope_head_dim=8,
    qk_nope_head_dim=8, v_head_dim=8,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What is trained, and how it lies on the ranks."""

    config: dict[str, Any] = field(default_factory=dict)
    stage: dict[str, Any] = field(default_factory=dict)
    expert_parallel: int = 1
    dtype: torch.dtype = torch.float32
    masked: bool = False  # numbers of trained tokens and lengths that differ between sequences, as in fine-tuning
    tilted: bool = False  # every token goes to the first half of the experts: some ranks' experts get none
    world: type[Ranks] = Ranks


class MeanOfMeans(Ranks):
    """The control: each rank divides by its own number of tokens, as if all had as many."""

    def totals(self, counts: Sequence[int]) -> list[int]:
        return [max(1, count) * self.size for count in counts]


CASES = {
    "dense": Case({"first_k_dense_replace": 3}),
    "mtp-tied": Case({"num_nextn_predict_layers": 2, "tie_word_embeddings": True}),
    "masked": Case({"num_nextn_predict_layers": 1}, {"gradient_accumulation": 2}, masked=True),
    "bf16": Case(dtype=torch.bfloat16),
    "uneven-shards": Case({"kv_lora_rank": 15, "v_head_dim": 7}),
    "experts-over-2": Case({"num_nextn_predict_layers": 1}, expert_parallel=2),
    "experts-over-4": Case({"num_nextn_predict_layers": 1}, expert_parallel=4),
    "experts-over-2-masked": Case(stage={"gradient_accumulation": 2}, expert_parallel=2, masked=True, tilted=True),
    "mean-of-means": Case(masked=True, world=MeanOfMeans),
    "few-tokens": Case(masked=True),  # of one process: what the control is compared with
}
CASES_OF = {
    2: [name for name in CASES if name not in ("experts-over-4", "few-tokens")],
    4: ["mtp-tied", "masked", "experts-over-4", "experts-over-2-masked"],
}


class MadeStream:
    """Sequences made from their position; a masked one is of its own length and has its own share of trained tokens."""

    num_sequences = 37

    def __init__(self, masked: bool) -> None:
        self._masked = masked

    def batch(self, first_sequence: int, count: int) -> Batch:
        rows = [self._row(first_sequence + row) for row in range(count)]
        width = max(len(inputs) for inputs, _ in rows)
        inputs = torch.full((count, width), PAD)
        labels = torch.full((count, width), NOT_TRAINED)
        for row, (own_inputs, own_labels) in enumerate(rows):
            inputs[row, : len(own_inputs)] = own_inputs
            labels[row, : len(own_labels)] = own_labels
        return Batch(inputs, labels)

    def _row(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        length = 4 + 3 * (position % 5) if self._masked else 16
        tokens = torch.randint(1, 64, (length + 1,), generator=torch.Generator().manual_seed(position))
        labels = tokens[1:].clone()
        if self._masked:
            labels[: position % 4] = NOT_TRAINED
            if position % 11 < 5:
                labels[:] = NOT_TRAINED  # in several batches one of two or four ranks has few tokens, or none
        return tokens[:-1], labels


class NoBytes:
    """A tokenizer as far as validation needs one."""

    def token_byte_lengths(self) -> Any:
        return torch.ones(64, dtype=torch.int64).numpy()


def settings_of(case: Case, **settings: Any) -> StageSettings:
    chosen = {"steps": 100, "batch_size": 8, "warmup_steps": 0, "learning_rate": 1e-3, "router_bias_update_rate": 1e-2}
    return StageSettings.model_validate({**chosen, **case.stage, **settings})


def train(case: Case, world: World, **settings: Any) -> dict[str, Any]:
    """Train some steps; returns the curve, the weights, and the validation loss."""
    stage = settings_of(case, **settings)
    model = Transformer(dataclasses.replace(CONFIG, **case.config))
    init_weights(model, 3)
    for router in model.routers() if case.tilted else []:
        router.e_score_correction_bias[:4] += 10.0
    model = shard_model(model, world, ParallelSettings(expert_parallel=case.expert_parallel))
    optimizer = build_optimizer(model, stage)
    stream: Any = MadeStream(case.masked)
    curve = []
    for step in range(1, STEPS + 1):
        batch = share_of_batch(stream, 8 * (step - 1), 8, PAD, world)
        result = train_step(model, optimizer, batch, stage, case.dtype, step, 1e-3, world)
        curve.append(dataclasses.asdict(result))
    tokenizer: Any = NoBytes()
    found = measure_validation(model, stream, tokenizer, 20, 3, torch.float32, world)  # 7 batches: uneven over ranks
    whole = gather_model(model, world)
    weights = {} if whole is None else {name: value.clone() for name, value in whole.state_dict().items()}
    return {"curve": curve, "weights": weights, "validation": dataclasses.asdict(found)}


def main() -> None:
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    with join_world(torch.device("cpu"), 60.0) as world:
        assert isinstance(world, Ranks)
        for name in sys.argv[2:]:
            case = CASES[name]
            found = train(case, case.world(world.device, world.group) if case.world is not Ranks else world)
            if world.rank == 0:
                torch.save(found, out / f"{name}.pt")
        (out / f"rank-{world.rank}.json").write_text(json.dumps({"size": world.size, "alone": world is ALONE}))
        handed = world.from_all({"rank": world.rank})
        assert handed == [{"rank": rank} for rank in range(world.size)], handed


if __name__ == "__main__":
    main()
