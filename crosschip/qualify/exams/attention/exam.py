"""Attention: masks of every shape, lengths, head sizes, layouts, gradients, fused and as a chain of plain operators.

Cases with poisoned hidden positions have a right answer that leaves no room for statistics. Where the same is asked of
gradients, errors are held against those of honest implementations. The error of plain calls is judged as that of any
operator.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from crosschip.qualify.exams.attention.answers import Question, ask_all, report
from crosschip.qualify.exams.attention.case import (
    AttentionCase,
    Comparison,
    attend_on,
    attention_inputs,
    attention_is_wrong,
    compare,
)
from crosschip.qualify.exams.attention.error import judge_attention
from crosschip.qualify.exams.attention.gradient import (
    GROSS,
    compare_gradients,
    gradient_inputs,
    gradient_is_wrong,
    gradients_on,
)
from crosschip.qualify.exams.attention.plan import (
    Geometry,
    accuracy_cases,
    battery,
    geometries,
    gradient_battery,
    traced_case,
)
from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.threads import half_the_cores

__all__ = ["examine"]

_TITLES = {"fused": "scaled_dot_product_attention", "plain": "attention from products and softmax"}
_FORWARD_LIMIT = (
    "twice what rounding to the dtype and sums in fp32 can do, from the inputs; hidden keys count for nothing"
)
_GRADIENT_LIMIT = f"{GROSS:g} times the worst honest implementation's error; nothing for a key that nobody sees"
_DEFAULT = Geometry("fused", "float32", 2, 4, 4, 64, 64, 64, 64, traced=False)
_SMOKE_LONGEST, _STANDARD_LONGEST = 1024, 8192  # keys, or the subject's own length where that is more
_NUM_DRAWS = 32
_SEEDS_APART = 1000  # between the cases of two seeds of the exam

# The shares of the budget that must be left for what comes after each part.
_RESERVES = (0.65, 0.45, 0.25, 0.15, 0.1, 0.05)


def examine(context: ExamContext) -> None:
    """Examine attention in the subject's dtypes and sizes."""
    with half_the_cores():
        _examine(context)


def _examine(context: ExamContext) -> None:
    found = geometries(context.trace)
    if not found:
        context.journal.not_covered("the subject's step has no attention: what is found here is not counted against it")
    reserves, known = iter(_RESERVES), set[str]()
    for ask in (_forward, _backward, _error):
        for way, title in _TITLES.items():
            until_s = context.budget_s * next(reserves)
            if ask is _backward and context.role != "train":
                continue
            own = [geometry for geometry in found if geometry.way == way]
            part = _Part(
                context, title, own or _borrowed(found, way), bool(own), _longest(context, found), until_s, known
            )
            context.part(f"{title}: {ask.__name__[1:]}", lambda part=part, ask=ask: ask(part))  # type: ignore[misc]
    more = "; more than one seed for each case" if context.tier == "smoke" else ""
    context.journal.not_covered(f"attention: dropout, the gradient of a mask{more}")


def _borrowed(found: list[Geometry], way: str) -> list[Geometry]:
    """Sizes for a way of attention that the subject does not use."""
    return [replace(geometry, way=way, traced=False) for geometry in found] or [replace(_DEFAULT, way=way)]


def _longest(context: ExamContext, found: list[Geometry]) -> int:
    least = _SMOKE_LONGEST if context.tier == "smoke" else _STANDARD_LONGEST
    return max([least, *(geometry.keys for geometry in found)])


class _Part:
    """What one part examines: one way of attention with its kinds of geometry, until `until_s` of the budget is left.

    `known` holds what earlier parts have reported, so that it is not reported again.
    """

    def __init__(
        self,
        context: ExamContext,
        title: str,
        own: list[Geometry],
        used: bool,
        longest: int,
        until_s: float,
        known: set[str],
    ) -> None:
        self.context, self.title, self.own, self.used = context, title, own, used
        self.longest, self.until_s, self.known = longest, until_s, known
        kinds: dict[tuple[Any, ...], Geometry] = {}
        for each in own:
            kinds.setdefault((each.dtype, each.heads // each.kv_heads, each.head_size, each.value_size), each)
        self.kinds = list(kinds.values())

    def ask(self, question: Question, cases: Iterable[tuple[AttentionCase, bool]]) -> None:
        answers = ask_all(self.context, question, cases, self.until_s, self.used)
        refusal = f"{self.title} refuses"
        wrong, refused = report(self.context, question, answers, self.used, refusals=refusal not in self.known)
        self.known |= {f"{self.title} is wrong"} if wrong else set()
        self.known |= {refusal} if refused else set()


def _forward(part: _Part) -> None:
    part.ask(
        Question(part.title, "masks, lengths and sizes", _answer, attention_is_wrong, _FORWARD_LIMIT),
        _cases(part, battery),
    )


def _backward(part: _Part) -> None:
    part.ask(
        Question(f"gradients of {part.title}", "gradients", _gradients, gradient_is_wrong, _GRADIENT_LIMIT),
        _cases(part, gradient_battery),
    )


def _error(part: _Part) -> None:
    cases = [_seeded(part, case) for kind in part.kinds for case in accuracy_cases(kind, part.longest, _NUM_DRAWS)]
    known_wrong = f"{part.title} is wrong" in part.known
    judge_attention(part.context, part.title, cases, part.used, part.until_s, known_wrong)


def _cases(part: _Part, make: Any) -> Iterator[tuple[AttentionCase, bool]]:
    """The subject's own calls first, then a battery around each of its kinds of geometry."""
    for geometry in part.own:
        if geometry.traced:
            yield _seeded(part, traced_case(geometry)), True
    for geometry in part.kinds:
        for case in make(geometry, part.longest, part.context.tier):
            yield _seeded(part, case), False


def _seeded(part: _Part, case: AttentionCase) -> AttentionCase:
    return replace(case, seed=case.seed + _SEEDS_APART * part.context.seed)


def _answer(device: Any, case: AttentionCase) -> Comparison:
    inputs = attention_inputs(case)
    return compare(case, inputs, attend_on(device, case, inputs))


def _gradients(device: Any, case: AttentionCase) -> Comparison:
    inputs, grad = gradient_inputs(case)
    return compare_gradients(case, inputs, grad, gradients_on(device, case, inputs, grad))
