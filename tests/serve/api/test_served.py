"""What clients are told about the model's directory: not where it is on the server."""

from __future__ import annotations

from pathlib import Path

from crosschip.serve.api.served import _shown


def test_a_directory_is_told_by_its_name_or_its_place_in_its_run(tmp_path: Path) -> None:
    model = tmp_path / "runs" / "first" / "handoff" / "hf"
    model.mkdir(parents=True)
    assert _shown(model / "alone") == "alone"
    (tmp_path / "runs" / "first" / "resolved.json").write_text("{}")
    assert _shown(model) == "first/handoff/hf"
