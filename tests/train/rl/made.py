"""Problems, samples and groups made up for tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from crosschip.model import ModelConfig
from crosschip.recipe import RlSettings
from crosschip.train.rl.sample import Group, Problem, Sample


def settings(**fields: object) -> RlSettings:
    """`[rl]` with small numbers; `rollouts` takes a dictionary."""
    return RlSettings.model_validate(
        {"steps": 10, "prompts": 2, "samples": 4, "seq_len": 64, "max_new_tokens": 16, **fields}
    )


def small_config(**fields: object) -> ModelConfig:
    """A model of a few thousand parameters with one layer of experts."""
    widths = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 20, "num_hidden_layers": 2}
    heads = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    return ModelConfig(**{"vocab_size": 64, "max_position_embeddings": 64, **widths, **heads, **fields})  # type: ignore[arg-type]


def problem(number: int = 0, prompt_ids: Sequence[int] = (1, 5, 6)) -> Problem:
    return Problem(number, f"question {number}", "7", tuple(prompt_ids))


def sample(
    reward: float | None = 1.0,
    token_ids: Sequence[int] = (7, 8, 2),
    logprobs: Sequence[float] | None = None,
    engine: str = "a",
    finished: bool = True,
    version: int = 0,
    routes: np.ndarray | None = None,
) -> Sample:
    return Sample(
        token_ids=tuple(token_ids),
        logprobs=tuple(logprobs if logprobs is not None else [-1.0] * len(token_ids)),
        versions=(version,) * len(token_ids),
        finished=finished,
        text="text",
        engine=engine,
        chip="cpu",
        reward=reward,
        error=None if reward is not None else "ValueError: no",
        routes=routes,
    )


def group(*rewards: float | None, number: int = 0, **fields: object) -> Group:
    return Group(problem(number), tuple(sample(reward, **fields) for reward in rewards))  # type: ignore[arg-type]
