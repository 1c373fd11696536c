"""What a group is told of its link and of the time of a step when it joins the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from crosschip.chips import find_chip
from crosschip.errors import RunDirectoryError
from crosschip.model import ModelConfig, Transformer
from crosschip.recipe import StageSettings, parse_recipe
from crosschip.thin_links import Choice
from crosschip.train.group.world import ALONE
from crosschip.train.joining import estimate_step_s, join_groups
from crosschip.train.launching import group_directory

SHORT_S, LONG_S = 2.0**-6, 2.0**10


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


LINKS = {"bandwidth_mbit_s": 100.0, "latency_ms": 25.0}


@pytest.fixture
def joined(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Choice]:
    """`joined(run, step_s)`: what a group chooses that measures `step_s`, in the run directory `run`."""
    chosen: list[Choice] = []

    def opened(planned: object, choice: Choice, *rest: object) -> Any:
        chosen.append(choice)
        return SimpleNamespace(resume=lambda directory, step: None)

    monkeypatch.setattr("crosschip.train.outer.opening.open_groups", opened)

    def join(run: Path, step_s: float, group: int = 0, **tables: dict[str, object]) -> Choice:
        groups = {"num_groups": 2, "lighthouse": "http://localhost:1", **tables.get("groups", {})}
        document = {
            "name": "x",
            "data": {"source": "arithmetic"},
            "train": {"steps": 100, **tables.get("train", {})},
            "groups": groups,
            "links": LINKS | tables.get("links", {}),
        }
        recipe = parse_recipe(document, "here")
        assert recipe.train is not None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        where: Any = SimpleNamespace(step=0, sequences=0, tokens=0)
        stage = group_directory(run, group) / "train/pretrain"
        join_groups(
            recipe,
            recipe.train,
            model,
            optimizer,
            where,
            stage,
            run,
            group,
            ALONE,
            lambda: step_s,
            lambda _: None,
            lambda: None,
        )
        return chosen[-1]

    return join


@pytest.mark.parametrize("words", [{}, {"mode": "diloco"}, {"mode": "diloco", "sync_every": 30}])
def test_where_a_link_is_known_the_time_of_a_step_decides(
    words: dict[str, object], joined: Callable[..., Choice], tmp_path: Path
) -> None:
    """The same link is thin for short steps, and for long ones it is not: outer steps are hidden or need not be."""
    short, long = (joined(tmp_path / str(step_s), step_s, groups=words) for step_s in (SHORT_S, LONG_S))
    assert short != long
    assert (short.utilisation or 1.0) < (long.utilisation or 0.0)


@pytest.mark.parametrize("group", [0, 1])
def test_a_group_that_comes_later_and_measures_otherwise_chooses_as_the_first(
    group: int, joined: Callable[..., Choice], tmp_path: Path
) -> None:
    first = joined(tmp_path, SHORT_S)
    again = {"lighthouse": "http://localhost:2", "min_groups": 2}  # which is another one at each start
    assert joined(tmp_path, LONG_S, group, groups=again) == first
    assert joined(tmp_path / "elsewhere", LONG_S) != first


@pytest.mark.parametrize(
    "tables",
    [{"links": {"bandwidth_mbit_s": 99.0}}, {"groups": {"mode": "diloco"}}, {"train": {"batch_size": 64}}],
    ids=["link", "groups", "batch"],
)
def test_where_the_recipe_has_changed_it_is_measured_anew(
    tables: dict[str, dict[str, object]], joined: Callable[..., Choice], tmp_path: Path
) -> None:
    joined(tmp_path, SHORT_S)
    assert joined(tmp_path, LONG_S, **tables) == joined(tmp_path / "new", LONG_S, **tables)
    assert joined(tmp_path, LONG_S, **tables) != joined(tmp_path / "newer", SHORT_S, **tables)


@pytest.mark.parametrize("content", ["{}", '{"step_s": 0.0}', '{"step_s": "long"}', "[]", "{"])
def test_a_damaged_estimate_is_named(content: str, joined: Callable[..., Choice], tmp_path: Path) -> None:
    joined(tmp_path, SHORT_S)
    (kept,) = (tmp_path / "groups").iterdir()
    kept.write_text(content)
    with pytest.raises(RunDirectoryError, match=str(kept)):
        joined(tmp_path, SHORT_S)
