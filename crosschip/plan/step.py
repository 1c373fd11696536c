"""What the planner's parts hand to each other: a layout over chips, a step's time and memory, and a planned run.

Plain data without behaviour beyond arithmetic. `parts` of an estimate add up to its step time, so that nothing of a
step is without a name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from crosschip.plan.figures import Figure

__all__ = ["Layout", "Loser", "Plan", "Recompute", "StepEstimate"]

Recompute = Literal["none", "selective", "alternate", "full"]


@dataclass(frozen=True)
class Layout:
    """How chips share one model.

    `data * tensor * context * pipeline` chips make a group; `groups` such groups train together over thin links
    (DiLoCo). `expert` chips hold different experts (see `expert_shards`). `zero` is the stage of
    sharding over `data * context`: 0 nothing, 1 optimizer states, 2 gradients too, 3 parameters too (FSDP), over the
    whole of them or over `shard` neighbours (hybrid sharding) when that is given. `interleave` is the number of model
    chunks a pipeline stage holds. `micro_batch` counts sequences. `recompute`: `selective` recomputes what is cheap:
    scores that were written out, or with fused attention norms, rotations and activations; `alternate` every second
    matrix product, `full` a whole layer.
    """

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    interleave: int = 1
    context: int = 1
    expert: int = 1
    zero: int = 1
    shard: int | None = None
    micro_batch: int = 1
    recompute: Recompute = "none"
    sequence_parallel: bool = True
    groups: int = 1

    @property
    def chips_per_group(self) -> int:
        """Chips that train together over fast links."""
        return self.data * self.tensor * self.pipeline * self.context

    @property
    def expert_shards(self) -> int:
        """Chips that together hold one set of a layer's experts, each whole: tensor parallelism cuts no expert.

        `expert` counts the chips of a tensor-parallel group among its own where it is at least as wide; a smaller one
        is meant beside it (as `TP8 EP4`), so the experts lie on the product of both.
        """
        return self.expert if self.expert >= self.tensor else self.expert * self.tensor

    @property
    def num_chips(self) -> int:
        """All chips."""
        return self.chips_per_group * self.groups

    def __str__(self) -> str:
        """The usual short form, such as `DP64 TP8 PP16x2 EP8 ZeRO-1, 1 x 8 sequences, full recompute`."""
        sizes = [
            ("DP", self.data),
            ("TP", self.tensor),
            ("PP", self.pipeline),
            ("CP", self.context),
            ("EP", self.expert),
        ]
        words = [f"{name}{size}" for name, size in sizes if size > 1 or name == "DP"]
        if self.interleave > 1:
            words = [f"{word}x{self.interleave}" if word.startswith("PP") else word for word in words]
        if self.groups > 1:
            words.insert(0, f"{self.groups} groups of")
        shard = f" over {self.shard}" if self.shard is not None else ""
        words.append(f"ZeRO-{self.zero}{shard}")
        return f"{' '.join(words)}, micro-batch {self.micro_batch}, recompute {self.recompute}"


@dataclass(frozen=True)
class StepEstimate:
    """One optimizer step of a layout.

    `parts` is the step's time in seconds by cause and adds up to `step_s`; `memory_parts` is the fullest chip's
    memory in bytes by kind and adds up to `memory_bytes`. `model_flops` are the operations of a step without
    recomputation.
    """

    step_s: float
    tokens_per_step: int
    num_chips: int
    num_nodes: int
    memory_bytes: int
    layout: Layout
    parts: dict[str, float]
    memory_parts: dict[str, int]
    model_flops: float
    sources: dict[str, Figure] = field(default_factory=dict)

    @property
    def tokens_per_s(self) -> float:
        """Tokens trained a second by all chips together."""
        return self.tokens_per_step / self.step_s

    @property
    def tokens_per_s_per_chip(self) -> float:
        """Tokens trained a second by one chip."""
        return self.tokens_per_s / self.num_chips

    @property
    def model_flops_per_s_per_chip(self) -> float:
        """Operations a second of one chip that the model needs: what `MFU` is a share of."""
        return self.model_flops / self.step_s / self.num_chips


@dataclass(frozen=True)
class Loser:
    """A layout that was not chosen, and why: it does not fit, or is slower by what."""

    layout: Layout
    reason: str
    step_s: float | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Plan:
    """A planned run: the best layout first, the next best and the refused ones with reasons.

    `num_parameters` and `flops_per_token` are the model's; `tokens` is what the run shall train on, `steps` how many
    optimizer steps that takes at the chosen batch. `notes` say what was assumed or searched for.
    """

    model_name: str
    cluster_name: str
    stage_name: str
    num_chips: int
    num_parameters: int
    num_active_parameters: int
    flops_per_token: float
    tokens: float
    steps: int
    seq_len: int
    batch_size: int
    best: StepEstimate
    others: tuple[StepEstimate, ...]
    losers: tuple[Loser, ...]
    notes: tuple[str, ...]
    num_searched: int
