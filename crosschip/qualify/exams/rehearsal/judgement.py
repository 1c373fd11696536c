"""What a rehearsal's numbers say: coupled steps and loss curves of the chip beside those of honest controls.

Every limit is relative to what honest implementations of the same dtype do, or the margin stated for the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from crosschip.qualify.exams.rehearsal.coupled_steps import TOGETHER, StepComparison
from crosschip.qualify.judging.judge import ILL_CONDITIONED, RATIO_LIMIT, benjamini_hochberg
from crosschip.qualify.judging.training_equivalence import (
    LOSS_MARGIN,
    Equivalence,
    MeanBound,
    equivalence,
    loss_scale,
    mean_bound,
    smoothed_final,
)

__all__ = [
    "FALSE_DISCOVERY_RATE",
    "LEAST_ERROR",
    "PUBLISHED",
    "Coupled",
    "Evidence",
    "HonestComparison",
    "beside_honest",
    "judge_coupled",
    "judge_curves",
    "judge_gates",
]

PUBLISHED = {"msprobe: mean relative loss difference": 0.01, "verl and OpenRLHF on NPU: loss difference": 0.02}

FALSE_DISCOVERY_RATE = 0.01  # a rehearsal has some hundred tests and should not cry wolf in one of twenty runs
# Errors of a gradient below this count as this much: a sixteenth of one rounding of bf16, in which models are trained.
# How well a chip rounds fp32 beyond that is for the exam of operators to say; training does not notice.
LEAST_ERROR = 2.0**-13
# The optimizer computes in fp32 from equal gradients. Beyond the rounding of the weights themselves, an update off by
# more than this is no rounding: it is a quarter of one of bf16, and thousands of fp32's.
_LEAST_UPDATE_ERROR = 2.0**-10


@dataclass(frozen=True)
class Evidence:
    """One way in which training on the chip leaves the reference; `seed` and `step` are where to look closer."""

    check: str
    subject: str
    message: str
    measured: float | str
    limit: float | str
    limit_source: str
    severity: float
    seed: int
    step: int


@dataclass(frozen=True)
class Coupled:
    """One coupled step on the chip, and on the controls; `plain` is the CPU in the chip's dtype, if not fp32."""

    seed: int
    chip: StepComparison
    noisy: StepComparison
    plain: StepComparison | None = None

    @property
    def controls(self) -> list[StepComparison]:
        """The honest implementations."""
        return [self.noisy] if self.plain is None else [self.plain, self.noisy]


@dataclass
class Judgement:
    """Evidence against the chip, numbers for pages, tensors about which nothing can be said, and tests made."""

    evidence: list[Evidence] = field(default_factory=list)
    tensors: list[dict[str, Any]] = field(default_factory=list)
    ill_conditioned: list[str] = field(default_factory=list)
    num_tests: int = 0


@dataclass(frozen=True)
class HonestComparison:
    """Errors and scales of the chip over draws beside those of honest controls.

    `ratio` bounds the mean log ratio of the errors, `scale` the mean of the scale beyond the plain control's, whose
    limit is the margin stated for the loss and what rounding alone does; `worst` is the draw with the largest ratio.
    """

    ratio: MeanBound
    scale: MeanBound
    worst: int

    @property
    def times(self) -> float:
        """How many times an honest error the chip's is."""
        return math.exp(self.ratio.mean)


def beside_honest(
    errors: Sequence[float],
    honest_errors: Sequence[float],
    scales: Sequence[float],
    plain_scales: Sequence[float],
    noisy_scales: Sequence[float],
) -> HonestComparison:
    """Compare draw by draw; `plain_scales` are 0 where the chip computes in fp32."""
    ratios = [
        math.log(max(mine, LEAST_ERROR) / max(honest, LEAST_ERROR))
        for mine, honest in zip(errors, honest_errors, strict=True)
    ]
    noise = abs(sum(noisy - plain for noisy, plain in zip(noisy_scales, plain_scales, strict=True)))
    beyond = [mine - plain for mine, plain in zip(scales, plain_scales, strict=True)]
    return HonestComparison(
        mean_bound(ratios, math.log(RATIO_LIMIT)),
        mean_bound(beyond, LOSS_MARGIN + noise / len(ratios), two_sided=True),
        max(range(len(ratios)), key=lambda place: ratios[place]),
    )


def judge_gates(coupled: Coupled) -> list[Evidence]:
    """What needs no statistics: NaN, a gradient of zeros, weights that stand still, an update unlike its gradient."""
    seed, step = coupled.seed, coupled.chip
    at = f"seed {seed}, step {step.index}"
    found = []
    if not (math.isfinite(step.measure.loss) and math.isfinite(step.measure.gradient_norm)) or step.not_finite:
        where = f"; not finite: the gradient of {', '.join(step.not_finite[:3])}" if step.not_finite else ""
        message = f"{at}: loss {step.measure.loss}, gradient norm {step.measure.gradient_norm}{where}"
        found.append(
            _gate(
                "finite",
                f"loss at step {step.index}",
                message,
                "not finite",
                "finite numbers, as on the CPU",
                seed,
                step.index,
            )
        )
    if step.zero:
        message = f"{at}: all zero on the chip and not on the CPU: the gradient of {', '.join(step.zero[:3])}"
        found.append(
            _gate("zero_gradient", f"gradient of {step.zero[0]}", message, 0.0, "a gradient", seed, step.index)
        )
    if step.unmoved:
        message = f"{at}: no weight has changed"
        found.append(_gate("weights_move", "optimizer", message, 0.0, "weights change", seed, step.index))
    return found or _judge_updates(coupled)


def judge_coupled(steps: Sequence[Coupled]) -> Judgement:
    """Error and scale of each parameter's gradient, and the loss, over all coupled steps, against the controls."""
    judgement = Judgement()
    usable = [step for step in steps if step.chip.gradients and not step.chip.not_finite]
    if len(usable) < 2:
        return judgement
    tests: list[tuple[float, Evidence]] = []
    for name in usable[0].chip.gradients:
        draws = [step for step in usable if all(name in each.gradients for each in [step.chip, *step.controls])]
        if len(draws) >= 2:
            tests += _judge_tensor(name, draws, judgement)
    tests += _judge_loss(usable)
    rejected = benjamini_hochberg([p for p, _ in tests], FALSE_DISCOVERY_RATE)
    judgement.evidence = [evidence for (_, evidence), wrong in zip(tests, rejected, strict=True) if wrong]
    judgement.num_tests = len(tests)
    return judgement


def judge_curves(
    chip: Sequence[Sequence[float]], reference: Sequence[Sequence[float]], control: Sequence[Sequence[float]] | None
) -> tuple[Equivalence, Equivalence | None]:
    """TOST of the smoothed final loss, one pair a seed, relative: chip against reference, and chip against control."""
    against_reference = equivalence([_final_difference(*pair) for pair in zip(chip, reference, strict=True)])
    if control is None:
        return against_reference, None
    return against_reference, equivalence([_final_difference(*pair) for pair in zip(chip, control, strict=True)])


def _final_difference(mine: Sequence[float], right: Sequence[float]) -> float:
    """How far one curve's final loss is from another's, after as many steps, relative to the other's `loss_scale`."""
    count = min(len(mine), len(right))
    final = smoothed_final(right[:count])
    return (smoothed_final(mine[:count]) - final) / loss_scale(final, right[:count])


def _gate(
    check: str, subject: str, message: str, measured: float | str, limit: float | str, seed: int, step: int
) -> Evidence:
    return Evidence(check, subject, message, measured, limit, "the CPU in the same step", 1000.0, seed, step)


def _judge_updates(coupled: Coupled) -> list[Evidence]:
    """The optimizer's update from the reference's gradients, the parameter that is farthest off."""
    seed, step = coupled.seed, coupled.chip
    worst: Evidence | None = None
    for name, error in step.updates.items():
        honest = max(step.update_limits[name], *(control.updates.get(name, 0.0) for control in coupled.controls))
        limit = max(RATIO_LIMIT * honest, _LEAST_UPDATE_ERROR)
        if honest > ILL_CONDITIONED or error <= limit or (worst and worst.severity >= error / limit):
            continue
        worst = Evidence(
            check="update",
            subject=f"optimizer, update of {name}",
            message=f"seed {seed}, step {step.index}: from equal gradients the update of {name} is off by {error:.2g}",
            measured=error,
            limit=limit,
            limit_source="the CPU in the same dtype, and the rounding of the weights, relative to the update",
            severity=error / limit,
            seed=seed,
            step=step.index,
        )
    return [worst] if worst else []


def _judge_tensor(name: str, draws: Sequence[Coupled], judgement: Judgement) -> list[tuple[float, Evidence]]:
    chip = [draw.chip.gradients[name] for draw in draws]
    honest = [max(control.gradients[name].error for control in draw.controls) for draw in draws]
    found = beside_honest(
        [mine.error for mine in chip],
        honest,
        [mine.scale for mine in chip],
        [draw.plain.gradients[name].scale if draw.plain else 0.0 for draw in draws],
        [draw.noisy.gradients[name].scale for draw in draws],
    )
    judgement.tensors.append(
        {
            "tensor": name,
            "error": _root_mean_square([mine.error for mine in chip]),
            "control_error": _root_mean_square(honest),
            "error_ratio": found.times,
            "scale": found.scale.mean,
            "cosine": min(mine.cosine for mine in chip),
        }
    )
    if _root_mean_square(honest) > ILL_CONDITIONED:
        judgement.ill_conditioned.append(name)
        return []
    at, what = draws[found.worst], "the gradient" if name == TOGETHER else "the gradient of"
    who = f"{what} of {name}" if name == TOGETHER else f"{what} {name}"
    errs = Evidence(
        check="gradient_error",
        subject=f"gradient of {name}",
        message=f"{who} is off by {judgement.tensors[-1]['error']:.2g} of its size, by "
        f"{judgement.tensors[-1]['control_error']:.2g} in honest implementations (cosine with the reference's down to "
        f"{judgement.tensors[-1]['cosine']:.6f})",
        measured=found.times,
        limit=RATIO_LIMIT,
        limit_source="error ratio to the worst honest control (CPU in the same dtype), or to the least that counts",
        severity=found.times / RATIO_LIMIT,
        seed=at.seed,
        step=at.chip.index,
    )
    biased = Evidence(
        check="gradient_scale",
        subject=f"gradient of {name}",
        message=f"{who} is {1 + found.scale.mean:.4f} times as long as the reference's, in every step alike",
        measured=found.scale.mean,
        limit=found.scale.limit,
        limit_source="the margin stated for the loss, beside the CPU in the same dtype",
        severity=abs(found.scale.mean) / found.scale.limit,
        seed=at.seed,
        step=at.chip.index,
    )
    return [(found.ratio.p, errs), (found.scale.p, biased)]


def _judge_loss(draws: Sequence[Coupled]) -> list[tuple[float, Evidence]]:
    """The loss from equal weights, relative to the reference's `loss_scale`, where all losses are finite."""
    differences, noise, kept = [], [], []
    losses = [draw.chip.reference_loss for draw in draws if math.isfinite(draw.chip.reference_loss)]
    for draw in draws:
        right, mine, noisy = draw.chip.reference_loss, draw.chip.measure.loss, draw.noisy.measure.loss
        plain = right if draw.plain is None else draw.plain.measure.loss
        if all(map(math.isfinite, (right, mine, noisy, plain))):
            scale = loss_scale(right, losses)
            differences.append((mine - plain) / scale)
            noise.append(abs(noisy - plain) / scale)
            kept.append(draw)
    if len(kept) < 2:
        return []
    bound = mean_bound(differences, LOSS_MARGIN + sum(noise) / len(noise), two_sided=True)
    evidence = Evidence(
        check="loss",
        subject="loss",
        message=f"from equal weights the loss is off by {bound.mean:+.2%} beside the reference's",
        measured=bound.mean,
        limit=bound.limit,
        limit_source="the margin stated for the loss and what rounding alone does, beside the CPU in the same dtype",
        severity=abs(bound.mean) / bound.limit,
        seed=kept[-1].seed,
        step=kept[-1].chip.index,
    )
    return [(bound.p, evidence)]


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))
