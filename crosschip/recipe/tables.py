"""The tables about chips, the model, its data and its use."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from crosschip.recipe.settings import NonEmpty, PositiveInt, Settings

__all__ = [
    "ChipSettings",
    "DataSettings",
    "EvaluateSettings",
    "HandoffSettings",
    "ModelSettings",
    "QualifySettings",
    "ServeSettings",
    "TokenizerSettings",
]


class ChipSettings(Settings):
    """`[chips]`: where to train and where to serve. `auto` takes the first accelerator torch finds, else the CPU."""

    train: str = "auto"
    serve: str = "auto"


class ModelSettings(Settings):
    """`[model]`: the architecture in the field names of DeepSeek-V3's `config.json`, or `directory` to start from."""

    directory: NonEmpty | None = None  # of a published model: architecture, weights and tokenizer come from there
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

    directory: NonEmpty | None = None
    vocab_size: Annotated[int, Field(ge=300)] = 1024


class DataSettings(Settings):
    """`[data]`: `source = "arithmetic"` makes verifiable problems; `path` reads text, JSONL or Parquet.

    A path is a file, a directory, a glob, or `hf://datasets/OWNER/NAME[/FILES]`. A row is plain text (`text_field`),
    chat messages (`messages_field`), or a question and an answer; `reasoning_separator` splits an answer into
    reasoning and final answer, and `remove_pattern` is a regular expression deleted from the answer before that.
    `question_suffix` follows each question of such a row: an instruction, say how the answer is to be written.
    """

    source: Literal["arithmetic", "files"] = "files"
    path: NonEmpty | None = None
    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    text_field: str = "text"
    messages_field: str = "messages"
    question_field: str = "question"
    answer_field: str = "answer"
    question_suffix: str = ""
    reasoning_separator: NonEmpty | None = None
    remove_pattern: str | None = None
    skip_bad_rows: Annotated[int, Field(ge=0)] = 0
    validation_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    levels: Annotated[list[PositiveInt], Field(min_length=1)] = [1]  # noqa: RUF012  # pydantic copies it
    num_problems: PositiveInt = 100_000

    @model_validator(mode="after")
    def _one_source(self) -> DataSettings:
        if self.source == "arithmetic" and self.path is not None:
            raise ValueError(
                f"path={self.path!r} is given together with source='arithmetic'; "
                "remove one of the two (source='files' reads a path)"
            )
        return self


class QualifySettings(Settings):
    """`[qualify]`: the short examination of the chip before it trains; 0 seconds leave it out."""

    time_s: Annotated[float, Field(ge=0.0)] = 60.0
    on_fail: Literal["stop", "go on"] = "stop"


class EvaluateSettings(Settings):
    """`[evaluate]`: held-out problems answered after training, greedily. `level` is for the arithmetic generator.

    With `samples` above 1 each problem is also answered so many times at temperature 1, and `pass_at` says for which
    numbers of tries the chance of at least one right answer is estimated (arXiv 2107.03374).
    """

    num_problems: PositiveInt = 200
    level: PositiveInt = 1
    max_new_tokens: PositiveInt = 160
    samples: PositiveInt = 1
    pass_at: Annotated[list[PositiveInt], Field(min_length=1)] = [1]  # noqa: RUF012  # pydantic copies it
    checker: str | None = None  # what judges an answer, as in [rl] rewards; None: the final answer is the expected one
    data: DataSettings | None = None  # what to ask from; None: the other split of what was trained on last

    @model_validator(mode="after")
    def _enough_samples(self) -> EvaluateSettings:
        if max(self.pass_at) > self.samples:
            raise ValueError(
                f"pass_at={self.pass_at} needs {max(self.pass_at)} answers to a problem, and samples={self.samples}; "
                "raise samples (twice as many make the estimate much steadier)"
            )
        return self


class HandoffSettings(Settings):
    """`[handoff]`: the form of the files that leave."""

    target: Literal["hf", "fp8", "w8a8"] = "hf"  # what the native engine serves; others: `crosschip handoff --to`
    dtype: Literal["float32", "bfloat16"] = "float32"


class ServeSettings(Settings):
    """`[serve]`: limits of the native engine."""

    max_batch_size: PositiveInt = 16
    max_model_len: PositiveInt | None = None  # tokens, prompt and answer together; None: the model's own limit
