"""What clients are told about the model's directory: not where it is on the server."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from crosschip.errors import ServeError
from crosschip.serve.api.served import DefaultSampling, _default_sampling, _shown

PATH = Path("model/generation_config.json")


def test_a_directory_is_told_by_its_name_or_its_place_in_its_run(tmp_path: Path) -> None:
    model = tmp_path / "runs" / "first" / "handoff" / "hf"
    model.mkdir(parents=True)
    assert _shown(model / "alone") == "alone"
    (tmp_path / "runs" / "first" / "resolved.json").write_text("{}")
    assert _shown(model) == "first/handoff/hf"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", True),
        ("top_p", 1.5),
        ("top_p", 0),
        ("top_p", [0.9]),
        ("top_k", 2.5),
        ("top_k", math.inf),
        ("top_k", "50"),
    ],
)
def test_a_default_that_nothing_can_be_drawn_by_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ServeError, match="generation_config") as refusal:
        _default_sampling({name: value}, PATH)
    assert f"the default {name} is {value!r}" in refusal.value.problem


def test_a_default_is_taken_as_it_stands() -> None:
    written = {"temperature": 0.0, "top_p": 0.9, "top_k": 50.0, "do_sample": True}
    assert _default_sampling(written, PATH) == DefaultSampling(0.0, 0.9, 50)
    assert _default_sampling({"temperature": None, "top_k": -1}, PATH) == DefaultSampling(1.0, 1.0, -1)
    assert _default_sampling(written | {"do_sample": False}, PATH) == DefaultSampling(0.0)
