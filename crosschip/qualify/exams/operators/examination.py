"""The examination of one operator call: gates first, then draws that are pooled until the judge can decide."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from crosschip.qualify.exams.operators import checks
from crosschip.qualify.exams.operators.case import REFUSED, Case, Raised, keep, made, on_chip, raised
from crosschip.qualify.exams.operators.controls import golden_call
from crosschip.qualify.exams.operators.gates import broken_structure, other_strides
from crosschip.qualify.exams.operators.large_calls import LARGEST_WHOLE, in_parts
from crosschip.qualify.exams.operators.plan import (
    NUM_POOLED,
    PlannedDraw,
    edges,
    integer_draws,
    pooled,
    recorded,
    slopes,
)
from crosschip.qualify.exams.operators.problem import (
    Problem,
    exact_problem,
    problem_of_judgement,
    problem_of_slope,
    structure_problem,
    verdict_details,
)
from crosschip.qualify.exams.operators.random_numbers import ALPHA, compare_distributions
from crosschip.qualify.exams.operators.runs import Comparison, Inputs, Outcome, compare, equal, on_device, wrong_by_bits
from crosschip.qualify.exams.operators.shapes import is_contraction, num_elements
from crosschip.qualify.judging.judge import MIN_OUTPUTS, DrawErrors, Judgement, judge_draws, judge_slope

__all__ = ["examine_call"]

_UNINITIALISED = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize", "empty_permuted")
_ATTENTION = ("scaled_dot_product_attention", "attention_backward")
# Sums whose order depends on chance on many chips, by their documentation.
_UNORDERED = (
    "index_add",
    "scatter_add",
    "index_put",
    "embedding_dense_backward",
    "scatter_reduce",
    "bincount",
    "histc",
)
_LINEAR = ("sum", "cumsum", "index_add", "scatter_add", "embedding_dense_backward", "index_put", "scatter_reduce")
_NUM_REPEATS = 24
_NUM_EDGES = {"smoke": 10, "standard": 24, "soak": 24}
_MOST_REPEATS = {"smoke": 16, "standard": 128, "soak": 128}
_MOST_DRAWS = 4 * NUM_POOLED
_FEW = 1 << 12  # outputs whose golden results cost nothing
_TOO_LARGE = "other numbers than the CPU's, in a call that is too large to be judged whole and cannot be in parts"
_NOT_AGAIN = "the CPU does not make this call again, or values that it writes to one place are left to chance"


def examine_call(case: Case) -> Problem | None:
    """Examine a call; the first problem that is sure, or None. What was measured goes to the journal."""
    if _draws_numbers(case):
        return _examine_random(case)
    first = recorded(case.call, case.seed)
    problem = _first_problem(case, first)
    if problem is not None or case.base in _UNINITIALISED:
        return problem
    return _integer_problem(case) or _small_problem(case)


def _first_problem(case: Case, draw: PlannedDraw) -> Problem | None:
    """The call as recorded: its form, where NaN and Inf stand, and its values; of a large call in parts."""
    both = made(case, draw)
    if both is None:
        case.context.journal.not_covered(f"{case.call.title}: {_NOT_AGAIN}")
        return None
    inputs, eager = both
    try:
        chip = on_chip(case, inputs)
    except Raised as error:
        return raised(str(error), draw)
    case.context.journal.checked("structure")
    broken = broken_structure(case.op, inputs, chip, eager)
    if broken:
        return structure_problem(broken, draw)
    if case.base in _UNINITIALISED:
        return None
    strides = other_strides(chip, eager)
    if strides:
        source = "dense results may lie in any order"
        case.limit = Problem("strides", strides, strides, "as on the CPU", source, draw, kind="software")
    if equal(chip, eager):
        return None
    wrong = wrong_by_bits(case.op, inputs, chip, eager)
    if wrong:
        source = "what moves or chooses values, and whole numbers and truth values, have no rounding"
        return exact_problem("exact results", f"{wrong[0]} ({draw.label})", draw, source)
    if is_contraction(case.call.operator) or case.base in _ATTENTION:
        return None
    if num_elements(draw.encoded) > LARGEST_WHOLE:
        return _problem_in_parts(case, draw, (inputs, chip, eager))
    return keep(case, draw, [(inputs, chip, eager)], case.draws if case.is_first else {})


def _problem_in_parts(case: Case, draw: PlannedDraw, sides: tuple[Inputs, Outcome, Outcome]) -> Problem | None:
    """A call too large to be compared whole. Its parts are judged by themselves, since small draws, in which all is
    well, would outweigh them.
    """
    errors: dict[int, list[DrawErrors]] = {}
    for part in in_parts(case.op, case.call, sides):
        problem = keep(case, draw, [part], errors)
        if problem is not None:
            return problem
        if case.is_over:
            break
    judgement = _worst(errors)
    if judgement is None or judgement.state == "abstain":
        case.context.journal.not_covered(f"{case.call.title}: {_TOO_LARGE}")
        return None
    return problem_of_judgement(judgement, draw) if judgement.state == "fail" else None


def _integer_problem(case: Case) -> Problem | None:
    """Products and sums of integers, which are exact in any order."""
    if case.base not in _LINEAR and not is_contraction(case.call.operator):
        return None
    if any(isinstance(each, float) and not each.is_integer() for each in [*case.call.args, *case.call.kwargs.values()]):
        return None  # a factor that is no whole number
    for draw in integer_draws(case.short, case.dims, case.seed):
        if case.is_over:
            break
        both = made(case, draw)
        if both is None:
            continue
        inputs, eager = both
        try:
            chip = on_chip(case, inputs)
        except Raised as error:
            return raised(str(error), draw)
        case.context.journal.checked("integers")
        wrong = _differs_where_exact(case, inputs, chip, eager)
        if wrong:
            source = "integers below 2^24, of which fp32 holds every partial sum"
            return exact_problem("integers", f"{wrong} ({draw.label})", draw, source)
    return None


def _differs_where_exact(case: Case, inputs: Inputs, chip: Outcome, eager: Outcome) -> str:
    """In words, which outputs differ among those that their dtype holds exactly."""
    if equal(chip, eager):
        return ""
    for number, ((_, got), (_, honest)) in enumerate(zip(chip.outputs, eager.outputs, strict=True)):
        if got.shape != honest.shape or not honest.is_floating_point():
            continue
        # Whole numbers below this are exact as they stand; of larger ones, fp64 tells which the dtype holds.
        exact = honest.abs() < {torch.bfloat16: 2**8, torch.float16: 2**11}.get(honest.dtype, 2**24)
        if honest.numel() <= _FEW:
            golden = golden_call(case.op, inputs.args, inputs.kwargs)[number][1]
            exact |= honest.double() == golden
        different = exact & (got != honest)
        if bool(different.any()):
            place = tuple(different.nonzero()[0].tolist())
            return (
                f"{int(different.sum())} of {got.numel()} integer results are wrong, "
                f"at {list(place)} {got[place].item():g} instead of {honest[place].item():g}"
            )
    return ""


def _small_problem(case: Case) -> Problem | None:
    """Draws made small along free dimensions: exact ones bitwise, others pooled for the judge."""
    # These few are quick, so an operator's first call gets them even if its recorded size took all of its time.
    problem = _run(case, [replace(draw, repeats=1) for draw in _pooled(case, 1, 3)], even_late=case.is_first)
    if problem is not None:
        return problem
    case.is_exact = all(draw.exact for draws in case.draws.values() for draw in draws)
    if case.is_first:
        most = _NUM_EDGES[case.context.tier]
        problem = _run(case, edges(case.short, case.dims, case.seed, most)) or _restless(case)
    if problem is not None or case.is_exact:
        return problem
    problem = _run(case, _pooled(case, 4, NUM_POOLED), until_enough=True) or _judged(case)
    number = NUM_POOLED
    while problem is None and _is_open(case) and number < _MOST_DRAWS and not case.is_over:
        problem = _run(case, _pooled(case, 4 + number, number)) or _judged(case)
        number *= 2
    if problem is None and case.is_first:
        problem = _slope_problem(case)
    _write(case)
    return problem


def _is_open(case: Case) -> bool:
    return case.judgement is not None and case.judgement.state == "open"


def _pooled(case: Case, first: int, number: int) -> Iterable[PlannedDraw]:
    return pooled(case.short, case.dims, first, number, case.seed, _MOST_REPEATS[case.context.tier])


def _run(
    case: Case, draws: Iterable[PlannedDraw], until_enough: bool = False, even_late: bool = False
) -> Problem | None:
    """Make draws within the call's time, all of them or until there are enough for the judge."""
    for draw in draws:
        if (case.is_over and not even_late) or (until_enough and _has_enough(case)):
            return None
        problem = _one(case, draw)
        if problem is not None and _is_beside_the_subject(case, draw, problem):
            case.limit = case.limit or problem
        elif problem is not None:
            return problem
    return None


def _is_beside_the_subject(case: Case, draw: PlannedDraw, problem: Problem) -> bool:
    """Whether a chip refuses a size, or nothing at all, in dimensions that the subject has in one size only. A wrong
    result is a failure there, too: nobody would notice it."""
    changed = draw.other if problem.check == REFUSED else draw.empty
    return bool(changed) and not changed & case.varied


def _has_enough(case: Case) -> bool:
    pools = [[draw for draw in draws if not draw.exact and not draw.ill_conditioned] for draws in case.draws.values()]
    return all(
        len(pool) >= NUM_POOLED and sum(draw.num_outputs for draw in pool) >= MIN_OUTPUTS for pool in pools if pool
    )


def _one(case: Case, draw: PlannedDraw) -> Problem | None:
    """One draw, of one or several calls."""
    sides = []
    for turn in range(draw.repeats):
        once = PlannedDraw(draw.label, draw.encoded, draw.seed + 7919 * turn, 1, draw.size)
        both = made(case, once)
        if both is None:
            return None  # no valid call in these sizes
        inputs, eager = both
        try:
            chip = on_chip(case, inputs)
        except Raised as error:
            return raised(str(error), once)
        broken = broken_structure(case.op, inputs, chip, eager)
        if broken:
            return structure_problem(f"{broken} ({draw.label})", once)
        sides.append((inputs, chip, eager))
        if turn and case.is_over:
            break
    return keep(case, draw, sides, case.draws)


def _judged(case: Case) -> Problem | None:
    """Judge the pooled draws of each output; the worst judgement is the call's."""
    case.judgement = _worst(case.draws)
    if case.judgement is None:
        return None
    case.worst_draw = case.planned.get(case.judgement.worst_draw) or recorded(case.call, case.seed)
    case.context.journal.checked("error ratio", len(case.draws))
    if case.judgement.reason == "slight bias":
        case.limit = case.limit or problem_of_judgement(case.judgement, case.worst_draw)
    return problem_of_judgement(case.judgement, case.worst_draw) if case.judgement.state == "fail" else None


def _worst(draws: dict[int, list[DrawErrors]]) -> Judgement | None:
    """The worst judgement of an output; None where there are no outputs."""
    order = {"fail": 0, "open": 1, "abstain": 2, "pass": 3}
    judgements = [judge_draws(each) for _, each in sorted(draws.items())]
    return min(judgements, key=lambda each: (order[each.state], each.p_value), default=None)


def _slope_problem(case: Case) -> Problem | None:
    """How the error grows with K, for operators that sum over one."""
    errors: list[DrawErrors] = []
    draws = slopes(case.short, case.dims, case.seed)
    for draw in draws:
        both = None if case.is_over else made(case, draw)
        if both is None:
            return None
        inputs, eager = both
        try:
            chip = on_chip(case, inputs)
        except Raised as error:
            return raised(str(error), draw)
        comparison = Comparison()
        compare(case.op, inputs, chip, eager, comparison)
        errors += [error for _, error in comparison.errors(draw)]
    case.slope = judge_slope(errors)
    case.context.journal.checked("slope over K")
    return problem_of_slope(case.slope, draws[-1]) if case.slope is not None and case.slope.fails else None


def _restless(case: Case) -> Problem | None:
    """The same inputs again and again must give the same bits, sums in an order left to chance aside."""
    draw = next(iter(_pooled(case, 2, 1)))
    draw = PlannedDraw("the same again", draw.encoded, draw.seed)
    both = made(case, draw)
    if both is None:
        return None
    first: Outcome | None = None
    for number in range(_NUM_REPEATS):
        if case.is_over:
            break
        try:
            outcome = on_chip(case, both[0])
        except Raised as error:
            return raised(str(error), draw)
        first = first or outcome
        case.context.journal.checked("repetition")
        if equal(first, outcome):
            continue
        message = f"repetition {number} on the same inputs gave other bits"
        source = "one chip, one input, one result"
        problem = Problem(
            "repetition", message, number, "equal bits", source, draw, ((checks.restless, {"times": 200}),), 50.0
        )
        if case.base not in _UNORDERED:
            return problem
        case.limit = case.limit or problem
        break
    return None


def _draws_numbers(case: Case) -> bool:
    """Whether the call's result depends on the seed; operators with dropout may be called without."""
    if torch.Tag.nondeterministic_seeded not in case.op.tags:
        return False
    outcomes = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        outcomes.append(made(case, recorded(case.short, case.seed)))
    first, second = outcomes
    return first is None or second is None or not equal(first[1], second[1])


def _examine_random(case: Case) -> Problem | None:
    """Operators that draw random numbers: the form of their results and the distribution."""
    draw = recorded(case.short, case.seed)
    both = made(case, draw)
    if both is None:
        case.context.journal.not_covered(f"{case.call.title}: {_NOT_AGAIN}")
        return None
    try:
        chip = on_chip(case, both[0])
        broken = broken_structure(case.op, both[0], chip, both[1])
        if broken:
            return structure_problem(broken, draw)
        wrong, numbers = compare_distributions(
            lambda: on_chip(case, both[0]), lambda: on_device(case.op, both[0], torch.device("cpu"))
        )
    except Raised as error:
        return raised(str(error), draw)
    case.context.journal.checked("distribution")
    case.context.journal.measured(operator=case.call.operator, call=case.call.title, **numbers)
    if not wrong:
        return None
    source = f"tests against the CPU's numbers at the level {ALPHA:g}"
    return Problem(
        "distribution", wrong, wrong, "the CPU's distribution", source, draw, (), 10.0, details=dict(numbers)
    )


def _write(case: Case) -> None:
    """Keep the numbers for pages and comparisons."""
    if case.judgement is None:
        return
    numbers = verdict_details(case.judgement)
    case.context.journal.measured(
        operator=case.call.operator,
        call=case.call.title,
        verdict=case.judgement.state,
        reason=case.judgement.reason,
        num_calls=case.num_calls,
        slope=None if case.slope is None else case.slope.value,
        **numbers,
    )
