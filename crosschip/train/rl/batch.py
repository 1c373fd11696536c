"""A batch of rollouts as tensors. B answers, T positions, L layers with experts, K experts per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from crosschip.data import NOT_TRAINED, Batch
from crosschip.recipe import RlSettings
from crosschip.train.rl.advantages import advantages, counts
from crosschip.train.rl.sample import Group, Problem, Sample

__all__ = ["OWN_CHOICE", "RlBatch", "batch_of_groups"]

OWN_CHOICE = -1  # in `routes_BTLK`: the router chooses by itself
_ROUND_UP = 16  # lengths are multiples of it: fewer shapes


@dataclass(frozen=True)
class RlBatch(Batch):
    """Answers behind their prompts, with what the objective needs of each trained label's token.

    `advantage_B` and `weight_B` (of each of an answer's tokens in the mean) are fp32; `behaviour_BT` are the engine's
    log-probs, `old_BT` the trainer's before the first update with this batch (None: the first update is the only one),
    `reference_BT` those of the weights that the stage began with (None: no pull towards them). `engine_B` numbers the
    engines. Nothing but labels that are not `NOT_TRAINED` counts.
    """

    advantage_B: Tensor
    weight_B: Tensor
    behaviour_BT: Tensor
    engine_B: Tensor
    old_BT: Tensor | None = None
    reference_BT: Tensor | None = None
    routes_BTLK: Tensor | None = None

    def __len__(self) -> int:
        return len(self.advantage_B)

    def rows(self, index_B: Tensor) -> RlBatch:
        """Some of the answers, without the positions that none of them needs."""
        labels_BT = self.labels_BT[index_B]
        used = (labels_BT != NOT_TRAINED).any(0).nonzero()
        longest = int(used[-1]) + 1 if len(used) else 1
        width = min(labels_BT.shape[1], -(-longest // _ROUND_UP) * _ROUND_UP)

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[index_B][:, :width]

        return RlBatch(
            self.input_ids_BT[index_B][:, :width],
            labels_BT[:, :width],
            self.advantage_B[index_B],
            self.weight_B[index_B],
            self.behaviour_BT[index_B][:, :width],
            self.engine_B[index_B],
            cut(self.old_BT),
            cut(self.reference_BT),
            cut(self.routes_BTLK),
        )

    def parts(self, num_parts: int) -> list[Batch]:
        """Parts of answers of like length, each only as wide as its longest."""
        lengths_B = ((self.labels_BT != NOT_TRAINED) * torch.arange(self.labels_BT.shape[1])).amax(1)
        order_B = lengths_B.argsort(stable=True)
        return [self.rows(index_B) for index_B in order_B.chunk(num_parts)]

    def widened(self, missing: int, pad_id: int) -> RlBatch:
        """The same with so many more positions, which are not trained."""

        def wider(tensor: Tensor | None, value: float = 0.0) -> Tensor | None:
            return None if tensor is None else F.pad(tensor, (0, missing), value=value)

        plain = super().widened(missing, pad_id)
        routes = self.routes_BTLK
        if routes is not None:
            routes = F.pad(routes, (0, 0, 0, 0, 0, missing), value=OWN_CHOICE)
        return replace(
            self,
            input_ids_BT=plain.input_ids_BT,
            labels_BT=plain.labels_BT,
            behaviour_BT=F.pad(self.behaviour_BT, (0, missing)),
            old_BT=wider(self.old_BT),
            reference_BT=wider(self.reference_BT),
            routes_BTLK=routes,
        )


def batch_of_groups(groups: Sequence[Group], engines: Sequence[str], settings: RlSettings, pad_id: int) -> RlBatch:
    """All answers of some groups as one batch. Those that are left out have no trained label.

    An answer's first token is predicted from the prompt's last; the last token is never an input.
    """
    rows = [(group.problem, sample) for group in groups for sample in group.samples]
    used_B = np.concatenate([counts(group, settings) for group in groups])
    longest = max(len(problem.prompt_ids) + len(sample.token_ids) for problem, sample in rows) - 1
    shape = len(rows), -(-max(1, longest) // _ROUND_UP) * _ROUND_UP
    inputs = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, NOT_TRAINED, dtype=np.int64)
    behaviour = np.zeros(shape, dtype=np.float32)
    for row, (problem, sample) in enumerate(rows):
        tokens, begin = problem.prompt_ids + sample.token_ids, len(problem.prompt_ids) - 1
        inputs[row, : len(tokens) - 1] = tokens[:-1]
        if used_B[row]:
            labels[row, begin : len(tokens) - 1] = sample.token_ids
            behaviour[row, begin : len(tokens) - 1] = sample.logprobs
    numbers = {name: number for number, name in enumerate(engines)}
    return RlBatch(
        torch.from_numpy(inputs),
        torch.from_numpy(labels),
        torch.from_numpy(np.concatenate([advantages(group, settings) for group in groups])),
        torch.from_numpy(_weights([sample for _, sample in rows], used_B, settings)),
        torch.from_numpy(behaviour),
        torch.tensor([numbers[sample.engine] for _, sample in rows]),
        routes_BTLK=_routes(rows, shape) if settings.rollouts.replay_routes else None,
    )


def _weights(samples: Sequence[Sample], used_B: np.ndarray, settings: RlSettings) -> np.ndarray:
    """What a token of each answer counts, such that all tokens together count as many as they are."""
    if settings.average == "token" or not used_B.any():
        return np.ones(len(samples), dtype=np.float32)
    lengths_B = np.array([max(1, len(sample.token_ids)) for sample in samples], dtype=np.float32)
    per_answer = np.float32(lengths_B[used_B].mean())
    weights_B: np.ndarray = per_answer / lengths_B
    return weights_B


def _routes(rows: Sequence[tuple[Problem, Sample]], shape: tuple[int, int]) -> Tensor | None:
    """The engines' experts; a row whose engine does not tell them chooses by itself."""
    known = [sample.routes for _, sample in rows if sample.routes is not None]
    if not known:
        return None
    routes = np.full((*shape, *known[0].shape[1:]), OWN_CHOICE, dtype=np.int16)
    for row, (_, sample) in enumerate(rows):
        if sample.routes is not None:
            routes[row, : len(sample.routes)] = sample.routes
    return torch.from_numpy(routes)
