"""Engines over tiny models for the tests, and what is asked of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from crosschip.model import load_model
from crosschip.serve import load_engine
from crosschip.serve.engine.engine import Engine
from crosschip.serve.engine.request import SamplingParams, TokenEvent

# Log-probs of fp32 logits of size ~10: sums of a few hundred products in another order differ by some 1e-6 each.
TOLERANCE = 1e-4


@contextmanager
def running(directory: Path, **options: Any) -> Iterator[Engine]:
    engine = load_engine(directory, **options)
    try:
        yield engine
    finally:
        engine.close()


def made_prompts(count: int, shortest: int = 1, longest: int = 40, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(shortest, longest, (count,), generator=generator).tolist()
    return [torch.randint(3, 300, (size,), generator=generator).tolist() for size in sizes]


def greedy(max_tokens: int, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens, temperature=0.0, num_logprobs=2, **more)


def ids_of(events: list[TokenEvent]) -> list[int]:
    return [event.token_id for event in events if event.token_id is not None]


def logprobs_of(events: list[TokenEvent]) -> list[float]:
    return [event.score.logprob for event in events if event.score is not None]


class Forward:
    """Teacher-forced log-probs by the training model's own forward pass: another implementation of the model."""

    def __init__(self, directory: Path) -> None:
        self._model = load_model(directory)

    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """[tokens, vocabulary]."""
        with torch.no_grad():
            return torch.log_softmax(self._model.forward(torch.tensor([ids]))[0].double(), -1)

    def assert_greedy(self, prompt: list[int], events: list[TokenEvent]) -> None:
        """Each token is the model's best one, or as good within the tolerance, and its log-prob is the model's."""
        ids = ids_of(events)
        assert ids
        expected = self.logprobs(prompt + ids)[len(prompt) - 1 : -1]
        own = expected.gather(1, torch.tensor(ids)[:, None]).squeeze(1)
        assert (own >= expected.max(-1).values - TOLERANCE).all()
        assert torch.allclose(own, torch.tensor(logprobs_of(events), dtype=torch.float64), atol=TOLERANCE, rtol=0)
