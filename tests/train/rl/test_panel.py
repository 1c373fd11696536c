"""The panel of the mismatch over several ranks: every engine is measured, whichever rank trains its answers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from crosschip.train.group.world import join_world
from crosschip.train.rl.measured import measured_agreement
from crosschip.train.rl.objective import Agreement
from crosschip.train.rl.panel import EngineAgreement, older_shares, over_all, panel
from tests.train.group.conftest import run_together
from tests.train.rl.made import group

ENGINES = {"native": "cpu", "far": "npu"}


def heard(engine: int, dp: float, k3: float, tokens: float = 10.0) -> Agreement:
    """Of one answer; columns as `Agreement` has them."""
    return Agreement(torch.tensor([engine]), torch.tensor([[tokens, dp * tokens, 2 * dp, k3 * tokens, 1.0, 0.0]]))


def test_each_engine_is_measured_on_its_own_and_all_together() -> None:
    near, far = panel([heard(0, 0.01, 0.001), heard(1, 0.1, 0.3, 30.0)], ENGINES)
    assert (near.engine, near.chip, near.num_tokens, near.k3) == ("native", "cpu", 10, pytest.approx(0.001))
    assert (far.max_dp, far.mean_dp, far.truncated_share) == pytest.approx((0.2, 0.1, 1 / 30))
    both = over_all([near, far])
    assert (both.num_tokens, both.max_dp) == (40, far.max_dp)
    assert both.k3 == pytest.approx((10 * 0.001 + 30 * 0.3) / 40)
    assert "far (chip npu): KL 3.00e-01" in far.line()
    assert set(measured_agreement(far, "far ")) == {f"far {name}" for name in measured_agreement(both)}


def test_a_divergence_without_bound_is_told_in_words_and_left_out_of_the_log() -> None:
    (far,) = panel([heard(1, 0.1, float("inf"))], ENGINES)
    assert "KL inf nats" in far.line()
    assert "far mismatch_k3" not in measured_agreement(far, "far ")
    assert measured_agreement(over_all([far]))["mismatch_mean_dp"] == pytest.approx(0.1)


def test_the_share_of_tokens_of_older_weights_is_told_for_each_engine() -> None:
    groups = [
        group(1.0, 0.0, number=0, engine="native", version=3),
        group(1.0, number=1, engine="native", version=4),
        group(1.0, number=2, engine="far", version=4),
    ]
    assert older_shares(groups, 4) == {"native": pytest.approx(2 / 3), "far": 0.0}


def test_an_engine_without_a_token_is_not_on_the_panel() -> None:
    assert [each.engine for each in panel([heard(1, 0.1, 0.3)], ENGINES)] == ["far"]
    assert panel([], ENGINES) == []


def test_every_rank_has_what_all_of_them_heard(tmp_path: Path) -> None:
    """Rank 0 trains no answer of the engine that is wrong; the panel of one rank would not show it."""
    ended = run_together(2, ["-m", "tests.train.rl.test_panel", str(tmp_path)], 120.0)
    assert all(code == 0 for code, _ in ended), "\n".join(text for _, text in ended)
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert first == second
    near, far = (EngineAgreement(**each) for each in first)
    assert (near.num_tokens, far.num_tokens) == (20, 10)
    assert (near.max_dp, near.k3) == pytest.approx((0.06, 0.002))
    assert (far.max_dp, far.k3) == pytest.approx((0.8, 5.0))


def _rank(out: Path) -> None:
    torch.set_num_threads(1)
    with join_world(torch.device("cpu"), 60.0) as world:
        shares = [[heard(0, 0.01, 0.001)], [heard(0, 0.03, 0.003), heard(1, 0.4, 5.0)]]
        found = panel(shares[world.rank], ENGINES, world, torch.device("cpu"))
        (out / f"rank-{world.rank}.json").write_text(json.dumps([vars(each) for each in found]))


if __name__ == "__main__":
    _rank(Path(sys.argv[1]))
