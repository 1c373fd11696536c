"""The rehearsal: the subject made small, trained or served on the chip beside the CPU, from equal weights and data.

Training: coupled steps (each from the reference's weights) compare loss, gradients and updates, one step at a time,
with honest controls; then chip and CPU train on their own, and their final losses are tested for equivalence over
seeds. Where the chip leaves the reference, a step is replayed in lockstep, which names the operator.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.exams.rehearsal.findings import not_rehearsed, raised_evidence, report
from crosschip.qualify.exams.rehearsal.judgement import PUBLISHED, Evidence, judge_coupled, judge_curves
from crosschip.qualify.exams.rehearsal.lockstep import Replay, lockstep
from crosschip.qualify.exams.rehearsal.module_state import load_state
from crosschip.qualify.exams.rehearsal.run import Arm, ChipRaisedError, SeedRun, on_chip, one_thread
from crosschip.qualify.exams.rehearsal.serving import rehearse_serving
from crosschip.qualify.exams.rehearsal.sharded import SHARDED, rehearse_sharded
from crosschip.qualify.finding import Finding, Tier
from crosschip.qualify.judging.training_equivalence import LOSS_MARGIN, Equivalence, loss_scale

__all__ = ["examine"]

_STEPS = 100
_LEAST_SHARE = 0.25  # of those steps, for a verdict: the warm-up and the steepest part of the curve are behind then
_LEAST_STEPS = 12  # with fewer there is no curve to speak of
_LOCKSTEP = "rehearsal, lockstep"


@dataclass(frozen=True)
class _Size:
    num_seeds: int
    num_coupled: int  # steps of each seed


_SIZES: dict[Tier, _Size] = {"smoke": _Size(3, 5), "standard": _Size(5, 10), "soak": _Size(8, 16)}
_LEAST_SEEDS = 2
_FEW_COUPLED = 4  # fewer coupled steps are no statistics: nothing is said about training then
_RESERVE_SHARE = 0.15  # of the budget: for a replay in lockstep
_LEAST_LOCKSTEP_S = 5.0


@dataclass
class _Training:
    """A rehearsal of training under way."""

    context: ExamContext
    runs: list[SeedRun] = field(default_factory=list)
    evidence: list[Evidence] = field(default_factory=list)
    undecided: Finding | None = None  # about the final loss, unless something wrong is found
    has_seeds: bool = True  # whether the subject's weights and data depend on the seed

    @property
    def reserve_s(self) -> float:
        return _RESERVE_SHARE * self.context.budget_s

    def is_over(self) -> bool:
        return self.context.remaining_s < self.reserve_s

    def is_out_of_time(self) -> bool:
        """Whether even the least that a verdict needs must stay undone: half of the budget again has gone."""
        return self.context.remaining_s < -0.5 * self.context.budget_s

    def deadline(self, num_seeds_left: int) -> Callable[[int], bool]:
        """Whether a run that has taken so many steps must stop: each of the seeds left gets its share of the time."""
        left_s = self.context.remaining_s - self.reserve_s
        if num_seeds_left > 1:
            left_s = (left_s - (num_seeds_left - 1) * self.runs[0].coupling_s) / num_seeds_left
        end = time.monotonic() + left_s
        return lambda num_steps: time.monotonic() > end and (num_steps >= _LEAST_STEPS or self.is_out_of_time())


def examine(context: ExamContext) -> None:
    """Rehearse the role's work on the chip."""
    with one_thread(context.chip):
        if context.role == "serve":
            rehearse_serving(context)
        else:
            _rehearse_training(context)


def _rehearse_training(context: ExamContext) -> None:
    died = sorted(each for each in context.skip if each.startswith("rehearsal, seed"))
    if died:
        _after_death(context, died[-1])
        return
    if SHARDED in (context.only, *context.died_in):  # all else was rehearsed before, or is not asked for
        context.part(SHARDED, lambda: rehearse_sharded(context))
        context.journal.done("rehearsal")
        return
    training = _Training(context)
    try:
        _train(training)
    except ChipRaisedError as raised:
        training.evidence = [raised_evidence(raised, "a train step on the chip")]
    context.journal.checked("coupled step", sum(len(run.coupled) for run in training.runs))
    context.journal.checked("train step", sum(len(run.chip_curve) for run in training.runs))
    if training.evidence:
        worst = max(training.evidence, key=lambda each: each.severity)
        report(context, training.evidence, _replay(training, worst))
    elif not _audit(training) and training.undecided is not None:
        context.journal.finding(training.undecided)
    if not training.evidence:
        context.part(SHARDED, lambda: rehearse_sharded(context))
    context.journal.done("rehearsal")


def _train(training: _Training) -> None:
    """Take all arms, seed by seed; ends early, with evidence, when a step needs no statistics to be wrong."""
    context = training.context
    size, num_steps = _SIZES[context.tier], 0
    num_seeds = size.num_seeds
    while len(training.runs) < num_seeds:
        if training.runs and (training.is_out_of_time() or (len(training.runs) >= _LEAST_SEEDS and training.is_over())):
            break
        run = SeedRun(context, context.seed + len(training.runs))
        training.runs.append(run)
        training.evidence = run.couple(size.num_coupled, training.is_out_of_time)
        if not training.evidence:
            if not num_steps:
                num_seeds, num_steps = _plan(training, run, size)
            training.evidence = run.train(num_steps, training.deadline(num_seeds - len(training.runs) + 1))
        if training.evidence:
            context.journal.not_covered("the rest of the rehearsal: it ended with the step that went wrong")
            return
        if _is_repetition(training):
            training.runs.pop()
            training.has_seeds = False
            context.journal.not_covered("more than one seed: the subject is the same whatever the seed")
            break
    _judge(training)


def _is_repetition(training: _Training) -> bool:
    """Whether the last seed gave the same reference as the first: a subject may have one set of weights and data."""
    if len(training.runs) < 2:
        return False
    last, first = (run.losses("reference") for run in (training.runs[-1], training.runs[0]))
    count = min(len(last), len(first))
    return last[:count] == first[:count]


def _plan(training: _Training, run: SeedRun, size: _Size) -> tuple[int, int]:
    """Seeds and steps that fit: as many seeds as the tier wants if all steps fit, else two with what steps there is."""
    left_s = training.context.remaining_s - training.reserve_s
    for num_seeds in (*range(size.num_seeds, _LEAST_SEEDS, -1), _LEAST_SEEDS):
        steps = int((left_s - (num_seeds - 1) * run.coupling_s) / (num_seeds * run.step_s))
        if steps >= _STEPS or num_seeds == _LEAST_SEEDS:
            break
    return num_seeds, min(_STEPS, max(_LEAST_STEPS, size.num_coupled + 1, steps))


def _judge(training: _Training) -> None:
    context, runs = training.context, training.runs
    judgement = judge_coupled([step for run in runs for step in run.coupled])
    training.evidence += judgement.evidence
    num_coupled = sum(len(run.coupled) for run in runs)
    context.journal.checked("gradient, error and scale", judgement.num_tests)
    worst = sorted(judgement.tensors, key=lambda each: -float(each["error_ratio"]))
    context.journal.measured(kind="gradients", num_steps=num_coupled, tensors=worst[:16])
    if judgement.ill_conditioned:
        names = ", ".join(judgement.ill_conditioned[:6])
        context.journal.not_covered(
            f"the error of the gradient of {names}: honest implementations differ by more than a tenth there"
        )
    _judge_finals(training)
    for run in runs:
        _keep_curves(context, run)
    least = min(len(run.chip_curve) for run in runs)
    planned_seeds = _SIZES[context.tier].num_seeds if training.has_seeds else 1
    context.journal.covered("steps of a rehearsal, and drift after them", least, _STEPS, _LEAST_SHARE)
    context.journal.covered("seeds of the rehearsal", len(runs), planned_seeds, least=0.0)


def _judge_finals(training: _Training) -> None:
    """The final loss by TOST; where equivalence is not shown, the honest control tells what the dtype itself does."""
    context, runs = training.context, [run for run in training.runs if len(run.chip_curve) >= _LEAST_STEPS]
    if len(runs) < _LEAST_SEEDS and not training.has_seeds:
        context.journal.not_covered("equivalence of the final loss, which needs two seeds")
        return
    if len(runs) < _LEAST_SEEDS:
        num_coupled = sum(len(run.coupled) for run in training.runs)
        context.journal.finding(
            not_rehearsed(context, f"two seeds of {_LEAST_STEPS} steps", num_coupled < _FEW_COUPLED)
        )
        return
    chip, reference = [run.losses("chip") for run in runs], [run.losses("reference") for run in runs]
    found, _ = judge_curves(chip, reference, None)
    control: Equivalence | None = None
    if not training.evidence and (found.shown != "equivalent" or context.tier != "smoke"):
        for run in runs:
            run.train_control(training.is_over)
        if min(len(run.control_curve) for run in runs) >= _LEAST_STEPS:
            _, control = judge_curves(chip, reference, [run.losses("control") for run in runs])
    context.journal.checked("final loss, equivalence", 1)
    _keep_equivalence(context, found, control)
    if found.shown == "equivalent":
        return
    last = runs[-1]
    if found.shown == "different" and control is not None and control.shown == "different":
        training.evidence.append(_final_loss_differs(found, last))
    elif not training.evidence:
        training.undecided = _not_shown(context, found, control)


def _keep_equivalence(context: ExamContext, found: Equivalence, control: Equivalence | None) -> None:
    context.journal.measured(
        kind="equivalence",
        mean=found.mean,
        lower=found.lower,
        upper=found.upper,
        margin=found.margin,
        num_seeds=found.num_pairs,
        shown=found.shown,
        against_control=None if control is None else {"mean": control.mean, "shown": control.shown},
        published=PUBLISHED,
    )


def _final_loss_differs(found: Equivalence, run: SeedRun) -> Evidence:
    return Evidence(
        check="final_loss",
        subject="final loss",
        message=f"the final loss differs from the CPU's by {found.mean:+.2%} (90 % interval {found.lower:+.2%} to "
        f"{found.upper:+.2%} over {found.num_pairs} seeds; margin {found.margin:.1%})",
        measured=found.mean,
        limit=found.margin,
        limit_source="the margin stated for the loss",
        severity=abs(found.mean) / found.margin,
        seed=run.seed,
        step=len(run.chip_curve) - 1,
    )


def _not_shown(context: ExamContext, found: Equivalence, control: Equivalence | None) -> Finding:
    beside = "" if control is None else f"; beside the CPU in the chip's dtype {control.mean:+.2%} ({control.shown})"
    return Finding(
        exam=context.exam,
        kind="numerics",
        verdict="PASS WITH LIMITS",
        subject="final loss",
        check="final_loss",
        message=f"with {found.num_pairs} seeds the final loss is shown to be the CPU's to {found.bound:.2%}, not to "
        f"the margin of {found.margin:.1%}; its mean difference is {found.mean:+.2%}{beside}",
        measured=found.bound,
        limit=LOSS_MARGIN,
        limit_source="the margin stated for the loss",
        not_covered="a difference of the final loss that more seeds would show (tier standard)",
        details={"published": PUBLISHED},
    )


def _keep_curves(context: ExamContext, run: SeedRun) -> None:
    """The curves for pages, at most some fifty points."""
    count = len(run.chip_curve)
    every = max(1, -(-count // 50))
    steps = list(range(0, count, every))
    arms: tuple[Arm, ...] = ("reference", "chip", "control")
    curves = {arm: run.losses(arm) for arm in arms}
    if len(curves["control"]) < count:
        curves["control"] = []  # the time was up in the middle of it
    rights = curves["reference"][:count]
    differences = [
        abs(mine - right) / loss_scale(right, rights) for mine, right in zip(curves["chip"], rights, strict=True)
    ]
    context.journal.measured(
        kind="loss curve",
        seed=run.seed,
        steps=steps,
        mean_relative_difference=sum(differences) / max(1, count),
        published=PUBLISHED,
        **{name: [curve[step] for step in steps] for name, curve in curves.items() if curve},
    )
    steps = [step for step in steps if run.reference_curve[step].gradient_norm > 0.0]
    if steps:
        ratios = [run.chip_curve[step].gradient_norm / run.reference_curve[step].gradient_norm for step in steps]
        context.journal.measured(kind="gradient norm ratio", seed=run.seed, steps=steps, chip=ratios)


def _replay(training: _Training, worst: Evidence) -> Replay:
    """Replay the step of the evidence from the reference's weights, unless an earlier try died in doing so."""
    context = training.context
    if any(each.startswith(_LOCKSTEP) for each in context.skip):
        return Replay()
    run = next(each for each in training.runs if each.seed == worst.seed)
    return _lockstep(context, run, worst.step, most_steps=1 if worst.check == "operator" else 3)


def _audit(training: _Training) -> bool:
    """Training agrees with the CPU's: one step in lockstep, for operators whose error training does not show yet.

    True when one was found, and reported.
    """
    context, run = training.context, training.runs[-1]
    step = run.references[-1].index
    evidence = Evidence(
        check="operator",
        subject="train step",
        message=f"in training nothing is seen of it, but seed {run.seed}, step {step} replayed in lockstep shows it",
        measured="wrong",
        limit="as in fp64, up to rounding",
        limit_source="the CPU in the same step",
        severity=1.0,
        seed=run.seed,
        step=step,
    )
    if training.is_out_of_time():
        context.journal.not_covered("operator calls of a train step in lockstep: there was no time")
        return False
    replay = _replay(training, evidence)
    context.journal.checked("operator call in lockstep", replay.num_compared)
    if replay.divergences:
        report(context, [evidence], replay)
    if not replay.complete:
        context.journal.not_covered("operator calls of a train step in lockstep, as the time allowed: the last ones")
    return bool(replay.divergences)


def _lockstep(context: ExamContext, run: SeedRun, step: int, most_steps: int) -> Replay:
    """Replay a step, and others after it while nothing is found: a fault may come and go."""
    limit_s = max(_LEAST_LOCKSTEP_S, context.remaining_s)
    deadline = time.monotonic() + limit_s
    tell = partial(_tell, context, f"{_LOCKSTEP}, seed {run.seed}, step {step}")
    replay = Replay()
    try:
        build = partial(context.workload, context.chip.device, run.dtype, run.seed, small=True)
        workload = on_chip(run.seed, step, build)
        state = run.state_before(step)
        on_chip(run.seed, step, lambda: load_state(workload.module, state))
    except ChipRaisedError:
        return replay
    for index in (step, step + 1, step + 2)[:most_steps]:
        left_s = deadline - time.monotonic()
        if left_s < 0.0:
            break
        one = partial(workload.train_step, index)
        replay = lockstep(workload.module, context.chip.device, one, tell, left_s)
        if replay.divergences or replay.error is not None:
            break
    return replay


def _tell(context: ExamContext, title: str, what: str) -> None:
    context.journal.now(f"{title}, {what}")


def _after_death(context: ExamContext, died_in: str) -> None:
    """An earlier try died in a step: replay it call by call, so that the journal names the one that it dies in."""
    context.journal.not_covered(f"the rehearsal, after the process died in: {died_in}")
    seed, step = _place(died_in)
    if any(each.startswith(_LOCKSTEP) for each in context.skip):
        return
    run = SeedRun(context, seed)
    run.take_reference_to(step)
    replay = _lockstep(context, run, step, most_steps=3)
    context.journal.checked("replay in lockstep", 1)
    if replay.divergences or replay.error is not None:
        raised = ChipRaisedError(seed, step)
        raised.__cause__ = replay.error
        report(context, [raised_evidence(raised, "a train step on the chip")], replay)
    context.journal.done(_LOCKSTEP)


def _place(died_in: str) -> tuple[int, int]:
    """Seed and step from a journal's line such as `rehearsal, seed 1, training on the chip, step 20`."""
    words = died_in.split()
    seed = int(words[words.index("seed") + 1].rstrip(","))
    return seed, int(words[-1]) if "step" in words else 0
