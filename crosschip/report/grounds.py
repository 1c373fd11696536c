"""Which of several chips, for one role, and on what grounds. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

__all__ = ["Candidate", "Recommendation", "recommend"]

Answer = Literal["RECOMMENDED", "NONE", "INCONCLUSIVE", "NOT EXAMINED"]

# The published figure that bounds a role's speed, should nothing be measured.
_BOUND = {"train": ("bf16_tflops", "bf16 TFLOP/s"), "serve": ("memory_gb_s", "GB/s of memory bandwidth")}
_DO = {"train": "train", "serve": "serve"}


@dataclass(frozen=True)
class Candidate:
    """What is known of a chip for a role. `speeds`: by name, (lower, value, upper, unit); `ready`: dates (P50, P90).

    `partial` says why an examination that came to its end was not a whole one, `to_complete` what to do about it.
    """

    title: str
    verdict: str
    complete: bool
    tier: str
    worst: tuple[str, ...] = ()
    speeds: Mapping[str, tuple[float, float, float, str]] = field(default_factory=dict)
    ready: tuple[str, str] | None = None
    published: Mapping[str, float | None] = field(default_factory=dict)
    is_simulated: bool = False
    partial: str = ""
    to_complete: str = ""

    @property
    def is_fit(self) -> bool:
        """Passed, in a whole qualification that came to its end."""
        return self.complete and not self.partial and self.verdict in ("PASS", "PASS WITH LIMITS")


@dataclass(frozen=True)
class Recommendation:
    """`chip` is None unless one is recommended. `leaning` is what published figures would suggest, and no more."""

    role: str
    answer: Answer
    chip: str | None
    grounds: tuple[str, ...]
    missing: tuple[str, ...] = ()
    leaning: str | None = None

    def document(self) -> dict[str, Any]:
        """The recommendation for JSON."""
        return {**asdict(self), "grounds": list(self.grounds), "missing": list(self.missing)}


def recommend(role: str, candidates: Sequence[Candidate]) -> Recommendation:
    """Say which chip the evidence carries for `role`, if any."""
    if not candidates:
        todo = f"qualify each chip with --role {role}"
        return Recommendation(
            role, "NOT EXAMINED", None, (f"no report says whether a chip can {_DO[role]} it",), (todo,)
        )
    fit = [each for each in candidates if each.is_fit]
    unfit = [each for each in candidates if each.verdict == "FAIL"]
    undecided = [each for each in candidates if each not in fit and each not in unfit]
    against = tuple(_against(each) for each in unfit) + tuple(_open(each) for each in undecided)
    if not fit and not undecided:
        return Recommendation(role, "NONE", None, against, ("mend what the reproducers show, then qualify again",))
    if not fit:
        return Recommendation(role, "INCONCLUSIVE", None, against, tuple(_todo(each, role) for each in undecided))
    if len(fit) == 1:
        only = fit[0]
        grounds = (f"{only.title} passed ({only.verdict}, {only.tier} tier); no other chip has", *against)
        return Recommendation(role, "RECOMMENDED", only.title, grounds, _remaining(only, undecided, role))
    return _among_fit(role, fit, against, undecided)


def _among_fit(
    role: str, fit: Sequence[Candidate], against: tuple[str, ...], undecided: Sequence[Candidate]
) -> Recommendation:
    """Several passed: by date, then by measured speed, else it stays open."""
    passed = ", ".join(f"{each.title} ({each.verdict}, {each.tier} tier)" for each in fit)
    decided = _earliest(fit) or _fastest(fit)
    if decided is not None:
        best, why = decided
        grounds = (f"passed: {passed}", why, *against)
        return Recommendation(role, "RECOMMENDED", best.title, grounds, _remaining(best, undecided, role))
    missing = (
        f"the speed of each chip for this model, measured (bounds that do not overlap), or a plan for each: {passed}",
        *(_todo(each, role) for each in undecided),
    )
    grounds = (f"more than one chip passed: {passed}", "no measured speed and no plan tells them apart", *against)
    return Recommendation(role, "INCONCLUSIVE", None, grounds, missing, _leaning(role, fit))


def _earliest(fit: Sequence[Candidate]) -> tuple[Candidate, str] | None:
    """The chip whose P90 date lies before every other's P50 date."""
    dated = [(each, each.ready) for each in fit if each.ready is not None]
    if len(dated) < len(fit):
        return None
    best, (p50, p90) = min(dated, key=lambda pair: pair[1][1])
    if all(p90 < other[0] for each, other in dated if each is not best):
        others = ", ".join(f"{each.title} not before {other[0]} (P50)" for each, other in dated if each is not best)
        return best, f"by plan {best.title} is ready on {p50} (P50), {p90} (P90); {others}"
    return None


def _fastest(fit: Sequence[Candidate]) -> tuple[Candidate, str] | None:
    """The chip that is faster in every speed that was measured on all; None where the bounds of any overlap."""
    common = set.intersection(*(set(each.speeds) for each in fit))
    common = {what for what in common if len({each.speeds[what][3] for each in fit}) == 1}
    if not common:
        return None
    winners = []
    for what in sorted(common):
        best = max(fit, key=lambda each: each.speeds[what][0])
        if any(each.speeds[what][2] >= best.speeds[what][0] for each in fit if each is not best):
            return None
        winners.append((best, what))
    best = winners[0][0]
    if any(each is not best for each, _ in winners):
        return None
    told = "; ".join(
        f"{what}: " + ", ".join(f"{each.title} {each.speeds[what][1]:.4g} {each.speeds[what][3]}" for each in fit)
        for _, what in winners
    )
    return best, f"{best.title} is measurably faster ({told})"


def _leaning(role: str, fit: Sequence[Candidate]) -> str | None:
    """What confirmed published figures would suggest; None where one is missing or they are equal."""
    key, unit = _BOUND[role]
    values = {each.title: each.published.get(key) for each in fit}
    known = [value for value in values.values() if value is not None]
    if len(known) < len(values) or len(set(known)) < 2:
        return None
    best = max(known)
    names = [title for title, value in values.items() if value == best]
    told = ", ".join(f"{title} {value:g}" for title, value in values.items())
    return f"by published figures alone ({unit}: {told}) {' and '.join(names)}; that is a claim, not a measurement"


def _against(each: Candidate) -> str:
    why = f": {each.worst[0]}" if each.worst else ""
    return f"{each.title} failed ({each.tier} tier){why}"


def _open(each: Candidate) -> str:
    if not each.complete:
        return f"{each.title} is undecided, its qualification was interrupted"
    return f"{each.title} is undecided" + (f": {each.partial}" if each.partial else "")


def _todo(each: Candidate, role: str) -> str:
    if each.partial and each.complete:
        return f"{each.title}: {each.to_complete}"
    return f"{each.title}: qualify it again with --role {role}" + (" --tier standard" if each.tier == "smoke" else "")


def _remaining(best: Candidate, undecided: Sequence[Candidate], role: str) -> tuple[str, ...]:
    """What the recommendation does not rest on."""
    lines = []
    if best.is_simulated:
        lines.append(f"{best.title} is simulated: this is a rehearsal and says nothing of a real chip")
    if best.tier != "soak":
        lines.append(f"{best.title} was not watched for long (--tier soak), so its stability is not shown")
    return (*lines, *(_todo(each, role) for each in undecided))
