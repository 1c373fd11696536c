"""The overwrite check: after new weights were put over old ones, a running engine must be the engine of the new ones.

Engines were seen to keep a transposed copy of the old weights, or to transpose the new ones once too often
(vllm-ascend#5747, #11548). Both the small probe, which each update must pass, and the check against an engine that was
started cold compare log-probs bit for bit: the same arithmetic over the same weights has no reason to differ. No torch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from crosschip.serve.engine.blocks import BLOCK_TOKENS
from crosschip.serve.engine.chosen import ChosenToken
from crosschip.serve.engine.request import Request, SamplingParams, TokenScore
from crosschip.serve.engine.scheduler import PrefillChunk, Step

if TYPE_CHECKING:
    from crosschip.serve.engine.engine import Engine

__all__ = ["Overwritten", "check_overwrite", "probe_scores"]

_PROBE_TOKENS = 24  # fewer than a block, so that one block is enough for the probe and what it decodes


class _Runs(Protocol):
    def run(self, step: Step) -> Sequence[ChosenToken]: ...


@dataclass(frozen=True)
class Overwritten:
    """What the check found: log-probs that were compared, how many differ, and by how much at most (nats)."""

    num_compared: int
    num_different: int
    greatest_difference: float

    @property
    def passed(self) -> bool:
        """Whether every log-prob has the same bits, and the same tokens were the likeliest."""
        return self.num_compared > 0 and self.num_different == 0


def probe_scores(runner: _Runs, vocab_size: int) -> list[TokenScore | None]:
    """Log-probs of a made prompt and two decoded tokens, by a runner that has nothing else to do: block 0 is used."""
    draw = random.Random(0)
    ids = [draw.randrange(vocab_size) for _ in range(min(_PROBE_TOKENS, BLOCK_TOKENS - 2))]
    params = SamplingParams(max_tokens=2, temperature=0.0, num_logprobs=4, num_prompt_logprobs=4)
    request = Request(ids, params, slot=0, blocks=[0])
    step = Step([[PrefillChunk(request, 0, len(ids))]], ())
    scores = []
    for _ in range(2):
        (choice,) = runner.run(step)
        scores.append(choice.score)
        request.num_computed = len(ids) + len(request.output_ids)
        request.output_ids.append(choice.token_id)
        step = Step([], (request,))
    return request.prompt_scores + scores


def check_overwrite(
    live: Engine, cold: Engine, prompts: Sequence[list[int]] | None = None, max_tokens: int = 8
) -> Overwritten:
    """Compare an engine whose weights were replaced with one that was started on the new ones, by greedy answers and
    teacher-forced prompts. The prompts are asked one after the other, so that both compute the same calls.
    """
    pairs: list[tuple[TokenScore | None, TokenScore | None]] = []
    for prompt in prompts or _made_prompts(live.info.vocab_size, live.info.max_model_len - max_tokens):
        sides = [_scores(engine, prompt, max_tokens) for engine in (live, cold)]
        pairs += zip(*sides, strict=True)
    compared = [(ours, theirs) for ours, theirs in pairs if ours is not None and theirs is not None]
    different = [(ours, theirs) for ours, theirs in compared if ours != theirs]
    greatest = max((abs(ours.logprob - theirs.logprob) for ours, theirs in different), default=0.0)
    return Overwritten(len(compared), len(different), greatest)


def _scores(engine: Engine, prompt: list[int], max_tokens: int) -> list[TokenScore | None]:
    params = SamplingParams(max_tokens, temperature=0.0, num_logprobs=4, num_prompt_logprobs=4)
    prompt_scores: list[TokenScore | None] = []
    scores: list[TokenScore | None] = []
    for event in engine.submit(prompt, params):
        prompt_scores = event.prompt_scores or prompt_scores
        if event.token_id is not None:
            scores.append(event.score)
    return prompt_scores + scores


def _made_prompts(vocab_size: int, longest: int) -> list[list[int]]:
    draw = random.Random(1)
    sizes = [size for size in (1, BLOCK_TOKENS - 1, BLOCK_TOKENS + 1, 100) if size <= longest]
    return [[draw.randrange(vocab_size) for _ in range(size)] for size in sizes]
