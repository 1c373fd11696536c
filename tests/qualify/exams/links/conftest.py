"""Sets of ranks on the simulated chip, without an exam around them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from crosschip.qualify.exams.links.message_sizes import Layout, Message
from crosschip.qualify.exams.links.schedule import Schedule
from crosschip.qualify.exams.links.session import Session, run_session
from crosschip.qualify.finding import Tier

LAYOUT = Layout(
    [Message(1024, "control"), Message(1 << 16, "activation"), Message(1 << 20, "bucket")],
    32,
    ["float32", "bfloat16"],
    routes_tokens=True,
)


@pytest.fixture
def session_on(tmp_path: Path) -> Callable[..., Session]:
    """`session_on(chip, num_ranks, ...)` lets ranks on that chip do their steps and gives what they noted."""
    number = 0

    def run(
        chip: str,
        num_ranks: int = 2,
        conformance_s: float = 30.0,
        links_s: float = 0.2,
        sustained_s: float = 0.0,
        tier: Tier = "smoke",
    ) -> Session:
        nonlocal number
        number += 1
        plan = Schedule(conformance_s, links_s, sustained_s, 1e3, 0.0, 0.0, 0.0)
        return run_session(
            tmp_path / f"session-{number}", [chip] * num_ranks, LAYOUT, tier, lambda start_s: plan, 0, lambda part: None
        )

    return run
