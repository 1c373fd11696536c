"""What the operating system refuses is no defect; our own errors are."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from crosschip.cli.guard import guarded


def ended(raised: BaseException) -> Result:
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    @guarded
    def fail() -> None:
        raise raised

    return CliRunner().invoke(app, [])


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOTDIR, "give a path through directories"),
        (errno.EISDIR, "give a file, not a directory"),
        (errno.EEXIST, "move it away"),
        (errno.ENAMETOOLONG, "give a shorter path"),
        (errno.ELOOP, "give the path itself"),
        (errno.EPERM, "give this user the permission"),
    ],
)
def test_a_place_that_is_refused_is_named_with_its_remedy(number: int, remedy: str) -> None:
    named = ended(OSError(number, "no", "out/x"))
    assert (named.exit_code, "Traceback" in named.stderr) == (2, False)
    assert "'out/x'\n  what to do: " in named.stderr
    assert remedy in named.stderr
    assert ended(OSError(number, "no")).exit_code == 4  # of no place: not of what the user gave


@pytest.mark.parametrize("part", ["file", "file/below", "directory", "n" * 5000])
def test_a_directory_that_cannot_be_made_where_a_file_is_is_refused(tmp_path: Path, part: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "directory").mkdir()
    with pytest.raises(OSError, match=part[:9]) as refused:
        (tmp_path / part).mkdir()
    assert ended(refused.value).exit_code == 2


def test_an_error_without_a_number_is_a_defect() -> None:
    assert ended(OSError("odd")).exit_code == 4
