"""The judge on errors whose size and kind are known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from crosschip.qualify.judging.judge import (
    BIAS_LIMIT,
    MIN_DRAWS,
    RATIO_LIMIT,
    DrawErrors,
    Judgement,
    benjamini_hochberg,
    errors_of,
    fails_alone,
    judge_draws,
    judge_slope,
)
from crosschip.qualify.judging.power import rejection_rate, simulated_draws

BF16 = 2.0**-7
TINY = 2.0**-126


def to_bf16(x: np.ndarray, mode: str = "nearest") -> np.ndarray:
    bits = x.astype(np.float32).view(np.uint32)
    if mode == "nearest":
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
    return (bits & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(np.float64)


def bf16_draws(chip: Any, num_draws: int = 32, num_outputs: int = 128, seed: int = 0) -> list[DrawErrors]:
    """Draws of an operator whose honest results are rounded once to bf16; `chip(golden, rng)` gives the chip's."""
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(num_draws):
        golden = rng.normal(size=num_outputs)
        rounded = to_bf16(golden)
        found = errors_of("draw", chip(golden, rng), golden, rounded, {"CPU": rounded}, BF16, TINY)
        assert found is not None
        draws.append(found)
    return draws


def judged(chip: Any, **sizes: int) -> Judgement:
    return judge_draws(bf16_draws(chip, **sizes))


def noisy(golden: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Twice the usual rounding error, without bias."""
    place = 2.0 ** np.floor(np.log2(np.abs(golden))) * BF16
    return to_bf16(golden + rng.uniform(-1, 1, golden.shape) * place * math.sqrt(3) / 2)


def test_a_control_that_takes_only_some_of_the_draws_counts_in_those() -> None:
    rng = np.random.default_rng(1)
    draws = []
    for number in range(2 * 40):
        golden = rng.normal(size=128)
        rounded = to_bf16(golden)
        low = {"sequential": to_bf16(golden, "zero")} if number % 2 else {}
        found = errors_of("draw", to_bf16(golden, "zero"), golden, rounded, {"CPU": rounded, **low}, BF16, TINY)
        assert found is not None
        draws.append(found)
    with_all, without = (
        next(each for each in judge_draws(some).offsets if each.kind == "bias") for some in (draws, draws[::2])
    )
    assert without.effect < with_all.effect < 0  # truncation leans towards zero; half of it is explained by the control


@pytest.mark.parametrize("seed", range(20))
def test_honest_chips_pass(seed: int) -> None:
    def rounds(golden: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return to_bf16(golden)

    for chip in (rounds, noisy):
        found = judge_draws(bf16_draws(chip, seed=seed))
        assert (found.state, found.reason) == ("pass", ""), found
    for ratio in (0.2, 1.0, 2.0):
        found = judge_draws(simulated_draws(ratio, 32, 128, np.random.default_rng(seed)))
        assert found.state == "pass", found


def test_truncation_is_found_by_its_bias_and_not_by_its_ratio() -> None:
    found = judged(lambda golden, rng: to_bf16(golden, "truncate"))
    assert found.ratio is not None
    assert found.ratio < RATIO_LIMIT
    assert (found.state, found.reason) == ("fail", "bias")
    bias = next(each for each in found.offsets if each.kind == "bias")
    # Half a unit in the last place against 1/sqrt(12) of one, where that unit varies: its mean against its RMS.
    golden = np.random.default_rng(0).normal(size=100_000)
    place = 2.0 ** np.floor(np.log2(np.abs(golden)))
    assert bias.effect == pytest.approx(-math.sqrt(3) * place.mean() / np.sqrt((place**2).mean()), rel=0.05)
    assert bias.z < -30


def test_a_gain_of_a_thousandth_is_found_in_bf16() -> None:
    assert judged(lambda golden, rng: to_bf16(golden * 1.002)).reason == "bias"
    assert judged(lambda golden, rng: to_bf16(golden * 1.0001)).state == "pass"


def test_a_shift_is_found_although_its_signs_cancel() -> None:
    found = judged(lambda golden, rng: to_bf16(golden) + 0.003)
    assert found.reason == "bias"
    assert [each.kind for each in found.offsets if each.fails] == ["shift"]


def test_exact_results_must_be_exact() -> None:
    values = np.arange(64.0)
    draw = errors_of("integers", values + (values == 7), values, values, {"CPU": values}, BF16, TINY)
    assert draw is not None
    assert fails_alone(draw)
    found = judge_draws([draw])
    assert (found.state, found.reason, found.num_different) == ("fail", "bitwise", 1)
    right = errors_of("integers", values, values, values, {"CPU": values}, BF16, TINY)
    assert right is not None
    assert judge_draws([right]).state == "pass"


def test_a_flushed_subnormal_is_no_error() -> None:
    golden = np.array([1.0, TINY / 4, -TINY / 3])
    draw = errors_of("flush", np.array([1.0, 0.0, 0.0]), golden, golden, {"CPU": golden}, BF16, TINY)
    assert draw is not None
    assert judge_draws([draw]).state == "pass"


def test_one_wrong_number_in_one_draw_is_found() -> None:
    def seldom(golden: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        made = to_bf16(golden)
        if rng.random() < 0.04:
            made[0] += 1.0
        return made

    draws = bf16_draws(seldom, num_draws=64)
    assert 0 < sum(fails_alone(draw) for draw in draws) < 8
    assert judge_draws(draws).reason == "outlier"


def test_a_thick_tail_is_found_although_the_ratio_passes() -> None:
    def thick(golden: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        place = 2.0 ** np.floor(np.log2(np.abs(golden))) * BF16
        return to_bf16(golden) + (rng.random(golden.shape) < 0.02) * 6 * place * rng.choice([-1, 1], golden.shape)

    found = judged(thick, num_outputs=512)
    assert (found.state, found.reason) == ("fail", "tail")


def test_ill_conditioned_draws_abstain() -> None:
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(40):
        golden = rng.normal(size=64)
        control = golden + 0.2 * rng.normal(size=64)
        draws.append(errors_of("bad", golden + 50.0, golden, golden, {"CPU": control}, 2.0**-23, TINY))
    found = judge_draws([draw for draw in draws if draw is not None])
    assert (found.state, found.num_abstained) == ("abstain", 40)


def test_few_draws_stay_open() -> None:
    assert judged(noisy, num_draws=MIN_DRAWS - 1).reason == "draws"


def test_one_constant_says_nothing_of_a_bias() -> None:
    def constant(chip_error: float) -> list[DrawErrors]:
        golden = np.full(128, 1.003)
        honest = {"CPU": golden + 1e-8}
        found = [errors_of("c", golden + chip_error, golden, golden - 2e-8, honest, 2.0**-23, TINY) for _ in range(32)]
        return [each for each in found if each is not None]

    found = judge_draws(constant(4e-8))
    assert (found.reason, found.offsets) == ("draws", ())  # 32 times the same is one draw


def test_slope_of_a_coarse_accumulator() -> None:
    def draws(growth: float) -> list[DrawErrors]:
        rng = np.random.default_rng(1)
        made = []
        for size in (32, 128, 512, 2048):
            for _ in range(6):
                golden = rng.normal(size=64)
                control = golden + 1e-3 * rng.normal(size=64)
                chip = golden + 1e-3 * (size / 32) ** growth * rng.normal(size=64)
                made.append(errors_of("k", chip, golden, golden, {"CPU": control}, 1e-6, TINY, size))
        return [each for each in made if each is not None]

    coarse, honest = judge_slope(draws(0.5)), judge_slope(draws(0.0))
    assert coarse is not None
    assert coarse.fails
    assert coarse.value == pytest.approx(0.5, abs=0.1)
    assert honest is not None
    assert not honest.fails
    assert judge_slope(draws(0.5)[:6]) is None


def test_benjamini_hochberg_on_the_papers_example() -> None:
    p_values = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.324, 0.4262, 0.5719, 0.6528]
    p_values += [0.759, 1.0]
    assert sum(benjamini_hochberg(p_values)) == 4  # Benjamini and Hochberg 1995, section 3.2
    assert benjamini_hochberg([1.0, 0.9]) == [False, False]


def test_power_at_a_ratio_of_four() -> None:
    def heavy(ratio: float, number: int, outputs: int, rng: np.random.Generator) -> list[DrawErrors]:
        return simulated_draws(ratio, number, outputs, rng, heavy=True)

    assert rejection_rate(4.0, num_trials=25) >= 0.8
    assert rejection_rate(4.0, num_trials=25, num_outputs=4, make=heavy) >= 0.8
    assert rejection_rate(2.0, num_trials=25) == 0.0


def test_the_limit_of_a_bias_lies_between_honest_chips_and_truncation() -> None:
    assert 0 < BIAS_LIMIT < math.sqrt(3) / 2


def fp32_draws(chip: Any, num_draws: int = 32, num_outputs: int = 256) -> list[DrawErrors]:
    """Draws of an operator that computes in fp32 with an error of a few last places."""
    rng = np.random.default_rng(3)
    draws = []
    for _ in range(num_draws):
        golden = rng.normal(size=num_outputs) + 3.0
        honest = (golden * (1 + rng.normal(size=num_outputs) * 2.0**-24)).astype(np.float32).astype(np.float64)
        rounded = golden.astype(np.float32).astype(np.float64)
        found = errors_of("draw", chip(golden), golden, rounded, {"CPU": honest}, 2.0**-23, TINY)
        assert found is not None
        draws.append(found)
    return draws


@pytest.mark.parametrize(
    ("share", "state", "reason"),
    [(2.0**-23, "pass", "slight bias"), (2.0**-16, "fail", "outlier"), (0.0, "pass", "")],
)
def test_a_bias_too_small_to_move_a_training_is_a_limit(share: float, state: str, reason: str) -> None:
    found = judge_draws(fp32_draws(lambda golden: golden * (1 + share)))
    assert (found.state, found.reason) == (state, reason)


def test_a_bias_that_hides_behind_a_coarse_control_is_not_harmless() -> None:
    draws = bf16_draws(lambda golden, rng: to_bf16(golden, "truncate"))
    shares = [each.share for each in judge_draws(draws).offsets if each.fails]
    assert max(shares) > 2.0**-10


@pytest.mark.parametrize(("share", "state"), [(2.0**-22, "pass"), (2.0**-10, "fail")])
def test_an_operator_that_rounds_may_round_a_result_that_could_be_exact(share: float, state: str) -> None:
    golden = np.arange(1.0, 65.0)
    exact = errors_of("one key", golden * (1 + share), golden, golden, {"CPU": golden}, 2.0**-23, TINY)
    assert exact is not None
    rounding = fp32_draws(lambda golden: golden * (1 + 2.0**-25))
    assert judge_draws([exact]).state == "fail"  # one that moves numbers has nothing to round
    assert judge_draws([*rounding, exact]).state == state
