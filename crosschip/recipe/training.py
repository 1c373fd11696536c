"""The tables about training: a stage, the processes that share it, what guards it, groups and links."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from crosschip.recipe.settings import ComputeDtype, Fraction, NonEmpty, PositiveInt, Settings
from crosschip.recipe.tables import DataSettings

__all__ = ["GroupSettings", "GuardSettings", "LinkSettings", "ParallelSettings", "StageSettings"]


class StageSettings(Settings):
    """`[train]` (pre-training) and `[sft]` (fine-tuning): one optimisation with its own schedule.

    `batch_size` counts sequences per optimizer step over everything; `gradient_accumulation` says in how many parts one
    process computes them. `seq_len` is in tokens. `schedule` is `cosine` or `wsd` (warm-up, stable, decay).
    """

    steps: PositiveInt
    batch_size: PositiveInt = 16
    gradient_accumulation: PositiveInt = 1
    seq_len: Annotated[int, Field(ge=2)] = 256
    learning_rate: Annotated[float, Field(gt=0.0)] = 1e-3
    final_learning_rate_share: Fraction = 0.1
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    decay_share: Fraction = 0.2
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    adam_eps: Annotated[float, Field(gt=0.0)] = 1e-8
    gradient_clip: Annotated[float, Field(gt=0.0)] = 1.0
    mtp_loss_weight: Annotated[float, Field(ge=0.0)] = 0.1
    router_bias_update_rate: Annotated[float, Field(ge=0.0)] = 1e-3
    dtype: ComputeDtype = "auto"
    validate_every: PositiveInt = 200
    validation_sequences: PositiveInt = 64
    sample_every: PositiveInt = 500
    checkpoint_every: PositiveInt = 200
    keep_checkpoints: PositiveInt = 2
    keep_every: PositiveInt | None = None  # steps; checkpoints at multiples of it are never deleted
    verify_checkpoints: Literal["loss", "tensors", "off"] = "loss"  # how far each save is read back
    data: DataSettings | None = None  # another data set for this stage
    lora_rank: PositiveInt | None = None  # train adapters of this rank on attention and experts instead of all weights
    lora_alpha: Annotated[float, Field(gt=0.0)] | None = None  # their scale times the rank; None: twice the rank

    @model_validator(mode="after")
    def _parts(self) -> StageSettings:
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of gradient_accumulation={self.gradient_accumulation}"
            )
        if self.keep_every is not None and self.keep_every % self.checkpoint_every:
            raise ValueError(
                f"keep_every={self.keep_every} is not a multiple of checkpoint_every={self.checkpoint_every}; "
                "only steps with a checkpoint can be kept"
            )
        if self.lora_alpha is not None and self.lora_rank is None:
            raise ValueError(
                f"lora_alpha={self.lora_alpha:g} is the scale of adapters, and without lora_rank there are none; "
                "give lora_rank or leave out lora_alpha"
            )
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} leaves nothing of steps={self.steps}; lower it")
        return self


class ParallelSettings(Settings):
    """`[parallel]`: how several processes (ranks) share one model. Parameters are always sharded over all of them.

    `expert_parallel` ranks together hold one set of a layer's routed experts, and tokens travel to them; 1 gathers the
    experts where the tokens are. A collective that takes longer than `timeout_s` seconds fails.
    """

    expert_parallel: PositiveInt = 1
    timeout_s: Annotated[float, Field(gt=0.0)] = 600.0


class GuardSettings(Settings):
    """`[guard]`: what is done about steps that are not believed, and about processes that hang or die.

    Every number of tries is a bound: beyond it comes the next stronger remedy, at last an end with a diagnosis.
    `start_allowance_s` is how long a rank may be silent, in seconds, where nothing was measured yet: while it starts,
    in its first step, and the first time that it validates or saves.
    """

    on_spike: Literal["skip", "roll-back", "warn"] = "skip"
    spike_z: Annotated[float, Field(ge=4.0)] = 10.0  # robust standard deviations above the last 48 steps' median
    max_skips: Annotated[int, Field(ge=0)] = 3  # batches left out within 50 steps, before the weights go back
    max_roll_backs: Annotated[int, Field(ge=0)] = 2  # within 1,000 steps
    max_transient_faults: Annotated[int, Field(ge=0)] = 3  # steps a chip may compute wrongly within 1,000
    audit_every: Annotated[int, Field(ge=0)] = 0  # steps between two that are computed twice; 0: none
    memory_growth_gib_h: Annotated[float, Field(gt=0.0)] = 1.0
    max_restarts: Annotated[int, Field(ge=0)] = 3  # without a new checkpoint in between
    start_allowance_s: Annotated[float, Field(gt=0.0)] = 600.0


class GroupSettings(Settings):
    """`[groups]`: replica groups that train one model together and survive each other (docs/groups.md).

    `every-step` averages the gradients each step; `diloco` lets each group train `sync_every` steps and then averages
    what they changed, in `fragments` pieces at staggered steps, sent while `overlap_steps` further steps are computed.
    `auto` chooses by `[links]`, and so does a key without a value. A step goes on with `min_groups` groups.
    """

    num_groups: PositiveInt = 1
    min_groups: PositiveInt = 1
    mode: Literal["auto", "every-step", "diloco"] = "auto"
    sync_every: PositiveInt | None = None  # inner steps between two outer steps of a parameter
    fragments: PositiveInt | None = None
    overlap_steps: Annotated[int, Field(ge=0)] | None = None  # inner steps during which a fragment is under way
    own_share: Fraction | None = None  # of its own parameters that a group keeps in them at an outer step; None: it
    # keeps on top of the common ones what it trained while they were under way
    compression: Literal["auto", "none", "int8", "int4"] = "auto"
    outer_learning_rate: Annotated[float, Field(gt=0.0)] = 0.7
    outer_momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    on_drop: Literal["smaller-batch", "lower-learning-rate"] = "smaller-batch"  # what gives while groups are missing
    lighthouse: NonEmpty | None = None  # http://HOST:PORT of the program that the groups meet at; None: start one here

    @model_validator(mode="after")
    def _fits(self) -> GroupSettings:
        if self.min_groups > self.num_groups:
            raise ValueError(f"min_groups={self.min_groups} is more than num_groups={self.num_groups}; lower it")
        if self.sync_every is None:
            if self.overlap_steps:
                raise ValueError(f"overlap_steps={self.overlap_steps} stands without sync_every; give both")
            return self
        fragments, overlap = self.fragments or 1, self.overlap_steps or 0
        if self.sync_every % fragments:
            raise ValueError(f"sync_every={self.sync_every} is not a multiple of fragments={fragments}")
        if overlap >= self.sync_every // fragments:
            raise ValueError(
                f"overlap_steps={overlap} is not less than the {self.sync_every // fragments} steps between two "
                f"fragments (sync_every={self.sync_every} / fragments={fragments})"
            )
        return self


class LinkSettings(Settings):
    """`[links]`: the slowest link between two groups, in megabits a second and milliseconds one way.

    `report` is a JSON file of the links exam or of `measure.py` (docs/links.md); what is given beside it counts more.
    """

    bandwidth_mbit_s: Annotated[float, Field(gt=0.0)] | None = None
    latency_ms: Annotated[float, Field(ge=0.0)] | None = None
    report: NonEmpty | None = None

    @model_validator(mode="after")
    def _has_a_bandwidth(self) -> LinkSettings:
        if self.latency_ms is not None and self.bandwidth_mbit_s is None and self.report is None:
            raise ValueError(f"latency_ms={self.latency_ms:g} stands without bandwidth_mbit_s; give both, or a report")
        return self
