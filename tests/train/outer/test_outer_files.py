"""The outer state beside a checkpoint: what was written comes back, and damage or a full disk ends no training."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from crosschip.errors import CheckpointError
from crosschip.train.outer.agreement import begun_anew
from crosschip.train.outer.diloco import DiLoCo, Rhythm
from crosschip.train.outer.outer_files import load_outer_state, save_outer_state

STATE = {"parameters": torch.randn(5000), "momentum": torch.randn(5000), "residual": torch.zeros(5000)}
LAYOUT = {"ranks": 1, "fragments": 1, "parameters": 5000, "cuts": 77}
COUNTS = {"commits": 3, "inner_steps": 0, "tokens_since_0": 0, **LAYOUT}


class OnFiles(DiLoCo):
    """DiLoCo without a sidecar: its state is made up, and it meets nobody."""

    def __init__(self, num_ranks: int = 1, group: int = 0) -> None:
        member = SimpleNamespace(rank=0, size=num_ranks, group=group, num_groups=2)
        config, memory = SimpleNamespace(member=member), SimpleNamespace(begun=0)
        self.handle = SimpleNamespace(config=config, memory=memory)  # type: ignore[assignment]
        self._events = []
        self.loaded: list[dict[str, int]] = []

    def layout(self) -> dict[str, int]:
        return LAYOUT

    def export(self) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        return STATE, COUNTS

    def load(self, tensors: dict[str, torch.Tensor], counts: dict[str, int]) -> None:
        assert all(torch.equal(tensors[name], tensor) for name, tensor in STATE.items())
        self.loaded.append(counts)

    def join(self) -> None:  # type: ignore[override]
        """Nobody is there."""


@contextmanager
def full_disk() -> Iterator[None]:
    """Within it no file gets longer than a page."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def file_of(stage: Path) -> Path:
    (path,) = (stage / "outer").glob("step-*")
    return path


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    groups = OnFiles()
    groups.save(tmp_path, 20)
    groups.resume(tmp_path, 20)
    assert groups.loaded == [COUNTS]
    assert not groups.new_events()


def test_a_full_disk_is_told_and_training_goes_on(tmp_path: Path) -> None:
    groups = OnFiles()
    with full_disk():
        groups.save(tmp_path, 20)
    (event,) = groups.new_events()
    assert event.event == "outer-state-not-saved"
    assert "step 20 could not be written" in event.detail
    assert not list((tmp_path / "outer").iterdir()), "nothing half is left"
    groups.save(tmp_path, 40)
    assert load_outer_state(tmp_path, 0, 40) is not None


@pytest.mark.parametrize("how", ["flipped", "cut"])
def test_damage_is_named_and_the_outer_optimizer_begins_anew(tmp_path: Path, how: str) -> None:
    groups = OnFiles()
    groups.save(tmp_path, 20)
    path = file_of(tmp_path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x40
    path.write_bytes(content if how == "flipped" else content[:-100])
    with pytest.raises(CheckpointError, match=str(path)):
        load_outer_state(tmp_path, 0, 20)
    groups.resume(tmp_path, 20)
    assert not groups.loaded
    (event,) = groups.new_events()
    assert event.event == "damaged-outer-state"
    assert str(path) in event.detail


@pytest.mark.parametrize(
    ("saved", "told"),
    [
        ({"ranks": 2, "cuts": 78}, "2 ranks, now 1"),
        ({"fragments": 2, "cuts": 78}, "2 fragments, now 1"),
        ({"cuts": 78}, "parameters that are cut in another way"),
    ],
)
def test_the_state_of_another_layout_is_told_and_begun_anew(tmp_path: Path, saved: dict[str, int], told: str) -> None:
    save_outer_state(tmp_path, 0, 20, STATE, COUNTS | saved)
    groups = OnFiles()
    groups.resume(tmp_path, 20)
    assert not groups.loaded
    (event,) = groups.new_events()
    assert (event.event, event.detail) == ("other-outer-layout", f"that of step 20 does not fit: {told}")
    assert groups.handle.memory.begun == begun_anew(20, 0, 2)


@pytest.mark.parametrize("counts", [{}, {"tokens_since_1": 0}])
def test_a_state_that_does_not_say_its_layout_is_measured(tmp_path: Path, counts: dict[str, int]) -> None:
    without = {name: number for name, number in COUNTS.items() if name not in LAYOUT}
    save_outer_state(tmp_path, 0, 20, STATE, without | counts)
    groups = OnFiles()
    groups.resume(tmp_path, 20)
    assert len(groups.loaded) == (not counts)
    small = {name: tensor[:100] for name, tensor in STATE.items()}
    save_outer_state(tmp_path, 0, 20, small, without)
    groups.resume(tmp_path, 20)
    assert groups.new_events()[-1].detail.endswith("does not fit: 100 parameters, now 5000")


def test_of_groups_without_a_state_the_first_is_ahead(tmp_path: Path) -> None:
    save_outer_state(tmp_path, 0, 10, STATE, COUNTS)
    groups = [OnFiles(group=number) for number in (0, 1)]
    for each in groups:
        each.resume(tmp_path, 20)
    assert groups[0].handle.memory.begun > groups[1].handle.memory.begun > 0
    assert [event.event for event in groups[1].new_events()] == ["no-outer-state"]


def test_groups_that_come_from_averaging_each_step_stand_alike(tmp_path: Path) -> None:
    groups = [OnFiles(group=number) for number in (0, 1)]
    for each in groups:
        each.resume(tmp_path, 20)
        assert not each.new_events()
    assert groups[0].handle.memory.begun == groups[1].handle.memory.begun > 0
    new = OnFiles()
    new.resume(tmp_path, 0)
    assert new.handle.memory.begun == 0


def test_a_state_can_be_given_before_this_group_has_met_the_others() -> None:
    """As when it goes on in the middle of an interval, and one that has no outer state comes at the same moment."""
    groups = OnFiles()
    groups._state = SimpleNamespace(donate=lambda: ({}, {"step": 40, "sequences": 480, "tokens": 4000}))  # type: ignore[assignment]
    groups._rhythm, groups._inner_steps, groups._place = Rhythm(30, 0, 0.0, batch_size=12), 10, None
    assert groups._donate()[1] == {"step": 60, "sequences": 480 + 20 * 12, "tokens": 6000}


def test_ranks_of_a_group_do_not_begin_anew_alone(tmp_path: Path) -> None:
    groups = OnFiles(num_ranks=2)
    groups.save(tmp_path, 20)
    file_of(tmp_path).write_bytes(b"cut")
    with pytest.raises(CheckpointError):
        groups.resume(tmp_path, 20)


def test_no_room_for_the_directory_is_told_too(tmp_path: Path) -> None:
    groups = OnFiles()
    (tmp_path / "outer").write_text("a file is where the directory should be")
    groups.save(tmp_path, 20)
    assert [event.event for event in groups.new_events()] == ["outer-state-not-saved"]


def test_the_newest_four_are_kept(tmp_path: Path) -> None:
    for step in range(1, 8):
        save_outer_state(tmp_path, 0, step, STATE, COUNTS)
    assert [load_outer_state(tmp_path, 0, step) is not None for step in range(1, 8)] == [False] * 3 + [True] * 4


def test_a_save_after_going_back_is_kept_and_undoes_what_came_later(tmp_path: Path) -> None:
    for step in (20, 40, 60, 80, 100, 30):  # resumed from the checkpoint of step 20: later ones were damaged
        save_outer_state(tmp_path, 0, step, STATE, COUNTS)
    assert load_outer_state(tmp_path, 0, 30) is not None
    assert [path.name for path in sorted((tmp_path / "outer").iterdir())] == ["step-00000030-rank-0.safetensors"]
