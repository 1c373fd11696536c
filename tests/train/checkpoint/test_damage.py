"""Whatever happens to a checkpoint's files, it is named and the one before is taken."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_parts import new_model, state_of, trained

from crosschip.errors import CheckpointError, ModelError
from crosschip.model import load_model
from crosschip.rundir import write_json
from crosschip.train.checkpoint import clear_leftovers, find_newest, save_checkpoint, set_damaged_aside
from crosschip.train.checkpoint.directory import damage

FILES = ["dcp/__0_0.distcp", "dcp/.metadata", "config.json", "checksums.json", "state.json"]


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Two whole checkpoints, the older first."""
    model, optimizer = trained(1)
    older, newer = (save_checkpoint(tmp_path, model, optimizer, state_of(step), keep=2) for step in (1, 2))
    assert find_newest(tmp_path, warn=pytest.fail) == newer
    return older, newer


# Keys that `state.json` has got since the marker holds its sum.
NEWER = ("num_processes", "expert_parallel", "began_from")


def make_old(path: Path) -> None:
    """As an older crosschip wrote it: an empty marker, and fewer keys."""
    document = json.loads((path / "state.json").read_text())
    write_json(path / "state.json", {key: value for key, value in document.items() if key not in NEWER})
    (path / "COMPLETE").write_text("")


def cut_to_nothing(file: Path) -> None:
    os.truncate(file, 0)


def cut_last_block(file: Path) -> None:
    os.truncate(file, max(0, file.stat().st_size - 512))


def cut_in_the_weights(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 8)


def zero_last_block(file: Path) -> None:
    size = file.stat().st_size
    os.truncate(file, max(0, size - 512))
    os.truncate(file, size)  # its length is on the disk, its last block is not: after a power cut


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def remove(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("harm", [cut_to_nothing, cut_last_block, zero_last_block, flip_a_byte, remove])
@pytest.mark.parametrize("file", FILES)
def test_damage_is_named_and_passed_over(two, tmp_path, file: str, harm: Callable[[Path], None]) -> None:
    older, newer = two
    harm(newer / file)
    told: list[str] = []
    assert find_newest(tmp_path, told.append) == older
    assert len(told) == 1
    assert f"step-00000002: {file}" in told[0]
    assert [path.name for path in set_damaged_aside(tmp_path, 1)] == ["damaged-step-00000002"]
    assert find_newest(tmp_path, warn=pytest.fail) == older


@pytest.mark.parametrize("file", ["state.json", "COMPLETE"])
def test_a_single_bit_of_the_sums_or_of_their_sum_is_seen(two, file: str) -> None:
    path = two[1] / file
    content = path.read_bytes()
    for place in range(0, len(content) - 1, max(1, len(content) // 40)):  # but the newline that ends the marker
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert damage(two[1]) == "state.json has another SHA-256 than COMPLETE says", place
    path.write_bytes(content)
    assert damage(two[1]) is None


def test_an_empty_marker_beside_what_is_newer_has_been_cut(two, tmp_path) -> None:
    older, newer = two
    (newer / "COMPLETE").write_text("")
    told: list[str] = []
    assert find_newest(tmp_path, told.append) == older
    assert "COMPLETE is empty, and whoever writes such a state.json puts its SHA-256 there" in told[0]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"step": 3}, "state.json has step 3"),
        ({"step": "2"}, "state.json has '2' for step"),
        ({"sequences_consumed": None}, "state.json has None for sequences_consumed"),
        ({"settings": {}}, "state.json has None for the settings of its stage"),
        ({"schema_version": 66}, "state.json is of no version that has an empty COMPLETE"),
        ({"tokens_consumed": ...}, "state.json has no tokens_consumed"),
        ({"num_processes": 1}, None),
    ],
)
def test_an_empty_marker_is_of_the_old_form_whose_state_has_to_make_sense(two, changed, named) -> None:
    path = two[1]
    make_old(path)
    assert damage(path) is None
    document = json.loads((path / "state.json").read_text()) | changed
    write_json(path / "state.json", {key: value for key, value in document.items() if value is not ...})
    assert damage(path) == named


def test_a_table_of_files_that_is_not_one_is_damage(two, tmp_path) -> None:
    older, newer = two
    make_old(newer)
    for files in ({"dcp/.metadata": {"bytes": "many"}}, [], None, {"config.json": {}}):
        write_json(newer / "state.json", {**json.loads((newer / "state.json").read_text()), "files": files})
        told: list[str] = []
        assert find_newest(tmp_path, told.append) == older
        assert "state.json has no table of files" in told[0]


def test_a_surplus_file_is_no_damage(two, tmp_path) -> None:
    (two[1] / "notes.txt").write_text("mine")
    assert find_newest(tmp_path, warn=pytest.fail) == two[1]


def test_when_all_are_damaged_each_is_named(two, tmp_path) -> None:
    for path in two:
        remove(path / "dcp" / ".metadata")
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole:.*step-00000002.*step-00000001"):
        find_newest(tmp_path, warn=lambda told: None)


def test_one_found_wrong_is_passed_over(two, tmp_path) -> None:
    older, newer = two
    write_json(newer / "verified.json", {"schema_version": 1, "verdict": "right", "detail": "same"})
    assert find_newest(tmp_path, warn=pytest.fail) == newer
    write_json(newer / "verified.json", {"schema_version": 1, "verdict": "wrong", "detail": "other numbers"})
    told: list[str] = []
    assert find_newest(tmp_path, told.append) == older
    assert "other numbers" in told[0]
    (newer / "verified.json").write_text("{torn")
    assert find_newest(tmp_path, warn=pytest.fail) == newer, "a verdict torn by a crash is none"


@pytest.mark.parametrize("file", ["dcp/__0_0.distcp", "dcp/.metadata"])
@pytest.mark.parametrize("harm", [cut_to_nothing, cut_in_the_weights, remove])
def test_reading_without_looking_for_damage_first_ends_in_an_error_that_names_it(two, file, harm) -> None:
    harm(two[1] / file)
    with pytest.raises(ModelError, match="step-00000002"):
        load_model(two[1])


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("exploded",)


def test_an_index_can_hold_no_code(two, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (two[1] / "dcp" / ".metadata").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ModelError, match=r"\.metadata is damaged: it names (posix|nt)\.mkdir"):
        load_model(two[1])
    assert not (tmp_path / "exploded").exists()
    pickle.loads((two[1] / "dcp" / ".metadata").read_bytes())
    assert (tmp_path / "exploded").exists(), "it was one that goes off"


def test_a_module_reached_through_another_is_refused(two, tmp_path) -> None:
    through = b"\x80\x04\x8c\x29torch.distributed.checkpoint.filesystem\x94\x8c\x08os.mkdir\x94\x93\x94."
    through = through.replace(b"\x29", bytes([len("torch.distributed.checkpoint.filesystem")]))
    (two[1] / "dcp" / ".metadata").write_bytes(through)
    with pytest.raises(ModelError, match=r"it names torch.distributed.checkpoint.filesystem.os.mkdir"):
        load_model(two[1])


def test_weights_of_another_architecture_are_refused(two, tmp_path) -> None:
    for settings, named in (({"hidden_size": 64}, "has shape"), ({"num_hidden_layers": 3}, "layers.2")):
        config = new_model(**settings).config.to_hf()
        write_json(two[1] / "config.json", config)
        with pytest.raises(ModelError, match=named):
            load_model(two[1])


def test_leftovers_of_killed_saves_are_removed(two, tmp_path) -> None:
    checkpoints = two[0].parent
    for name in (".step-00000003.tmp", ".step-00000004.77.tmp", ".step-00000001.old"):
        (checkpoints / name / "dcp").mkdir(parents=True)
    assert len(clear_leftovers(tmp_path)) == 3
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000001", "step-00000002"]


def test_one_killed_while_it_was_replaced_is_brought_back(two, tmp_path) -> None:
    two[1].rename(two[1].with_name(".step-00000002.old"))
    clear_leftovers(tmp_path)
    assert find_newest(tmp_path, warn=pytest.fail) == two[1]
