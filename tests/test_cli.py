"""The command line: its options are frozen, its help needs no torch, and every error has its message and exit code."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from crosschip import voyage
from crosschip.cli import app
from crosschip.errors import RecipeError

ROOT = Path(__file__).parent.parent
SNAPSHOT = Path(__file__).parent / "cli_options.txt"
VERBS = [
    *("run", "qualify", "train", "evaluate", "distill", "drill", "serve", "compare", "chat", "doctor"),
    *("handoff", "golden", "plan"),
]
HEAVY = ["torch", "transformers", "numpy", "fastapi", "rich.table", "matplotlib"]

REPORT_MODULES = """
import sys
from crosschip.cli import main
try:
    main()
except SystemExit as end:
    print("exit", end.code)
print("heavy:", [name for name in {heavy} if name in sys.modules])
"""


def described_options() -> str:
    """Every verb with its arguments and options, their defaults, and which are required; one line each."""
    lines = []
    commands = dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    for group in [verb for verb, command in commands.items() if hasattr(command, "commands")]:
        commands |= {f"{group} {verb}": command for verb, command in commands.pop(group).commands.items()}
    for verb, command in commands.items():
        lines.append(verb)
        for parameter in command.params:
            kind = "/".join(parameter.opts) if parameter.param_type_name == "option" else str(parameter.metavar)
            many = " repeatable" if parameter.multiple or parameter.nargs == -1 else ""
            value = "required" if parameter.required else f"default {parameter.default!r}"
            lines.append(f"    {kind}: {value}{many}")
    return "\n".join(lines) + "\n"


def crosschip(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "crosschip", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120, env=environment)


def test_the_options_are_frozen() -> None:
    """Changing an option is a decision: write the file anew with CROSSCHIP_WRITE_SNAPSHOTS=1, and read the diff."""
    if os.environ.get("CROSSCHIP_WRITE_SNAPSHOTS"):
        SNAPSHOT.write_text(described_options(), encoding="utf-8")
    assert described_options() == SNAPSHOT.read_text(encoding="utf-8")


def test_every_verb_of_the_design_has_a_door() -> None:
    assert list(typer.main.get_command(app).commands) == VERBS  # type: ignore[attr-defined]


@pytest.mark.parametrize("verb", [None, *VERBS])
def test_help_needs_nothing_heavy(verb: str | None) -> None:
    arguments = [*([verb] if verb else []), "--help"]
    code = REPORT_MODULES.format(heavy=HEAVY)
    ended = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert ended.stdout.startswith("Usage: ")
    assert ended.stdout.endswith("exit 0\nheavy: []\n")
    assert ended.stderr == ""


def test_the_module_check_sees_torch_when_it_is_imported() -> None:
    code = "import torch\n" + REPORT_MODULES.format(heavy=HEAVY)
    ended = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True)
    assert re.search(r"heavy: \['torch'", ended.stdout)


def test_version() -> None:
    assert re.fullmatch(r"crosschip \d+\.\d+\.\d+\n", crosschip("--version").stdout)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Usage: "),
        (["trian"], "No such command"),
        (["train"], "Missing argument"),
        (["train", "r.toml", "--steps", "3"], "No such option: --steps"),
        (["run", "r.toml", "--port", "70000"], "'--port'"),
        (["qualify", "--model", "r.toml", "--role", "cook"], "cook"),
    ],
)
def test_bad_usage_ends_with_2(arguments: list[str], said: str) -> None:
    ended = CliRunner().invoke(app, arguments)
    assert ended.exit_code == 2
    assert said in ended.output


@pytest.mark.parametrize("verb", ["train", "run"])
def test_a_recipe_that_is_not_there(verb: str, tmp_path: Path) -> None:
    ended = crosschip(verb, "none.toml", cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        "crosschip: no recipe at none.toml\n  what to do: check the path; shipped ones are in recipes/\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_setting_is_told_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('name = "r"\n[data]\nsource = "arithmetic"\n[train]\nsteps = 100\n')
    ended = crosschip("train", "r.toml", "--set", "train.stepz=3", cwd=tmp_path)
    assert ended.returncode == 2
    assert "did you mean 'steps'?" in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["r.toml"]


def test_handing_off_what_is_not_a_run(tmp_path: Path) -> None:
    ended = crosschip("handoff", str(tmp_path), "--to", "hf")
    assert ended.returncode == 2
    assert "neither a model directory (config.json) nor a run" in ended.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("raised", "exit_code", "said"),
    [
        (RecipeError("steps = 0", "raise it"), 2, "crosschip: steps = 0\n  what to do: raise it\n"),
        (KeyboardInterrupt(), 130, "crosschip: interrupted\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "'/x'\n  what to do: give this user"),
        (ValueError("odd"), 4, "ValueError: this is a defect of crosschip"),
        (AssertionError(), 4, "this is a defect of crosschip"),
        (OSError(errno.EBADF, "Bad file descriptor"), 4, "this is a defect of crosschip"),
    ],
)
def test_an_error_becomes_a_message_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, raised: BaseException, exit_code: int, said: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(voyage, "run_voyage", fail)
    ended = CliRunner().invoke(app, ["run", "r.toml"])
    assert ended.exit_code == exit_code
    assert said in ended.stderr
    assert ("Traceback" in ended.stderr) == (exit_code == 4)


def test_options_reach_the_voyage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    data = 'source = "files"\npath = "x.jsonl"\n'
    recipe.write_text(f'name = "r"\n[data]\n{data}[sft]\nsteps = 100\n[sft.data]\n{data}')
    calls: list[tuple[object, dict[str, object]]] = []
    monkeypatch.setattr(voyage, "run_voyage", lambda path, **options: calls.append((path, options)))
    options = [
        "--out",
        "o",
        "--set",
        "seed=3",
        "--set",
        "sft.steps=50",
        "--skip-bad-rows",
        "7",
        "--serve",
        "--port",
        "0",
    ]
    ended = CliRunner().invoke(app, ["run", str(recipe), *options])
    assert (ended.exit_code, ended.output) == (0, "")
    settings = ["seed=3", "sft.steps=50", "data.skip_bad_rows=7", "sft.data.skip_bad_rows=7"]
    expected = {"out": Path("o"), "overrides": settings, "serve": True, "host": "127.0.0.1", "port": 0}
    assert calls == [(recipe, expected)]


@pytest.mark.parametrize("seconds", ["nan", "inf", "-1", "86401"])
def test_a_time_that_is_none_is_refused_before_a_model_is_loaded(seconds: str) -> None:
    ended = CliRunner().invoke(app, ["serve", "/nowhere", "--port", "0", "--drain-s", seconds])
    assert ended.exit_code == 2
    assert "drain-s" in ended.output
    assert "/nowhere" not in ended.output
