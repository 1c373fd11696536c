"""One request to the engine: token ids in, token events out. No torch, no text."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["FinishReason", "Request", "SamplingParams", "TokenEvent", "TokenScore"]

_SMALLEST_TEMPERATURE = 1e-5

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends.

    `temperature` 0 is greedy. `top_p` 1 and `top_k` 0 filter nothing. `seed` None draws a fresh one. A token of
    `stop_ids` ends the request and is its last event. `num_logprobs` None asks for no log-probs; k >= 0 asks for the
    chosen token's and the k most likely. `num_prompt_logprobs` asks the same for the prompt, teacher-forced.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | str | None = None
    stop_ids: frozenset[int] = frozenset()
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, without any randomness.

        At temperatures this small nothing else has a chance, and fp32 could no longer divide by them.
        """
        return self.temperature < _SMALLEST_TEMPERATURE or self.top_k == 1


@dataclass(frozen=True, slots=True)
class TokenScore:
    """Natural log-probs at one position: the token's own and the most likely ones, best first."""

    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """What happened to a request in one step. The last event, and only that, has a `finish_reason`.

    `prompt_scores` comes once, before or with the first token: one entry per prompt token, None for the first.
    """

    token_id: int | None = None
    score: TokenScore | None = None
    finish_reason: FinishReason | None = None
    prompt_scores: list[TokenScore | None] | None = None
    error: str | None = None


@dataclass(slots=True, eq=False)
class Request:
    """A request on its way through the engine. `num_computed` counts its positions that are in the cache."""

    prompt_ids: list[int]
    params: SamplingParams
    slot: int = -1
    num_computed: int = 0
    output_ids: list[int] = field(default_factory=list)
    prompt_scores: list[TokenScore | None] = field(default_factory=list)
    uniform: random.Random = field(init=False)

    def __post_init__(self) -> None:
        # One number per token from the request's own generator, made on the CPU: the draw depends neither on the
        # chip nor on what else is in the batch.
        self.uniform = random.Random(self.params.seed)

    @property
    def num_prompt_left(self) -> int:
        """Prompt tokens that are not in the cache yet."""
        return max(0, len(self.prompt_ids) - self.num_computed)

    def finish_reason_after(self, token_id: int) -> FinishReason | None:
        """Why the request ends with this token, which was just appended; None: it goes on."""
        if token_id in self.params.stop_ids:
            return "stop"
        return "length" if len(self.output_ids) >= self.params.max_tokens else None
