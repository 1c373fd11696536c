"""The panel of the mismatch: how the probabilities of each engine agree with those of the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from crosschip.train.rl.objective import Agreement

__all__ = ["EngineAgreement", "panel"]


@dataclass(frozen=True)
class EngineAgreement:
    """An engine's agreement with the trainer over a batch of rollouts.

    `mean_dp` and `max_dp` are differences of a sampled token's probability; `k3` estimates the KL divergence per token
    in nats, from the engine's distribution to the trainer's; `truncated_share` is of tokens, `left_out` of answers.
    """

    engine: str
    num_tokens: int
    mean_dp: float
    max_dp: float
    k3: float
    truncated_share: float
    left_out: int

    def line(self) -> str:
        """The numbers in words."""
        words = (
            f"{self.engine}: KL {self.k3:.2e} nats a token, |dp| {self.mean_dp:.2e} on average and at most "
            f"{self.max_dp:.2e} over {self.num_tokens:,} tokens, {self.truncated_share:.2%} truncated"
        )
        return f"{words}, {self.left_out} answers left out" if self.left_out else words


def panel(heard: Sequence[Agreement], engines: Sequence[str]) -> list[EngineAgreement]:
    """What was heard, summed up for each engine that has tokens in it. One transfer to the host."""
    if not heard:
        return []
    engine_B = torch.cat([agreement.engine_B for agreement in heard]).cpu()
    sums_B6 = torch.cat([agreement.sums_B6 for agreement in heard]).double().cpu()
    found = []
    for number, engine in enumerate(engines):
        rows_B6 = sums_B6[engine_B == number]
        tokens, dp, _, k3, truncated, left_out = rows_B6.sum(0).tolist()
        if tokens:
            largest = float(rows_B6[:, 2].max())
            found.append(
                EngineAgreement(
                    engine, int(tokens), dp / tokens, largest, k3 / tokens, truncated / tokens, int(left_out)
                )
            )
    return found
