"""What a replay measured, as plain numbers. No torch, no files."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from crosschip.golden.config_fields import FieldDifference
from crosschip.golden.distance import MeanBound
from crosschip.golden.limits import FLIP_SHARE, FLOOR_FACTOR, QUANTISED, Limit

if TYPE_CHECKING:  # that module imports torch
    from crosschip.golden.weights import WeightDifference

__all__ = ["Comparison", "CurveDistance", "PointDistance", "RowDistance", "View"]

# Some 50 points are looked at in one replay: less than 1 in 300 is beyond this by chance, were its gain at the limit.
_GAIN_SPREADS = 4.0


@dataclass(frozen=True)
class PointDistance:
    """One point of the model: relative RMS difference of its activations and of their common factor."""

    point: str
    error: float
    gain: float
    gain_spread: float  # standard error of the factor over the positions
    error_limit: float
    gain_limit: float
    num_positions: int

    @property
    def is_beyond(self) -> bool:
        """Whether the difference is more than honest rounding; what is not a number is.

        A factor estimated from few positions moves by chance, so it must be beyond its limit whatever the chance.
        """
        gain = abs(self.gain) - _GAIN_SPREADS * self.gain_spread
        return not (self.error <= self.error_limit and gain <= self.gain_limit)


@dataclass(frozen=True)
class RowDistance:
    """One row. `first_bad` is the first position at which some activation is beyond its limit (None: none is),
    `share_bad` the share of such positions from there on."""

    row: int
    length: int
    kl: MeanBound
    activation_ratio: float | None  # worst point's error over its limit
    first_bad: int | None
    share_bad: float


@dataclass(frozen=True)
class View:
    """One way of running the rows (alone, in a batch, at once over HTTP) against the bundle.

    The judged positions are those that no near-tie of a router excuses, unless these are too few to say anything.
    """

    name: str
    kl: MeanBound  # over the judged positions
    kl_everywhere: MeanBound
    share_judged: float
    largest_logprob_difference: float
    probability_shift: MeanBound
    top1: float
    top1_weighted: float
    rows: list[RowDistance]
    points: list[PointDistance] = field(default_factory=list)
    num_flips: int = 0
    judged_choices: int = 0
    unexplained_flips: int = 0
    worst_flip: str | None = None
    margin_noise: float = 0.0

    @property
    def flip_share(self) -> float:
        """The share of the judged router choices that fell otherwise by more than rounding explains."""
        return self.unexplained_flips / self.judged_choices if self.judged_choices else 0.0

    @property
    def first_diverging(self) -> PointDistance | None:
        """The first point, in the order of computation, that is beyond its limit."""
        return next((point for point in self.points if point.is_beyond), None)


@dataclass(frozen=True)
class CurveDistance:
    """The training curves: RMS over the steps of the relative difference, and the step where it is largest.

    One step tells little: a token that falls to another expert moves the gradient of its step by per cents, and an
    honest chip has such a step now and then. A wrong backward is wrong at every step.
    """

    loss: float
    loss_step: int
    gradient_norm: float
    gradient_norm_step: int
    recorded_loss: list[float]
    found_loss: list[float]
    recorded_gradient_norm: list[float]
    found_gradient_norm: list[float]


@dataclass
class Comparison:
    """A whole replay: through our own model or transformers on a chip, or through an engine behind an address.

    `transformers` is a replay of the files that the engine serves in the transformers library, made to place the blame.
    """

    route: Literal["model", "transformers", "http"]
    engine: str
    dtype: str
    limit: Limit
    floor: dict[str, Any]
    views: list[View] = field(default_factory=list)
    weights: list[WeightDifference] = field(default_factory=list)
    fields: list[FieldDifference] = field(default_factory=list)
    curve: CurveDistance | None = None
    transformers: View | None = None
    broke: str | None = None  # what ended the replay
    rows_planned: int = 0
    rows_made: int = 0  # of the view that got least far
    files_checked: bool = True  # tensors and configuration were compared
    not_covered: list[str] = field(default_factory=list)

    def is_drowned(self, view: View) -> bool:
        """Whether the recording chip's own noise is beyond the limit and the view differs by no more than noise does.

        Then the limit cannot tell this model from itself, and nothing follows for or against who replayed it.
        """
        noise = self.floor["mean_kl"]
        return (
            self.limit.target == "bf16 to bf16" and self.limit.mean_kl < noise and view.kl.mean <= FLOOR_FACTOR * noise
        )

    @property
    def logprob_limit(self) -> float:
        """The largest difference of one log-prob that is allowed."""
        return self.limit.logprob(self.floor["logprob"])

    def is_logprob_beyond(self, view: View) -> bool:
        """Whether some log-prob alone is off by more than its own limit; what is not a number is."""
        return not view.largest_logprob_difference <= self.logprob_limit

    def are_flips_beyond(self, view: View) -> bool:
        """Whether more router choices than chance gives fell otherwise by more than rounding explains."""
        return self.limit.target not in QUANTISED and view.flip_share > FLIP_SHARE

    def document(self) -> dict[str, Any]:
        """The comparison for JSON; numbers that are not finite become words."""
        return {"schema_version": 1, **_finite(asdict(self))}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
