"""One request to the engine: token ids in, token events out. No torch, no text."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Constraint", "EndedBy", "FinishReason", "Request", "SamplingParams", "TokenEvent", "TokenScore"]

_SMALLEST_TEMPERATURE = 1e-5

FinishReason = Literal["stop", "length", "abort", "error"]
EndedBy = Literal["server_ended", "weights_replaced"]


class Constraint(Protocol):
    """What an answer must look like, asked for each of its tokens."""

    def allowed(self, output_ids: Sequence[int]) -> Any:
        """A NumPy array of booleans, [vocab_size]: which tokens may follow the answer so far; None: all of them."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends.

    `temperature` 0 is greedy. `top_p` 1 and `top_k` 0 filter nothing. `seed` None draws a fresh one. A token of
    `stop_ids` ends the request and is its last event. `num_logprobs` None asks for no log-probs; k >= 0 asks for the
    chosen token's and the k most likely. `num_prompt_logprobs` asks the same for the prompt, teacher-forced. `min_p`
    leaves out tokens less likely than this share of the likeliest one. `repetition_penalty` divides positive and
    multiplies negative logits of what stands in prompt or answer (arXiv 1909.05858); `presence_penalty` is taken off
    once, and `frequency_penalty` as often as the token stands in the answer (OpenAI's). `logit_bias` holds pairs of
    token id and what is added. `constraint` belongs to one request alone and leaves out what it does not allow.
    Log-probs are the model's own, before any of these, or with `scores_as_drawn` those at the request's temperature:
    of the distribution that the token was drawn from. `wants_routes` asks for the experts that each token took.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | str | None = None
    stop_ids: frozenset[int] = frozenset()
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    constraint: Constraint | None = None
    wants_routes: bool = False
    scores_as_drawn: bool = False

    @property
    def adjusts_logits(self) -> bool:
        """Whether the logits are changed before a token is chosen."""
        penalties = (self.repetition_penalty - 1.0, self.presence_penalty, self.frequency_penalty)
        return bool(self.logit_bias) or any(penalties) or self.constraint is not None

    @property
    def is_filtered(self) -> bool:
        """Whether unlikely tokens are left out before one is drawn."""
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0

    @property
    def mixes_scores(self) -> bool:
        """Whether log-probs as drawn are asked for that are not those of a temperature alone: nobody computes them."""
        beside = self.is_filtered or self.adjusts_logits or self.num_prompt_logprobs is not None
        return self.scores_as_drawn and beside

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

    @property
    def is_finite(self) -> bool:
        """Whether the logits were numbers: a NaN or an infinite one makes the token's own log-prob none."""
        return math.isfinite(self.logprob)


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """What happened to a request in one step. The last event, and only that, has a `finish_reason`.

    `prompt_scores` comes once, before or with the first token: one entry per prompt token, None for the first.
    `routes` comes with the last one where it was asked for: the experts that the token at each computed position took,
    [positions, layers with experts, experts per token]. The last sampled token was never computed: of a prompt of P
    tokens and an answer of A > 0 these are P + A - 1 positions. `ended_by` says why the engine itself ended a request
    that may be asked again.
    """

    token_id: int | None = None
    score: TokenScore | None = None
    finish_reason: FinishReason | None = None
    prompt_scores: list[TokenScore | None] | None = None
    error: str | None = None
    routes: NDArray[Any] | None = None
    ended_by: EndedBy | None = None


@dataclass(slots=True, eq=False)
class Request:
    """A request on its way through the engine. `num_computed` counts its positions that are in the cache.

    `blocks` are the cache's blocks that it holds, `digests` the names of the full ones' contents. `prefill_end` is how
    many of its tokens are computed before the next is chosen: its prompt, and after a preemption its answer so far,
    too. `copy_from` is a block whose content its last block begins with. `siblings` want other answers to the same
    prompt and wait for it to be computed. `weights_version` names the weights it was begun on.
    """

    prompt_ids: list[int]
    params: SamplingParams
    slot: int = -1
    num_computed: int = 0
    output_ids: list[int] = field(default_factory=list)
    prompt_scores: list[TokenScore | None] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    prefill_end: int = field(init=False)
    copy_from: int | None = None
    siblings: list[Request] = field(default_factory=list)
    weights_version: str | None = None
    uniform: random.Random = field(init=False)

    def __post_init__(self) -> None:
        # One number per token from the request's own generator, made on the CPU: the draw depends neither on the
        # chip nor on what else is in the batch.
        self.uniform = random.Random(self.params.seed)
        self.prefill_end = len(self.prompt_ids)

    @property
    def num_prefill_left(self) -> int:
        """Tokens that are not in the cache yet and must be before the next token is chosen."""
        return max(0, self.prefill_end - self.num_computed)

    @property
    def next_input(self) -> int:
        """The first token that is not in the cache."""
        num_prompt = len(self.prompt_ids)
        at = self.num_computed
        return self.prompt_ids[at] if at < num_prompt else self.output_ids[at - num_prompt]

    @property
    def wants_prompt_scores(self) -> bool:
        """Whether the prompt's log-probs are asked for and not there yet."""
        return self.params.num_prompt_logprobs is not None and len(self.prompt_scores) < len(self.prompt_ids)

    def token_ids(self, start: int, end: int) -> list[int]:
        """The tokens at these positions of prompt and answer."""
        num_prompt = len(self.prompt_ids)
        if end <= num_prompt:
            return self.prompt_ids[start:end]
        return self.prompt_ids[start:] + self.output_ids[max(0, start - num_prompt) : end - num_prompt]

    def finish_reason_after(self, token_id: int) -> FinishReason | None:
        """Why the request ends with this token, which was just appended; None: it goes on."""
        if token_id in self.params.stop_ids:
            return "stop"
        return "length" if len(self.output_ids) >= self.params.max_tokens else None
