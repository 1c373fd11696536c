from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same random inputs in every run, in whatever order the tests run."""
    torch.manual_seed(0)
