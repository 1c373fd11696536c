"""The judge's power and its false alarms, by simulation: errors of a known size are drawn and judged. Numpy only."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from crosschip.qualify.judging.judge import MIN_OUTPUTS, DrawErrors, benjamini_hochberg, errors_of, judge_draws

__all__ = ["rejection_rate", "simulated_draws"]

NUM_DRAWS = 32
Array = NDArray[np.float64]
_EPSILON, _TINY = 2.0**-23, 2.0**-126  # fp32
_ROUNDING = _EPSILON / 12**0.5  # RMS error of rounding numbers near 1, in units of their power of two
MOST_DRAWS = 4 * NUM_DRAWS


def simulated_draws(
    ratio: float, num_draws: int, num_outputs: int, rng: np.random.Generator, bias: float = 0.0, heavy: bool = False
) -> list[DrawErrors]:
    """Draws of a chip whose normal errors are `ratio` times those of two honest implementations.

    Honest errors are three times the rounding, as sums have them. `bias` is a mean error away from zero in units of the
    honest error; `heavy` lets the errors' sizes differ from draw to draw by e to either side.
    """
    draws = []
    for _ in range(num_draws):
        golden = rng.normal(size=num_outputs)
        usual = 3 * _ROUNDING * (np.exp(rng.normal()) if heavy else 1.0)
        controls = {name: golden + usual * rng.normal(size=num_outputs) for name in ("one", "other")}
        chip = golden + usual * (ratio * rng.normal(size=num_outputs) + bias * np.sign(golden))
        rounded = golden.astype(np.float32).astype(np.float64)
        found = errors_of("simulated", chip, golden, rounded, controls, _EPSILON, _TINY)
        assert found is not None
        draws.append(found)
    return draws


def rejection_rate(
    ratio: float,
    num_trials: int = 100,
    num_operators: int = 100,
    num_outputs: int = MIN_OUTPUTS // NUM_DRAWS,
    seed: int = 0,
    make: Callable[..., list[DrawErrors]] = simulated_draws,
) -> float:
    """The share of sweeps in which an operator with this error ratio fails, among as many honest ones.

    It is judged as the exam does: with 32 draws, and with up to four times as many while it stays open.
    """
    rng = np.random.default_rng(seed)
    num_rejected = 0
    for _ in range(num_trials):
        draws = make(ratio, NUM_DRAWS, num_outputs, rng)
        judgement = judge_draws(draws)
        while judgement.state == "open" and len(draws) < MOST_DRAWS:
            draws += make(ratio, len(draws), num_outputs, rng)
            judgement = judge_draws(draws)
        # Honest operators have p-values of practically 1: their ratio lies far below the limit.
        rejected = benjamini_hochberg([judgement.p_value] + [1.0] * (num_operators - 1))[0]
        num_rejected += judgement.state == "fail" or (judgement.state == "open" and rejected)
    return num_rejected / num_trials
