"""Checks that start their own ranks: right between processes on the CPU, wrong where nothing could be right."""

from __future__ import annotations

from crosschip.qualify.exams.links.link_checks import late_rank_is_lost, loss_goes_unnoticed, pair_is_slow


def test_a_lost_rank_is_noticed_in_time_or_not() -> None:
    wrong, expected, got = loss_goes_unnoticed("cpu", "killed", 2, timeout_s=30.0, grace_s=10.0)
    assert not wrong, got
    assert "rank 1 being killed" in expected
    wrong, _, got = loss_goes_unnoticed("cpu", "stopped", 2, timeout_s=600.0, grace_s=-598.0)
    assert wrong, "two seconds after it was stopped rank 0 waits for ten minutes"
    assert "rank 0 still waited" in got


def test_a_late_rank_is_waited_for_unless_the_time_out_is_shorter() -> None:
    assert not late_rank_is_lost("cpu", 2, skew_s=0.5, timeout_s=60.0)[0]
    wrong, _, got = late_rank_is_lost("cpu", 2, skew_s=4.0, timeout_s=1.0)
    assert wrong
    assert "exit codes of the ranks: [1" in got


def test_a_pair_is_held_against_the_median() -> None:
    ring = [[0, 1], [1, 2], [2, 0]]
    wrong, expected, got = pair_is_slow("cpu", [2, 0], ring, 3, 1 << 16, most_ratio=1000.0)
    assert not wrong, (expected, got)
    assert pair_is_slow("cpu", [2, 0], ring, 3, 1 << 16, most_ratio=1e-6)[0]
