"""The rehearsal of serving: the logits of a serving step on the chip beside the CPU's, and beside honest controls'.

The weights are trained a little on the CPU first: at random ones attention looks everywhere alike, and a chip may do
so, too, without being noticed. The tokens are given, so one near-tie does not part two devices. Errors are those of
log-probabilities, relative to the spread of the reference's own.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.exams.rehearsal.findings import not_rehearsed, nothing_finite, raised_evidence, report
from crosschip.qualify.exams.rehearsal.judgement import FALSE_DISCOVERY_RATE, Evidence, beside_honest
from crosschip.qualify.exams.rehearsal.lockstep import Replay, lockstep
from crosschip.qualify.exams.rehearsal.module_state import State, copy_state, load_state
from crosschip.qualify.exams.rehearsal.run import ChipRaisedError, on_chip
from crosschip.qualify.finding import Tier
from crosschip.qualify.judging.judge import ILL_CONDITIONED, RATIO_LIMIT, benjamini_hochberg
from crosschip.qualify.judging.rounding_noise import RoundingNoise
from crosschip.qualify.subjects.subject import Workload

__all__ = ["Answer", "compare_answers", "drawn_again", "judge_answers", "rehearse_serving"]

PUBLISHED = {"verl: mean |dp| of rollout against trainer": 0.01, "Qwen3-8B bf16, honest: max |dlogp|": 0.086}
_NUM_SEEDS: dict[Tier, int] = {"smoke": 6, "standard": 16, "soak": 32}
_LEAST_SEEDS = 3
_RESERVE_SHARE = 0.3
_TRAINING_STEPS = 60
_TRAINING_SHARE = 0.25  # of the budget, at most
_WEIGHT_SPREAD = 2.0**-6  # several roundings of bf16, so that they fall otherwise
_CPU = torch.device("cpu")

Drawn = tuple["Answer", list["Answer"], bool]  # the chip's, the controls', whether the first is the CPU in its dtype


@dataclass(frozen=True)
class Answer:
    """How the logits of one serving step differ from the reference's. Natural logarithms.

    `error` is the RMS difference of the log-probabilities over the reference's spread, `scale` how much steeper they
    are, less 1; `lost_margin` is the largest lead of a reference's first choice that is no longer first.
    """

    error: float
    scale: float
    mean_kl: float
    max_difference: float
    mean_probability_difference: float
    top1_agreement: float
    lost_margin: float


def rehearse_serving(context: ExamContext) -> None:
    """Serve with as many seeds as the budget allows; where the chip leaves the CPU, name the operator."""
    weights = _trained_weights(context)
    drawn: list[Drawn] = []
    evidence = _draw(context, weights, drawn)
    if evidence is None:
        return
    context.journal.now("rehearsal, judging")
    context.journal.checked("serving step", len(drawn))
    if len(drawn) >= _LEAST_SEEDS and not evidence:
        evidence = judge_answers(drawn, context.seed)
        _keep(context, drawn)
    elif not evidence:
        context.journal.finding(not_rehearsed(context, f"{_LEAST_SEEDS} seeds of the serving step", critical=True))
    if evidence:
        report(context, evidence, _replay(context, max(evidence, key=lambda each: each.severity).seed, weights))
    else:
        _audit(context, weights)
    context.journal.done("rehearsal")


def _draw(context: ExamContext, weights: State, drawn: list[Drawn]) -> list[Evidence] | None:
    """Serve seed by seed into `drawn`; evidence where a step needs no statistics, None where no more can be said."""
    for seed in range(context.seed, context.seed + _NUM_SEEDS[context.tier]):
        enough = len(drawn) >= _LEAST_SEEDS and context.remaining_s < _RESERVE_SHARE * context.budget_s
        if enough or context.remaining_s < -0.5 * context.budget_s:
            context.journal.not_covered(f"more than {len(drawn)} seeds of the serving step, as the time allowed")
            break
        if f"rehearsal, serving, seed {seed}" in context.skip:
            context.journal.not_covered("serving, after the process died in it")
            return None
        try:
            found = _serve(context, seed, weights)
        except ChipRaisedError as raised:
            return [raised_evidence(raised, "a serving step on the chip")]
        if isinstance(found, Evidence):
            return [found]
        if found is None:
            context.journal.finding(nothing_finite(context, seed))
            context.journal.done("rehearsal")
            return None
        drawn.append(found)
    return []


def compare_answers(logits: torch.Tensor, reference: torch.Tensor) -> Answer:
    """Compare logits [rows, vocabulary] with the reference's, where that has a finite one."""
    if reference.shape[-1] < 2:  # no distribution over a vocabulary: the numbers are compared as they are
        logits, reference = (torch.cat([each, -each], dim=-1) for each in (logits, reference))
    rows = reference.isfinite().any(-1)
    logits, reference = logits[rows].double(), reference[rows].double()
    regular = reference.isfinite()
    mine, right = (each.masked_fill(~regular, -math.inf).log_softmax(-1) for each in (logits, reference))
    spread = _centred(reference, regular)
    difference = (mine - right).masked_fill(~regular, 0.0)
    centred = _centred(difference, regular)
    size = max(float(spread.square().sum()), torch.finfo(torch.float32).tiny)
    top2 = right.topk(2, dim=-1)
    kept = mine.argmax(-1) == top2.indices[:, 0]
    lead = (top2.values[:, 0] - top2.values[:, 1])[~kept]
    return Answer(
        error=math.sqrt(float(centred.square().sum()) / size),
        scale=float((centred * spread).sum()) / size,
        mean_kl=float((right.exp() * -difference).sum(-1).mean()),
        max_difference=float(difference.abs().max()),
        mean_probability_difference=float((mine.exp() - right.exp()).abs().sum(-1).mean()) / 2.0,
        top1_agreement=float(kept.double().mean()),
        lost_margin=float(lead.max()) if lead.numel() else 0.0,
    )


def _centred(values: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Each row less its mean over the places that are kept; 0 at the others."""
    values = values.masked_fill(~kept, 0.0)
    return (values - values.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True)).masked_fill(~kept, 0.0)


def judge_answers(drawn: Sequence[Drawn], first_seed: int) -> list[Evidence]:
    """Error ratio and scale over seeds, against the controls."""
    honest = [max(control.error for control in controls) for _, controls, _ in drawn]
    found = beside_honest(
        [chip.error for chip, _, _ in drawn],
        honest,
        [chip.scale for chip, _, _ in drawn],
        [controls[0].scale if is_plain else 0.0 for _, controls, is_plain in drawn],
        [controls[-1].scale for _, controls, _ in drawn],
    )
    seed, times, scale, limit = first_seed + found.worst, found.times, found.scale, found.scale.limit
    tests = [
        (
            found.ratio.p if max(honest) <= ILL_CONDITIONED else 1.0,
            Evidence(
                check="logits_error",
                subject="logits",
                message=f"log-probabilities err {times:.3g} times as much as honest implementations do",
                measured=times,
                limit=RATIO_LIMIT,
                limit_source="the worst of the honest controls, CPU in the same dtype",
                severity=times / RATIO_LIMIT,
                seed=seed,
                step=0,
            ),
        ),
        (
            scale.p,
            Evidence(
                check="logits_scale",
                subject="logits",
                message=f"log-probabilities are {scale.mean:+.2%} steeper than the reference's, with every seed alike",
                measured=scale.mean,
                limit=limit,
                limit_source="the margin stated for the loss, beside the CPU in the same dtype",
                severity=abs(scale.mean) / limit,
                seed=seed,
                step=0,
            ),
        ),
    ]
    rejected = benjamini_hochberg([p for p, _ in tests], FALSE_DISCOVERY_RATE)
    return [evidence for (_, evidence), wrong in zip(tests, rejected, strict=True) if wrong]


def _trained_weights(context: ExamContext) -> State:
    """The small subject's weights after some steps on the CPU; the first ones where it cannot be trained."""
    workload = context.workload(_CPU, torch.float32, context.seed, small=True)
    weights = copy_state(workload.module)
    for index in range(_TRAINING_STEPS):
        if context.remaining_s < (1.0 - _TRAINING_SHARE) * context.budget_s:
            break
        context.journal.now(f"rehearsal, training for serving on the CPU, step {index}")
        try:
            measure = workload.train_step(index)
        except Exception as error:  # whatever a module raises that was made to be served only
            context.journal.not_covered(f"serving with trained weights: on the CPU training raises {_told(error)}")
            return weights
        if not math.isfinite(measure.loss):
            return weights
    return copy_state(workload.module)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _loaded(context: ExamContext, device: torch.device, dtype: torch.dtype, seed: int, weights: State) -> Workload:
    workload = context.workload(device, dtype, seed, small=True)
    load_state(workload.module, weights | drawn_again(dict(workload.module.named_parameters()), weights, seed))
    return workload


def drawn_again(parameters: Collection[str], weights: State, seed: int) -> State:
    """The parameters among the weights, each number off by about 2 %, another time for each seed.

    The weights are the same for every seed, and so may be the inputs of a subject that was given as a function. Then
    every seed would round alike, and one rounding seen six times would look like a bias.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        name: weights[name] * (1.0 + _WEIGHT_SPREAD * torch.randn(weights[name].shape, generator=generator))
        for name in parameters
        if name in weights and (weights[name].is_floating_point() or weights[name].is_complex())
    }


def _serve(context: ExamContext, seed: int, weights: State) -> Drawn | Evidence | None:
    """One seed on reference, controls and chip; evidence at once when logits are not finite or not the right number.

    None when the reference has no finite logit.
    """
    dtype = getattr(torch, context.trace.compute_dtype)
    build = partial(_loaded, context, seed=seed, weights=weights)
    context.journal.now(f"rehearsal, serving on the CPU, seed {seed}")
    reference = build(_CPU, torch.float32).serve_step()
    if not bool(reference.isfinite().any()):
        return None
    controls = [] if dtype == torch.float32 else [build(_CPU, dtype).serve_step()]
    noisy = build(_CPU, dtype)
    with RoundingNoise(seed):
        controls.append(noisy.serve_step())
    context.journal.now(f"rehearsal, serving, seed {seed}")
    logits = on_chip(seed, 0, lambda: build(context.chip.device, dtype).serve_step())
    context.journal.now(f"rehearsal, comparing, seed {seed}")
    if logits.shape != reference.shape or not _is_as_finite(logits, reference):
        shares = [float((~each.isfinite()).double().mean()) for each in (logits, reference)]
        message = f"seed {seed}: logits of shape {list(logits.shape)}, {shares[0]:.1%} of them not finite"
        limit = f"{list(reference.shape)}, {shares[1]:.1%} not finite and at the same places, as on the CPU"
        return Evidence("finite", "logits", message, "not finite", limit, "the same step on the CPU", 1000.0, seed, 0)
    honest = [compare_answers(each, reference) for each in controls]
    return compare_answers(logits, reference), honest, dtype != torch.float32


def _is_as_finite(logits: torch.Tensor, reference: torch.Tensor) -> bool:
    """Whether NaN and both infinities stand where the reference has them, as a mask puts them there."""
    mine, right = (each.masked_fill(each.isfinite(), 0.0) for each in (logits, reference))
    return bool(((mine == right) | (mine.isnan() & right.isnan())).all())


def _keep(context: ExamContext, drawn: Sequence[Drawn]) -> None:
    def mean(answers: Sequence[Answer]) -> dict[str, float]:
        return {
            name: sum(getattr(each, name) for each in answers) / len(answers) for name in Answer.__dataclass_fields__
        }

    kept: dict[str, Any] = {"chip": mean([chip for chip, _, _ in drawn])}
    kept["noisy_control"] = mean([controls[-1] for _, controls, _ in drawn])
    if drawn[0][2]:
        kept["control"] = mean([controls[0] for _, controls, _ in drawn])
    context.journal.measured(kind="serving", num_seeds=len(drawn), published=PUBLISHED, **kept)


def _audit(context: ExamContext, weights: State) -> None:
    """The logits agree with the CPU's: one step in lockstep, for operators whose error they do not show yet."""
    evidence = Evidence(
        check="operator",
        subject="serving step",
        message=f"in the logits nothing is seen of it, but seed {context.seed} replayed in lockstep shows it",
        measured="wrong",
        limit="as in fp64, up to rounding",
        limit_source="the CPU in the same step",
        severity=1.0,
        seed=context.seed,
        step=0,
    )
    replay = _replay(context, context.seed, weights)
    context.journal.checked("operator call in lockstep", replay.num_compared)
    if replay.divergences:
        report(context, [evidence], replay)
    if not replay.complete:
        context.journal.not_covered("operator calls of a serving step in lockstep, as the time allowed: the last ones")


def _replay(context: ExamContext, seed: int, weights: State) -> Replay:
    title = f"rehearsal, lockstep, serving, seed {seed}"
    if any(each.startswith("rehearsal, lockstep") for each in context.skip):
        return Replay()
    dtype = getattr(torch, context.trace.compute_dtype)
    try:
        workload = on_chip(seed, 0, lambda: _loaded(context, context.chip.device, dtype, seed, weights))
    except ChipRaisedError:
        return Replay()

    def tell(what: str) -> None:
        context.journal.now(f"{title}, {what}")

    return lockstep(
        workload.module, context.chip.device, workload.serve_step, tell, limit_s=max(5.0, context.remaining_s)
    )
