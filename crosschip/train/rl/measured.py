"""What `metrics.jsonl` keeps of rollouts and of the mismatch."""

from __future__ import annotations

import math

from crosschip.train.rl.panel import EngineAgreement
from crosschip.train.rl.rollouts import TakenBatch

__all__ = ["measured_agreement", "measured_rollouts"]


def measured_agreement(agreement: EngineAgreement, prefix: str = "") -> dict[str, float]:
    """How an engine, or all of them, agree with the trainer.

    What is not finite is left out, as no log takes it: log-probs that nobody can have sampled at have a KL of infinity.
    """
    numbers = {
        f"{prefix}mismatch_k3": agreement.k3,
        f"{prefix}mismatch_mean_dp": agreement.mean_dp,
        f"{prefix}mismatch_max_dp": agreement.max_dp,
        f"{prefix}truncated_share": agreement.truncated_share,
        f"{prefix}left_out": agreement.left_out,
    }
    return {name: number for name, number in numbers.items() if math.isfinite(number)}


def measured_rollouts(taken: TakenBatch) -> dict[str, float]:
    """What the log keeps of a batch of rollouts."""
    shares, wall_s = taken.shares, max(taken.shares.wall_s, 1e-9)
    numbers = {
        "answer_tokens": taken.mean_answer_tokens,
        "finished_share": taken.share_finished,
        "closed_share": taken.share_closed,
        "groups_asked": taken.num_asked,
        "groups_without_signal": taken.num_without_signal,
        "groups_stale": taken.num_stale,
        "reward_errors": taken.num_errors,
        "garbage": taken.num_garbage,
        "retried": taken.num_retried,
        "groups_given_back": taken.num_given_back,
        "sampled_tokens": sum(taken.tokens_by_engine.values()),
        "waited_share": shares.waited_s / wall_s,
        "engines_work_share": shares.engines_s / wall_s,
        "both_work_share": shares.both_s / wall_s,
    }
    rewards = {"reward": taken.mean_reward, "judged_reward": taken.mean_judged_reward}
    return {name: reward for name, reward in rewards.items() if reward is not None} | numbers
