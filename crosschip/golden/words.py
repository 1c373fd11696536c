"""A replay in words, for a terminal. No torch, no files."""

from __future__ import annotations

from collections.abc import Iterator

from crosschip.golden.comparison import Comparison, View
from crosschip.golden.judge import Judgement

__all__ = ["replay_lines"]

_MOST_FINDINGS = 8


def replay_lines(comparison: Comparison, judgement: Judgement) -> Iterator[str]:
    """The verdict, its cause, the numbers of each view against their limits, the findings, what was not covered."""
    limit = comparison.limit
    yield f"{judgement.verdict}: {comparison.engine}, {comparison.dtype}, target {limit.target}"
    if judgement.diagnosis.cause != "none":
        yield f"cause: {judgement.diagnosis.cause} ({judgement.diagnosis.subject})"
        yield f"  {judgement.diagnosis.words}"
    yield f"limit: mean KL {limit.mean_kl:.2e} nats ({limit.source})"
    for view in comparison.views:
        yield from _of_view(view)
    if comparison.transformers is not None:
        yield from _of_view(comparison.transformers)
    if comparison.curve is not None:
        curve = comparison.curve
        yield f"training curve: loss within {curve.loss:.2%}, gradient norm within {curve.gradient_norm:.2%}"
    for finding in judgement.findings[:_MOST_FINDINGS]:
        yield f"{finding['verdict']}: {finding['check']}: {finding['message']}"
    if len(judgement.findings) > _MOST_FINDINGS:
        yield f"... and {len(judgement.findings) - _MOST_FINDINGS} more findings"
    for line in judgement.not_covered:
        yield f"not covered: {line}"


def _of_view(view: View) -> Iterator[str]:
    bound = f"(upper 95 % bound {view.kl.upper_95:.2e}) over {view.kl.num_positions} positions"
    yield f"{view.name}: mean KL {view.kl.mean:.2e} {bound}"
    yield (
        f"  largest log-prob difference {view.largest_logprob_difference:.2e}, mean probability shift "
        f"{view.probability_shift.mean:+.1e}, same first token {view.top1:.2%} ({view.top1_weighted:.2%} by margin)"
    )
    if view.points:
        first = view.first_diverging
        yield (
            f"  first diverging point: {first.point if first else 'none'}; {view.num_flips} router choices fell "
            f"otherwise, {view.unexplained_flips} of them with a margin beyond rounding"
        )
        if view.worst_flip:
            yield f"  the one with the largest margin: {view.worst_flip}"
