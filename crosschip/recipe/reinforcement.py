"""The table `[rl]`: reinforcement learning with verifiable rewards, its rollouts and the engines that make them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from crosschip.recipe.distilling import DistillSettings
from crosschip.recipe.settings import PositiveInt, Settings
from crosschip.recipe.training import StageSettings

__all__ = [
    "FurtherDistilling",
    "FurtherFineTuning",
    "FurtherReinforcement",
    "RewardSettings",
    "RlSettings",
    "RolloutSettings",
]

StageName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,30}$")]


class RewardSettings(Settings):
    """One term of the reward: a checker by its name or as `package.module:function`, and what it counts.

    Where it is `required` and gives less than 1.0, the whole reward is at most 0.0, whatever the other terms say.
    """

    checker: str
    weight: float = 1.0
    required: bool = False


class RolloutSettings(Settings):
    """`[rl.rollouts]`: which engines answer, and what of their answers is used.

    `native` starts our engine on `chips.serve` here; an address is an engine that runs already and sees the run
    directory under the same path. `max_staleness` is how many versions the weights that answered may be behind those
    that are trained; 0 is on-policy.

    An importance weight is the trainer's probability of a sampled token over the engine's; above `importance_limit` it
    is cut off there. `reject_outside` leaves out answers whose mean weight (geometric) is outside 1 / x .. x,
    `veto_below` answers with any token whose weight is below. `mismatch_limit` bounds the KL divergence per token (k3)
    between an engine and the trainer, over a batch.
    """

    engines: Annotated[list[str], Field(min_length=1)] = ["native"]  # noqa: RUF012  # pydantic copies it
    max_staleness: Annotated[int, Field(ge=0)] = 1
    max_batch_size: PositiveInt = 64  # answers at a time in an engine started here
    num_threads: PositiveInt | None = None  # of an engine started here; None: half of the cores
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of an engine started here; auto: as the trainer computes
    timeout_s: Annotated[float, Field(gt=0.0)] = 300.0  # of one request
    start_timeout_s: Annotated[float, Field(gt=0.0)] = 300.0
    replay_routes: bool = True  # train with the experts that the engine chose, where it tells them
    correction: Literal["truncate", "none"] = "truncate"
    importance_limit: Annotated[float, Field(gt=1.0)] = 2.0
    reject_outside: Annotated[float, Field(gt=1.0)] | None = None
    veto_below: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    mismatch_limit: Annotated[float, Field(gt=0.0)] = 0.1
    on_mismatch: Literal["stop", "drop", "warn"] = "stop"  # drop: go on with the other engines

    @field_validator("engines")
    @classmethod
    def _known(cls, engines: list[str]) -> list[str]:
        for engine in engines:
            if not re.fullmatch(r"native(@[^\s@]+)?|https?://\S+", engine):
                raise ValueError(
                    f"{engine!r} is no engine; give 'native', 'native@CHIP' or an address, http://HOST:PORT"
                )
        return engines


class RlSettings(StageSettings):
    """`[rl]`: GRPO (arXiv 2402.03300) with the changes of DAPO (arXiv 2503.14476) and Dr. GRPO (arXiv 2503.20783).

    A batch of rollouts is `prompts` problems with `samples` answers each; `updates_per_batch` optimizer steps are
    taken with it, so `batch_size` follows from the three. An answer's advantage is its reward minus the mean of its
    group, divided by the group's deviation if `divide_by_deviation`, and times `negative_weight` where it is below 0
    (with two rewards that is a lower baseline: arXiv 2506.20520). `kl_weight` pulls towards the weights that the
    stage began with. `seq_len` bounds prompt and answer together, in tokens. The policy is the model at `temperature`:
    answers are sampled at it, and log-probs computed. Below 1 less is explored, and what is learned is nearer to the
    greedy answer.
    """

    prompts: PositiveInt = 16
    samples: Annotated[int, Field(ge=2)] = 16
    updates_per_batch: PositiveInt = 1
    max_new_tokens: PositiveInt = 128
    temperature: Annotated[float, Field(ge=0.05, le=2.0)] = 1.0
    rewards: Annotated[list[RewardSettings], Field(min_length=1)] = [  # noqa: RUF012  # pydantic copies it
        RewardSettings(checker="arithmetic")
    ]
    reward_timeout_s: Annotated[float, Field(gt=0.0, le=86_400.0)] = 10.0
    reward_workers: PositiveInt | None = None  # processes for checkers; None: the usable cores, at most 8
    divide_by_deviation: bool = True
    negative_weight: Annotated[float, Field(ge=0.0)] = 1.0  # on advantages below 0
    average: Literal["token", "answer"] = "token"  # whether long answers count more
    clip_low: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    clip_high: Annotated[float, Field(gt=0.0)] = 0.28
    kl_weight: Annotated[float, Field(ge=0.0)] = 0.0
    over_long: Literal["as judged", "leave out"] = "as judged"  # answers that were cut off at max_new_tokens
    over_long_buffer: Annotated[int, Field(ge=0)] = 0  # last tokens over which a penalty grows from 0 to 1
    drop_without_signal: bool = True  # groups whose answers all got the same reward are sampled anew
    max_groups_tried: PositiveInt = 8  # times `prompts`, to fill a batch; then it is trained as it is
    max_error_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.2  # of rewards that may fail in a batch
    rollouts: RolloutSettings = RolloutSettings()
    warmup_steps: Annotated[int, Field(ge=0)] = 2
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    learning_rate: Annotated[float, Field(gt=0.0)] = 1e-5
    mtp_loss_weight: Annotated[float, Field(ge=0.0, le=0.0)] = 0.0  # the extra modules are not reinforced
    router_bias_update_rate: Annotated[float, Field(ge=0.0)] = 0.0

    @model_validator(mode="before")
    @classmethod
    def _batch(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        prompts, samples, updates = (
            given.get(name, cls.model_fields[name].default) for name in ("prompts", "samples", "updates_per_batch")
        )
        if not all(isinstance(number, int) and number > 0 for number in (prompts, samples, updates)):
            return given  # told by the fields themselves
        size, rest = divmod(prompts * samples, updates)
        if rest:
            raise ValueError(
                f"prompts={prompts} times samples={samples} is not a multiple of updates_per_batch={updates}"
            )
        if given.get("batch_size", size) != size:
            raise ValueError(
                f"batch_size={given['batch_size']} is not prompts={prompts} * samples={samples} / "
                f"updates_per_batch={updates} = {size}; leave it out"
            )
        if given.get("verify_checkpoints") == "loss":
            raise ValueError(
                'verify_checkpoints="loss" cannot be had: the loss of a step depends on its rollouts; take "tensors"'
            )
        return {"verify_checkpoints": "tensors"} | given | {"batch_size": size}

    @model_validator(mode="after")
    def _lengths(self) -> RlSettings:
        if self.max_new_tokens >= self.seq_len:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens} leaves no room for a prompt in seq_len={self.seq_len}"
            )
        if self.over_long_buffer >= self.max_new_tokens:
            raise ValueError(
                f"over_long_buffer={self.over_long_buffer} is not less than max_new_tokens={self.max_new_tokens}"
            )
        return self


class FurtherFineTuning(StageSettings):
    """`[[then]]` with `kind = "sft"`: another fine-tuning. `distilled` names the stage before that made its data."""

    kind: Literal["sft"]
    name: StageName
    distilled: str | None = None


class FurtherReinforcement(RlSettings):
    """`[[then]]` with `kind = "rl"`: more reinforcement learning."""

    kind: Literal["rl"]
    name: StageName


class FurtherDistilling(DistillSettings):
    """`[[then]]` with `kind = "distill"`: the model's own right answers, for a fine-tuning after it."""

    kind: Literal["distill"]
    name: StageName
