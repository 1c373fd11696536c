"""Checkpoints of several real processes; what happens in each scenario stands in `processes.py`."""

import pytest


@pytest.mark.parametrize(
    "scenario",
    [
        "two save, four go on, one reads both",
        "experts in parallel and back",
        "a disk full for one is an error in all",
        "replicas that differ are named",
        "saves killed at random moments",
    ],
)
def test_scenario(scenarios, scenario) -> None:
    assert scenarios[scenario] == ""
