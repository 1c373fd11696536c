"""A link between two groups that really becomes slow (namespaces, `tc tbf`) is told of, in both ways to train."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.qualify.exams.links.namespaces import why_not
from tests.train.outer.slow_link_drill import drill_slow_link

REASON = why_not()
LONG = ("train.steps=100000", "train.sample_every=100000", "train.validate_every=100000", "train.checkpoint_every=1000",
        "train.gradient_accumulation=1")  # fmt: skip
WAYS = {
    "every-step": ("groups.mode=every-step",),
    "diloco": ("groups.mode=diloco", "groups.sync_every=5", "groups.compression=none"),
}


@pytest.mark.slow
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize("mode", WAYS)
def test_a_link_that_becomes_slow_is_told(pretraining: Path, tmp_path: Path, mode: str) -> None:
    links = ("links.bandwidth_mbit_s=100", "links.latency_ms=5")
    found = drill_slow_link(pretraining, tmp_path, (*LONG, *links, *WAYS[mode]), slow_mbit=1.5, num_clean_steps=60)
    assert found.event["event"] in ("slow-link", "link-stall")
    assert found.steps_after >= 60, "the groups go on"
    if mode == "diloco":
        assert "over it the choice would be: DiLoCo with an outer step every" in found.event["detail"]
