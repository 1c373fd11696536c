"""What a group is told of its link and of the time of a step when it joins the others."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from crosschip.chips import find_chip
from crosschip.model import ModelConfig, Transformer
from crosschip.recipe import StageSettings, parse_recipe
from crosschip.thin_links import Choice
from crosschip.train.group.world import ALONE
from crosschip.train.joining import estimate_step_s, join_groups


@pytest.fixture
def model() -> Transformer:
    with torch.device("meta"):
        return Transformer(ModelConfig(vocab_size=320, num_hidden_layers=2))


@pytest.mark.parametrize("num_groups", [1, 4])
def test_a_step_is_a_group_s_share_of_the_batch(
    num_groups: int, model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crosschip.train.joining.product_rate", lambda *_: 1e12)
    settings, chip = StageSettings(steps=100, batch_size=16), find_chip("cpu")

    def estimated(num_ranks: int, num_groups: int) -> float:
        return estimate_step_s(model, settings, chip, torch.float32, num_ranks, num_groups)

    assert estimated(1, num_groups) == estimated(num_groups, 1) == estimated(1, 1) / num_groups


@pytest.mark.parametrize("words", [{}, {"mode": "diloco"}, {"mode": "diloco", "sync_every": 30}])
def test_where_a_link_is_known_the_time_of_a_step_decides(
    words: dict[str, object], model: Transformer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The same link is thin for short steps, and for long ones it is not: outer steps are hidden or need not be."""
    chosen: list[Choice] = []

    def opened(planned: object, choice: Choice, *rest: object) -> Any:
        chosen.append(choice)
        return SimpleNamespace(resume=lambda directory, step: None)

    monkeypatch.setattr("crosschip.train.outer.opening.open_groups", opened)
    groups = {"num_groups": 2, "lighthouse": "http://localhost:1", **words}
    links = {"bandwidth_mbit_s": 100.0, "latency_ms": 25.0}
    document = {
        "name": "x",
        "data": {"source": "arithmetic"},
        "train": {"steps": 100},
        "groups": groups,
        "links": links,
    }
    recipe = parse_recipe(document, "here")
    assert recipe.train is not None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step_s in (2.0**-6, 2.0**10):
        where: Any = SimpleNamespace(step=0, sequences=0, tokens=0)
        join_groups(
            recipe,
            recipe.train,
            model,
            optimizer,
            where,
            tmp_path,
            0,
            ALONE,
            lambda step_s=step_s: step_s,
            lambda _: None,
            lambda: None,
        )
    short, long = chosen
    assert short != long
    assert (short.utilisation or 1.0) < (long.utilisation or 0.0)
