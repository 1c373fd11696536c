import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from crosschip import rundir
from crosschip.data import Source, open_source
from crosschip.errors import DataError
from crosschip.recipe import DataSettings

WriteJsonl = Callable[..., Path]


def texts(source: Source, split: str = "train") -> list[str]:
    return [row.as_text() for row in source.rows(split)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("nowhere/rows.jsonl", "does not exist"),
        ("nowhere/*.jsonl", "matches no file"),
        ("{tmp}", "is a directory without files"),
    ],
)
def test_a_missing_file_is_named(tmp_path: Path, path: str, problem: str) -> None:
    with pytest.raises(DataError, match=f"{problem}(?s:.)*relative to"):
        open_source(DataSettings(path=path.replace("{tmp}", str(tmp_path))), 0)


def test_no_path_is_refused() -> None:
    with pytest.raises(DataError, match=r"has no path(?s:.)*arithmetic"):
        open_source(DataSettings(), 0)


def test_an_unknown_ending_asks_for_the_format(tmp_path: Path) -> None:
    path = tmp_path / "book.tex"
    path.write_text("words")
    with pytest.raises(DataError, match=r"ending '\.tex'(?s:.)*data\.format"):
        open_source(DataSettings(path=str(path)), 0)
    assert texts(open_source(DataSettings(path=str(path), format="text", validation_fraction=1e-9), 0)) == ["words"]


@pytest.mark.parametrize("content", ["", "\n\n"])
@pytest.mark.parametrize("ending", ["txt", "jsonl"])
def test_an_empty_set_is_refused(tmp_path: Path, content: str, ending: str) -> None:
    path = tmp_path / f"rows.{ending}"
    path.write_text(content)
    with pytest.raises(DataError, match=r"holds no row: the data set is empty"):
        texts(open_source(DataSettings(path=str(path)), 0))


def test_an_empty_split_is_refused(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl([{"text": "a"}])
    source = open_source(DataSettings(path=str(path), validation_fraction=1e-9), 0)
    with pytest.raises(
        DataError, match=r"none of its 1 rows falls into the validation split(?s:.)*validation_fraction"
    ):
        texts(source, "validation")


def test_directories_and_globs_hold_the_same_rows(tmp_path: Path, write_jsonl: WriteJsonl) -> None:
    (tmp_path / "sub").mkdir()
    write_jsonl([{"text": f"a{i}"} for i in range(50)], "a.jsonl")
    write_jsonl([{"text": f"b{i}"} for i in range(50)], "sub/b.jsonl")
    (tmp_path / "sub" / "c.txt").write_text("c")
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".hidden.txt").write_text("not data")
    directory = open_source(DataSettings(path=str(tmp_path)), 0)
    both = texts(directory) + texts(directory, "validation")
    assert sorted(both) == sorted([f"a{i}" for i in range(50)] + [f"b{i}" for i in range(50)] + ["c"])
    assert directory.notes == [f"1 files of {tmp_path} have another ending and are not read: {tmp_path / 'README.md'}"]
    globbed = open_source(DataSettings(path=f"{tmp_path}/**/*.jsonl"), 0)
    assert sorted(texts(globbed) + texts(globbed, "validation")) == sorted(t for t in both if t != "c")
    assert globbed.notes == []


def test_a_row_is_never_in_both_splits(write_jsonl: WriteJsonl) -> None:
    rows = [{"question": f"What is {i % 150}?", "answer": str(i)} for i in range(600)]  # each question four times
    source = open_source(DataSettings(path=str(write_jsonl(rows)), validation_fraction=0.2), 0)
    questions = [{row.as_messages()[0].content for row in source.rows(split)} for split in ("train", "validation")]
    assert not questions[0] & questions[1]
    assert len(questions[0] | questions[1]) == 150
    assert 10 < len(questions[1]) < 60


def test_the_fingerprint_follows_content_and_settings_not_the_place(tmp_path: Path, write_jsonl: WriteJsonl) -> None:
    path = write_jsonl([{"text": "a"}])
    copy = tmp_path / "copy.jsonl"
    shutil.copy(path, copy)

    def fingerprint(path: Path, **settings: object) -> str:
        return open_source(DataSettings(path=str(path), **settings), 0).fingerprint  # type: ignore[arg-type]

    assert fingerprint(path) == fingerprint(copy)
    assert fingerprint(path) != fingerprint(path, validation_fraction=0.1)
    before = fingerprint(path)
    write_jsonl([{"text": "b"}])
    assert fingerprint(path) != before


def test_hashing_files_beats_with_every_block_and_is_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rundir, "_PIECE_BYTES", 10)
    path = tmp_path / "long.txt"
    path.write_text("words " * 10)
    ours, theirs = (open_source(DataSettings(path=str(path)), 0) for _ in range(2))
    beats: list[None] = []
    digests = ours.find_digests(lambda: beats.append(None))
    assert len(beats) == 6
    theirs.take_digests(digests)
    path.unlink()
    assert ours.fingerprint == theirs.fingerprint


def test_the_fingerprint_of_problems_follows_seed_and_levels() -> None:
    def fingerprint(seed: int, **settings: object) -> str:
        return open_source(DataSettings(source="arithmetic", **settings), seed).fingerprint  # type: ignore[arg-type]

    prints = [fingerprint(0), fingerprint(1), fingerprint(0, levels=[1, 2]), fingerprint(0, num_problems=7)]
    assert len(set(prints)) == 4
    assert fingerprint(0) == prints[0]


def test_problems_are_the_same_each_time() -> None:
    source = open_source(DataSettings(source="arithmetic", num_problems=200), 0)
    assert texts(source) == texts(source)
    assert len(texts(source)) + len(texts(source, "validation")) == 200
