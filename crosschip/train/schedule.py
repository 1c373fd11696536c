"""The learning rate of every step: warm-up and cosine, or warm-up, stable, decay. Pure functions, no torch."""

from __future__ import annotations

import math

from crosschip.recipe import StageSettings

__all__ = ["learning_rate_at"]


def learning_rate_at(step: int, stage: StageSettings) -> float:
    """The learning rate of the update that ends step `step`, counted from 1 to `stage.steps`.

    It rises linearly and reaches `learning_rate` at `warmup_steps`, and is `final_learning_rate_share` of it at the
    last step. `cosine` falls all the way between (Loshchilov & Hutter 2017); `wsd` stays and falls linearly over the
    last `decay_share` of the steps (Hu et al. 2024, MiniCPM).
    """
    assert 1 <= step <= stage.steps, f"step {step} outside 1..{stage.steps}"
    if step <= stage.warmup_steps:
        return stage.learning_rate * step / stage.warmup_steps
    share = _cosine_share(step, stage) if stage.schedule == "cosine" else _wsd_share(step, stage)
    return stage.learning_rate * share


def _cosine_share(step: int, stage: StageSettings) -> float:
    progress = (step - stage.warmup_steps) / (stage.steps - stage.warmup_steps)
    final = stage.final_learning_rate_share
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def _wsd_share(step: int, stage: StageSettings) -> float:
    decay_steps = min(round(stage.decay_share * stage.steps), stage.steps - stage.warmup_steps)
    into_decay = step - (stage.steps - decay_steps)
    if into_decay <= 0:
        return 1.0
    return 1.0 - (1.0 - stage.final_learning_rate_share) * into_decay / decay_steps
