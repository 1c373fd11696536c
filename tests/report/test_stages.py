"""A stage of reinforcement learning on the page: the mismatch of one engine, and of several."""

from __future__ import annotations

import pytest

from crosschip.report.documents import JsonLines, StageDocuments
from crosschip.report.stages import view_stage

MISMATCH = "KL from engine to trainer in nats per token"


def titles(*engines: str) -> list[str]:
    rows = [
        {"step": step, "loss": 1.0, "mismatch_k3": 1e-3 / step, **{f"{name} mismatch_k3": 1e-4 for name in engines}}
        for step in range(1, 5)
    ]
    none = JsonLines([])
    stage = StageDocuments("rl", {"steps": 4}, JsonLines(rows), none, none, none, finished=True)
    return [figure.title for figure in view_stage(stage).figures if MISMATCH in figure.title]


@pytest.mark.parametrize("engines", [(), ("native",)])
def test_one_engine_has_one_plot_of_its_mismatch(engines: tuple[str, ...]) -> None:
    assert titles(*engines) == [MISMATCH]


def test_several_engines_have_one_each_beside_the_overall_one() -> None:
    address = "http://10.0.0.7:8000"
    assert titles("native", address) == [MISMATCH, f"{MISMATCH}: {address}", f"{MISMATCH}: native"]
