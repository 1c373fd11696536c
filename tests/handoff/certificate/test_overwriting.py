"""Weights put over others in a running engine: an honest engine, one that keeps the old ones, and one that refuses."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from crosschip.golden.bundle import Bundle
from crosschip.handoff.certificate import overwriting
from crosschip.handoff.certificate.overwriting import exchange_layers, overwrite_gate

Exported = Callable[[str], Path]


def test_the_other_weights_are_the_same_numbers_in_other_layers(exported: Exported, tmp_path: Path) -> None:
    directory = exported("hf")
    num_changed = exchange_layers(directory, tmp_path)
    before, after = (load_file(each / "model.safetensors") for each in (directory, tmp_path))
    assert {name: each.shape for name, each in before.items()} == {name: each.shape for name, each in after.items()}
    different = [name for name in before if not torch.equal(before[name], after[name])]
    assert 10 < len(different) <= num_changed
    assert not {"model.embed_tokens.weight", "lm_head.weight"} & set(different)
    assert sum(each.double().sum() for each in before.values()) == pytest.approx(
        float(sum(each.double().sum() for each in after.values()))
    )
    assert (tmp_path / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()


def test_some_rows_of_all_lengths_are_asked() -> None:
    for count in (1, 3, 8, 9, 15, 40):
        lengths = [len(row) for row in overwriting._some([[1] * length for length in range(1, count + 1)])]
        assert len(lengths) <= 8
        assert lengths[0] == 1
        assert lengths[-1] >= count - count // 8 - 1
    assert overwriting._some([]) == []


def test_other_weights_that_cannot_be_made_are_not_covered(
    exported: Exported, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(overwriting, "scratch_directory", refuse)
    gate = overwrite_gate(exported("hf"), bundle.rows, "cpu", "float32")
    assert gate.verdict == "NOT COVERED"
    assert "Permission denied" in gate.message


def test_an_honest_engine_is_that_of_a_cold_start_and_leaves_nothing_behind(exported: Exported, bundle: Bundle) -> None:
    directory = exported("hf")
    before = sorted(path.name for path in directory.parent.iterdir())
    gate = overwrite_gate(directory, bundle.rows, "cpu", "float32")
    assert gate.verdict == "PASS", gate.message
    assert {m.what: m.value for m in gate.measures}["log-probs that differ from a cold start"] == 0
    assert sorted(path.name for path in directory.parent.iterdir()) == before


def test_an_engine_that_keeps_the_old_weights_fails(
    exported: Exported, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overwriting, "_PROGRAM", "tests.handoff.certificate.stale_engine")
    gate = overwrite_gate(exported("hf"), bundle.rows, "cpu", "float32")
    assert (gate.verdict, gate.subject) == ("FAIL", "the engine")
    assert "log-probs are not a cold start's" in gate.message


def test_an_engine_that_dies_says_nothing_for_or_against(
    exported: Exported, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overwriting, "_PROGRAM", "tests.handoff.certificate.no_such_engine")
    gate = overwrite_gate(exported("hf"), bundle.rows, "cpu", "float32")
    assert gate.verdict == "NOT COVERED"
    assert "No module named" in gate.message


@pytest.mark.parametrize("prompts", ["", "not JSON", '["a"]', "[]", "{}"])
def test_prompts_that_are_none_are_refused_by_what_was_read(prompts: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "crosschip", "handoff", "overwrite", str(tmp_path), str(tmp_path)]
    ended = subprocess.run(command, input=prompts, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ("is no list of token ids" if prompts else "no prompt came") in ended.stderr
