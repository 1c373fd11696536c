"""The simulated chip in this process; a test leaves it honest."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from crosschip.chips.simulated import activate, plant


@pytest.fixture(autouse=True)
def _honest_chip() -> Iterator[None]:
    activate("sim")
    torch.manual_seed(0)
    yield
    plant([])
