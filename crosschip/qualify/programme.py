"""The programme of a qualification: which exams it holds, with which share of the time. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from crosschip.errors import QualifyError
from crosschip.qualify.finding import Role, Tier
from crosschip.qualify.proctor import PART_LIMIT_S

__all__ = ["EXAMS", "GOLDEN", "TIER_S", "Exam", "Request", "named_exams"]

# Wall time of a whole qualification in seconds. A slower machine examines less within it and says what it left out.
TIER_S: dict[Tier, float] = {"smoke": 112.0, "standard": 840.0, "soak": 1800.0}


@dataclass(frozen=True)
class Exam:
    """An exam of the programme; `weight` is its share of the time, `weights` where a tier has another one."""

    name: str
    weight: float
    module: str = ""
    weights: dict[Tier, float] = field(default_factory=dict)

    def job_module(self) -> str:
        """The module whose `examine` is run."""
        return self.module or f"crosschip.qualify.exams.{self.name}.exam"

    def weight_in(self, tier: Tier) -> float:
        """The share of the time in a tier; 0 where the tier leaves the exam out."""
        return self.weights.get(tier, self.weight)


# What an exam leaves of its share is shared by those after it: the one that can always use more time comes after those
# that end by themselves.
EXAMS = (
    Exam("software", 15),
    Exam("special_values", 8),
    Exam("attention", 14),
    Exam("determinism", 14),
    Exam("rehearsal", 22),
    Exam("operators", 42),
    Exam("links", 14, weights={"smoke": 0, "soak": 14}),
    Exam("stability", 16, weights={"smoke": 0, "soak": 120}),
)


GOLDEN = Exam("golden", 30)  # only where a bundle is given


@dataclass(frozen=True)
class Request:
    """What is to be qualified. `origin` is a recipe, a model directory or `package.module:function`.

    `exams` are those that are wished for, whatever the tier; None for the tier's. `time_s` stands instead of the
    tier's wall time. `golden` is a golden bundle, whose replay is an exam of its own. `planned_chips` is how many chips
    the run shall have, for which rates of silent corruption are told.
    """

    origin: str
    chip: str = "auto"
    role: Role = "train"
    tier: Tier = "smoke"
    report: Path = Path("qualify.json")
    seed: int = 0
    exams: tuple[Exam, ...] | None = None
    time_s: float | None = None
    part_limit_s: float = PART_LIMIT_S
    golden: Path | None = None
    planned_chips: int | None = None

    @property
    def programme(self) -> list[tuple[Exam, float]]:
        """The exams to be taken, with their weights."""
        added = [] if self.golden is None else [(GOLDEN, GOLDEN.weight)]
        if self.exams is not None:
            return [(exam, exam.weight_in(self.tier) or exam.weight) for exam in self.exams] + added
        return [(exam, weight) for exam in EXAMS if (weight := exam.weight_in(self.tier)) > 0] + added

    @property
    def again(self) -> list[str]:
        """The command that takes one exam again, whose name is to follow."""
        command = ["crosschip", "qualify", "--model", self.origin, "--chip", self.chip, "--role", self.role]
        command += ["--tier", self.tier, "--seed", str(self.seed), "--json", "again.json"]
        command += [] if self.time_s is None else ["--minutes", f"{self.time_s / 60:g}"]
        command += [] if self.golden is None else ["--golden", str(self.golden)]
        return [*command, "--exams"]


def named_exams(names: Sequence[str]) -> tuple[Exam, ...]:
    """The exams of these names, in the programme's order. `golden` is no exam of the tiers: a bundle brings it.

    Raises:
        QualifyError: there is no exam of that name.
    """
    known = {exam.name: exam for exam in EXAMS}
    for name in names:
        if name not in known and name != GOLDEN.name:
            raise QualifyError(f"there is no exam {name!r}", f"choose among {', '.join([*known, GOLDEN.name])}")
    return tuple(exam for name, exam in known.items() if name in names)
