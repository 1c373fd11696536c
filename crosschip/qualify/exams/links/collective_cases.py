"""Which collectives are tried, in which dtypes, on which rows and values. Pure policy: no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["MOVING", "ROWS", "Case", "PlanRequest", "case_from", "kind_is_needed", "needed_by", "plan_rounds"]

Values = Literal["drawn", "whole", "limits"]

ROWS = (1, 4, 17)
MOVING = ("all_gather", "all_to_all", "all_to_all_skewed", "broadcast", "send_recv")
_REDUCTIONS = (
    ("all_reduce", "sum"),
    ("reduce_scatter", "sum"),
    ("all_reduce", "avg"),
    ("reduce_scatter", "avg"),
    ("all_reduce", "premul_sum"),
    ("reduce_scatter", "premul_sum"),
    ("all_reduce", "max"),
)


@dataclass(frozen=True)
class Case:
    """One collective on one kind of tensors. With `pair` only ranks 0 and 1 take part.

    `values` are `drawn` (normal), `whole` (whole numbers whose sums every dtype holds exactly) or `limits` (near the
    largest and the smallest normal numbers, all partial sums within the range).
    """

    collective: str
    operation: str  # of a reduction; "" for what only moves
    dtype: str
    rows: int
    width: int
    values: Values = "drawn"
    pair: bool = False

    @property
    def sums_up(self) -> bool:
        """Whether it adds, so that rounding is allowed."""
        return self.operation in ("sum", "avg", "premul_sum")

    @property
    def call(self) -> str:
        """The collective with its operation and dtype: `all_reduce SUM bfloat16`."""
        return " ".join(part for part in (self.collective, self.operation.upper(), self.dtype) if part)

    @property
    def title(self) -> str:
        """The case in a line."""
        inside = " between two ranks" if self.pair else ""
        return f"{self.call} [{self.rows},{self.width}] {self.values}{inside}"

    def document(self) -> dict[str, Any]:
        """The case for JSON."""
        return asdict(self)


def case_from(document: dict[str, Any]) -> Case:
    """Read a case back."""
    return Case(**document)


@dataclass(frozen=True)
class PlanRequest:
    """What the plan is made for. `large_width` is that of one message as large as the subject's."""

    num_ranks: int
    dtypes: Sequence[str]  # floating-point ones of the subject
    width: int
    large_width: int


def plan_rounds(request: PlanRequest) -> list[list[Case]]:
    """The cases in rounds, one collective and operation each: sums first, since they are what goes wrong most."""
    reductions = [_reduction_round(collective, operation, request) for collective, operation in _REDUCTIONS]
    moves = [_moving_round(collective, request) for collective in MOVING]
    return [*reductions, *moves]


def _reduction_round(collective: str, operation: str, request: PlanRequest) -> list[Case]:
    cases = []
    kinds: tuple[Values, ...] = ("whole", "limits") if _is_exact_in_whole(operation, request) else ("limits",)
    for dtype in request.dtypes:
        cases += [Case(collective, operation, dtype, rows, request.width) for rows in ROWS]
        cases += [Case(collective, operation, dtype, ROWS[1], request.width, values) for values in kinds]
        if operation == "sum":
            cases.append(Case(collective, operation, dtype, 1, request.large_width))
            if request.num_ranks > 2:
                cases += [Case(collective, operation, dtype, rows, request.width, pair=True) for rows in ROWS]
    if operation in ("sum", "max"):
        cases += [Case(collective, operation, "int64", rows, request.width, "whole") for rows in ROWS]
    return cases


def _is_exact_in_whole(operation: str, request: PlanRequest) -> bool:
    """An average of whole numbers is exact, however it is taken, when the number of ranks is a power of two."""
    return operation != "avg" or request.num_ranks & (request.num_ranks - 1) == 0


def _moving_round(collective: str, request: PlanRequest) -> list[Case]:
    cases = []
    for dtype in request.dtypes:
        cases += [Case(collective, "", dtype, rows, request.width) for rows in ROWS]
        cases.append(Case(collective, "", dtype, ROWS[1], request.width, "limits"))
        cases.append(Case(collective, "", dtype, 1, request.large_width))
    return [*cases, *(Case(collective, "", "int64", rows, request.width, "whole") for rows in ROWS)]


_NEEDED = {
    "train": {"all_reduce SUM", "reduce_scatter SUM", "all_gather", "broadcast"},
    "serve": {"all_reduce SUM", "all_gather", "broadcast"},
}


def needed_by(role: str, case: Case, routes_tokens: bool, dtypes: Sequence[str]) -> bool:
    """Whether the role cannot do without this collective; `routes_tokens` says that experts want an all-to-all."""
    name = case.call.removesuffix(case.dtype).strip()
    wanted = name in _NEEDED[role] or (routes_tokens and name.startswith("all_to_all"))
    return wanted and case.dtype in dtypes


def kind_is_needed(role: str, collective: str, routes_tokens: bool) -> bool:
    """Whether the role cannot do without this kind of collective, such as `all_reduce`, in any form."""
    kinds = {name.split()[0] for name in _NEEDED[role]}
    return collective in kinds or (routes_tokens and collective.startswith("all_to_all"))
