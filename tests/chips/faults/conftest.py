"""Faults planted in the one simulated chip of the test process; each test leaves it honest."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from crosschip.chips.simulated import activate, plant


@pytest.fixture(autouse=True)
def honest_chip() -> Iterator[None]:
    activate("sim")
    plant([])
    yield
    plant([])
