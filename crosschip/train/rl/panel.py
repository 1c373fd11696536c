"""The panel of the mismatch: how the probabilities of each engine agree with those of the trainer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crosschip.train.group.world import ALONE, World
from crosschip.train.rl.objective import Agreement
from crosschip.train.rl.sample import Group

__all__ = ["EngineAgreement", "older_shares", "over_all", "panel"]

_NUM_COLUMNS = 6  # of `Agreement.sums_B6`
_LARGEST = 2  # the column that holds no sum


@dataclass(frozen=True)
class EngineAgreement:
    """An engine's agreement with the trainer over a batch of rollouts, and the chip that it said it computes on.

    `mean_dp` and `max_dp` are differences of a sampled token's probability; `k3` estimates the KL divergence per token
    in nats, from the engine's distribution to the trainer's; `truncated_share` is of tokens, `left_out` of answers.
    """

    engine: str
    chip: str
    num_tokens: int
    mean_dp: float
    max_dp: float
    k3: float
    truncated_share: float
    left_out: int

    def line(self) -> str:
        """The numbers in words."""
        words = (
            f"{self.engine} (chip {self.chip}): KL {self.k3:.2e} nats a token, |dp| {self.mean_dp:.2e} on average and "
            f"at most {self.max_dp:.2e} over {self.num_tokens:,} tokens, {self.truncated_share:.2%} truncated"
        )
        return f"{words}, {self.left_out} answers left out" if self.left_out else words


def panel(
    heard: Sequence[Agreement],
    engines: Mapping[str, str],
    world: World = ALONE,
    device: torch.device | None = None,
) -> list[EngineAgreement]:
    """What was heard on all ranks, summed up for each engine that has tokens in it; the same on every rank.

    `engines` gives each engine's chip, in the order of their numbers; `device` is where the ranks exchange tensors.
    """
    own_E6 = _by_engine(heard, len(engines))
    of_ranks_RE6 = torch.zeros(world.size, *own_E6.shape, device=device)
    of_ranks_RE6[world.rank] = own_E6.to(of_ranks_RE6)
    of_ranks_RE6 = world.sum(of_ranks_RE6).double().cpu()  # each rank's in its own place: the largest are no sum
    all_E6 = of_ranks_RE6.sum(0)
    all_E6[:, _LARGEST] = of_ranks_RE6[:, :, _LARGEST].amax(0)
    rows = zip(engines.items(), all_E6.tolist(), strict=True)
    return [_agreement(engine, chip, row) for (engine, chip), row in rows if row[0]]


def older_shares(groups: Sequence[Group], version: int) -> dict[str, float]:
    """The share of each engine's tokens that are of weights older than `version`."""
    num_tokens: Counter[str] = Counter()
    num_older: Counter[str] = Counter()
    for group in groups:
        for sample in group.samples:
            num_tokens[sample.engine] += len(sample.versions)
            num_older[sample.engine] += sum(of_token < version for of_token in sample.versions)
    return {engine: num_older[engine] / num for engine, num in num_tokens.items() if num}


def over_all(found: Sequence[EngineAgreement]) -> EngineAgreement:
    """All engines of a batch together, as if they were one."""
    total = sum(each.num_tokens for each in found)

    def mean(name: str) -> float:
        return float(sum(each.num_tokens * getattr(each, name) for each in found) / total)

    return EngineAgreement(
        engine=", ".join(each.engine for each in found),
        chip=", ".join(sorted({each.chip for each in found})),
        num_tokens=total,
        mean_dp=mean("mean_dp"),
        max_dp=max(each.max_dp for each in found),
        k3=mean("k3"),
        truncated_share=mean("truncated_share"),
        left_out=sum(each.left_out for each in found),
    )


def _by_engine(heard: Sequence[Agreement], num_engines: int) -> Tensor:
    """[engines, 6] what this rank heard, on the CPU. One transfer to the host."""
    found_E6 = torch.zeros(num_engines, _NUM_COLUMNS, dtype=torch.float64)
    if not heard:
        return found_E6
    engine_B = torch.cat([agreement.engine_B for agreement in heard]).cpu()
    sums_B6 = torch.cat([agreement.sums_B6 for agreement in heard]).double().cpu()
    found_E6.index_add_(0, engine_B, sums_B6)
    largest_E = torch.zeros(num_engines, dtype=torch.float64)
    largest_E.scatter_reduce_(0, engine_B, sums_B6[:, _LARGEST], "amax")
    found_E6[:, _LARGEST] = largest_E
    return found_E6


def _agreement(engine: str, chip: str, row: Sequence[float]) -> EngineAgreement:
    tokens, dp, largest, k3, truncated, left_out = row
    return EngineAgreement(
        engine, chip, int(tokens), dp / tokens, largest, k3 / tokens, truncated / tokens, int(left_out)
    )
