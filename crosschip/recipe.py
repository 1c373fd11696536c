"""The recipe: the one file that describes a run. A TOML file read strictly, without torch.

An unknown key, a wrong value or an impossible combination is a `RecipeError` that names the key, the value and the
remedy. `--set train.steps=200` overrides a key before the check.
"""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from crosschip.errors import RecipeError

__all__ = [
    "ChipSettings",
    "DataSettings",
    "EvaluateSettings",
    "GroupSettings",
    "GuardSettings",
    "HandoffSettings",
    "LinkSettings",
    "ModelSettings",
    "ParallelSettings",
    "QualifySettings",
    "Recipe",
    "ServeSettings",
    "StageSettings",
    "TokenizerSettings",
    "load_recipe",
]

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
ComputeDtype = Literal["auto", "float32", "bfloat16"]


class Settings(BaseModel):
    """A table of the recipe: unknown keys and values of another type are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


class ChipSettings(Settings):
    """`[chips]`: where to train and where to serve. `auto` takes the first accelerator torch finds, else the CPU."""

    train: str = "auto"
    serve: str = "auto"


class ModelSettings(Settings):
    """`[model]`: the architecture in the field names of DeepSeek-V3's `config.json`, or `directory` to start from."""

    directory: str | None = None  # a published model directory: architecture, weights and tokenizer come from there
    hidden_size: PositiveInt = 256
    intermediate_size: PositiveInt = 768
    moe_intermediate_size: PositiveInt = 256
    num_hidden_layers: PositiveInt = 4
    num_nextn_predict_layers: Annotated[int, Field(ge=0)] = 0
    num_attention_heads: PositiveInt = 4
    n_shared_experts: Annotated[int, Field(ge=0)] = 1
    n_routed_experts: PositiveInt = 8
    num_experts_per_tok: PositiveInt = 2
    n_group: PositiveInt = 1
    topk_group: PositiveInt = 1
    routed_scaling_factor: Annotated[float, Field(gt=0.0)] = 1.0
    norm_topk_prob: bool = True
    first_k_dense_replace: Annotated[int, Field(ge=0)] = 1
    kv_lora_rank: PositiveInt = 64
    q_lora_rank: PositiveInt | None = None
    qk_rope_head_dim: PositiveInt = 32
    qk_nope_head_dim: PositiveInt = 32
    v_head_dim: PositiveInt = 32
    max_position_embeddings: PositiveInt = 1024
    initializer_range: Annotated[float, Field(gt=0.0)] = 0.02
    rms_norm_eps: Annotated[float, Field(gt=0.0)] = 1e-6
    tie_word_embeddings: bool = False
    rope_theta: Annotated[float, Field(gt=0.0)] = 10000.0
    rope_scaling: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _divides(self) -> ModelSettings:
        if self.n_routed_experts % self.n_group:
            raise ValueError(f"n_routed_experts={self.n_routed_experts} is not a multiple of n_group={self.n_group}")
        if self.n_group > 1 and self.n_routed_experts < 2 * self.n_group:
            raise ValueError(
                f"n_group={self.n_group} leaves one expert a group of n_routed_experts={self.n_routed_experts}; groups "
                "are ranked by their two best experts"
            )
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group={self.topk_group} is more than n_group={self.n_group}")
        choosable = self.n_routed_experts // self.n_group * self.topk_group
        if self.num_experts_per_tok > choosable:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} is more than the {choosable} experts "
                f"that topk_group={self.topk_group} groups hold"
            )
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim={self.qk_rope_head_dim} is odd; rotations turn pairs")
        return self


class TokenizerSettings(Settings):
    """`[tokenizer]`: a byte-level BPE trained on the data, or `directory` of an existing Hugging Face tokenizer."""

    directory: str | None = None
    vocab_size: Annotated[int, Field(ge=300)] = 1024


class DataSettings(Settings):
    """`[data]`: `source = "arithmetic"` makes verifiable problems; `path` reads text, JSONL or Parquet.

    A path is a file, a directory, a glob, or `hf://datasets/OWNER/NAME[/FILES]`. A row is plain text (`text_field`),
    chat messages (`messages_field`), or a question and an answer; `reasoning_separator` splits an answer into
    reasoning and final answer, and `remove_pattern` is a regular expression deleted from the answer before that.
    """

    source: Literal["arithmetic", "files"] = "files"
    path: str | None = None
    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    text_field: str = "text"
    messages_field: str = "messages"
    question_field: str = "question"
    answer_field: str = "answer"
    reasoning_separator: str | None = None
    remove_pattern: str | None = None
    skip_bad_rows: Annotated[int, Field(ge=0)] = 0
    validation_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    levels: Annotated[list[PositiveInt], Field(min_length=1)] = [1]
    num_problems: PositiveInt = 100_000

    @model_validator(mode="after")
    def _one_source(self) -> DataSettings:
        if self.source == "arithmetic" and self.path is not None:
            raise ValueError(
                f"path={self.path!r} is given together with source='arithmetic'; "
                "remove one of the two (source='files' reads a path)"
            )
        return self


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


class QualifySettings(Settings):
    """`[qualify]`: the short examination of the chip before it trains; 0 seconds leave it out."""

    time_s: Annotated[float, Field(ge=0.0)] = 60.0
    on_fail: Literal["stop", "go on"] = "stop"


class GuardSettings(Settings):
    """`[guard]`: what is done about steps that are not believed, and about processes that hang or die.

    Every number of tries is a bound: beyond it comes the next stronger remedy, at last an end with a diagnosis.
    `start_allowance_s` is how long a rank may be silent, in seconds, where nothing was measured yet: while it starts,
    in its first step, and the first time that it validates or saves.
    """

    on_spike: Literal["skip", "roll-back", "warn"] = "skip"
    spike_z: Annotated[float, Field(ge=4.0)] = 10.0  # robust standard deviations above the last 48 steps' median
    max_skips: Annotated[int, Field(ge=0)] = 3  # batches left out within 50 steps, before the weights go back
    max_roll_backs: Annotated[int, Field(ge=0)] = 2
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
    own_share: Fraction = 0.0  # of a group's own parameters that stay in them at an outer step
    compression: Literal["auto", "none", "int8", "int4"] = "auto"
    outer_learning_rate: Annotated[float, Field(gt=0.0)] = 0.7
    outer_momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    on_drop: Literal["smaller-batch", "lower-learning-rate"] = "smaller-batch"  # what gives while groups are missing
    lighthouse: str | None = None  # http://HOST:PORT of the program that the groups meet at; None: start one here

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
    report: str | None = None


class EvaluateSettings(Settings):
    """`[evaluate]`: held-out problems answered greedily after training. `level` is for the arithmetic generator."""

    num_problems: PositiveInt = 200
    level: PositiveInt = 1
    max_new_tokens: PositiveInt = 160


class HandoffSettings(Settings):
    """`[handoff]`: the form of the files that leave."""

    target: Literal["hf"] = "hf"
    dtype: Literal["float32", "bfloat16"] = "float32"


class ServeSettings(Settings):
    """`[serve]`: limits of the native engine."""

    max_batch_size: PositiveInt = 16
    max_model_len: PositiveInt | None = None  # tokens, prompt and answer together; None: the model's own limit


class Recipe(Settings):
    """The whole file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: Annotated[int, Field(ge=0)] = 0
    chips: ChipSettings = ChipSettings()
    qualify: QualifySettings = QualifySettings()
    guard: GuardSettings = GuardSettings()
    model: ModelSettings = ModelSettings()
    tokenizer: TokenizerSettings = TokenizerSettings()
    data: DataSettings
    train: StageSettings | None = None
    sft: StageSettings | None = None
    parallel: ParallelSettings = ParallelSettings()
    evaluate: EvaluateSettings | None = None
    groups: GroupSettings = GroupSettings()
    links: LinkSettings = LinkSettings()
    handoff: HandoffSettings = HandoffSettings()
    serve: ServeSettings = ServeSettings()

    @model_validator(mode="after")
    def _stages(self) -> Recipe:
        if self.train is None and self.sft is None:
            raise ValueError("neither [train] nor [sft] is there; add at least one stage")
        for name, stage in (("train", self.train), ("sft", self.sft)):
            if stage is not None and stage.seq_len > self.model.max_position_embeddings:
                raise ValueError(
                    f"{name}.seq_len={stage.seq_len} is more than "
                    f"model.max_position_embeddings={self.model.max_position_embeddings}; raise it"
                )
            if stage is not None and stage.batch_size % self.groups.num_groups:
                raise ValueError(
                    f"{name}.batch_size={stage.batch_size} is not a multiple of groups.num_groups="
                    f"{self.groups.num_groups}; each group takes an equal share of a step"
                )
        return self


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read, override (`KEY=VALUE` with dotted keys) and check a recipe; every fault is a `RecipeError`."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"no recipe at {path}", "check the path; shipped ones are in recipes/") from None
    except IsADirectoryError:
        raise RecipeError(f"{path} is a directory", "give the TOML file itself") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8: {error}", "save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path} is not TOML: {error}", "mend that line") from None
    for override in overrides or []:
        _apply_override(document, override)
    return parse_recipe(document, str(path))


def parse_recipe(document: dict[str, Any], origin: str) -> Recipe:
    """Check a recipe that is already a dictionary; `origin` is named in errors."""
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        raise _explain(error, origin) from None


def _apply_override(document: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")):
        raise RecipeError(f"--set {override!r} is not KEY=VALUE", "write it like --set train.steps=200")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word or a path is a string
    *tables, last = key.strip().split(".")
    table = document
    for name in tables:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise RecipeError(f"--set {override!r}: {name} is not a table", "check the key")
    table[last] = value


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    """The keys of the table that holds `location`'s last part."""
    settings: Any = Recipe
    for part in location[:-1]:
        annotation = settings.model_fields[part].annotation if part in settings.model_fields else None
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        found = [c for c in candidates if isinstance(c, type) and issubclass(c, Settings)]
        if not found:
            return []
        settings = found[0]
    return list(settings.model_fields)


def _explain(error: ValidationError, origin: str) -> RecipeError:
    problems, remedies = [], []
    for fault in error.errors():
        location = fault["loc"]
        key = ".".join(str(part) for part in location) or "the recipe"
        if fault["type"] == "extra_forbidden":
            known = _known_keys(location)
            near = difflib.get_close_matches(str(location[-1]), known, n=1)
            problems.append(f"{key} = {fault['input']!r} is not a key of a recipe")
            remedies.append(f"did you mean {near[0]!r}?" if near else f"the keys here are {', '.join(known)}")
        elif fault["type"] == "missing":
            problems.append(f"{key} is missing")
            remedies.append(f"add {key}")
        elif fault["type"] == "value_error":
            problems.append(f"{key}: {fault['ctx']['error']}" if location else str(fault["ctx"]["error"]))
            remedies.append("change one of the two values")
        else:
            problems.append(f"{key} = {fault['input']!r}: {fault['msg'].lower()}")
            remedies.append(f"give {key} such a value")
    return RecipeError(f"{origin}: " + "; ".join(problems), "; ".join(dict.fromkeys(remedies)))
