"""docs/recipe.md describes every key of the recipe with its true default, and no other; the README's recipe is one."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic_core import PydanticUndefined

from crosschip import recipe
from crosschip.recipe import load_recipe, parse_recipe
from crosschip.train.guard.restarts import Kind

ROOT = Path(__file__).parent.parent
HEADINGS = {
    "The file itself": recipe.Recipe,
    "[chips]": recipe.ChipSettings,
    "[qualify]": recipe.QualifySettings,
    "[guard]": recipe.GuardSettings,
    "[model]": recipe.ModelSettings,
    "[tokenizer]": recipe.TokenizerSettings,
    "[data]": recipe.DataSettings,
    "[train] and [sft]": recipe.StageSettings,
    "[rl]": recipe.RlSettings,
    "[rl.rollouts]": recipe.RolloutSettings,
    "[[then]]": recipe.FurtherFineTuning,
    "[parallel]": recipe.ParallelSettings,
    "[groups]": recipe.GroupSettings,
    "[links]": recipe.LinkSettings,
    "[evaluate]": recipe.EvaluateSettings,
    "[handoff]": recipe.HandoffSettings,
    "[serve]": recipe.ServeSettings,
}


def documented() -> dict[str, dict[str, str]]:
    """Heading -> key -> the default as it is written."""
    tables: dict[str, dict[str, str]] = {}
    heading = ""
    for line in (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            heading = line[3:].replace("`", "")
        row = re.match(r"\| `(\w+)` \| (.*?) ?\|", line)
        if row:
            tables.setdefault(heading, {})[row.group(1)] = row.group(2).strip().strip("`")
    return tables


def default_of(text: str) -> Any:
    if text == "":
        return PydanticUndefined
    return None if text == "none" else tomllib.loads(f"value = {text}")["value"]


def _plain(default: Any) -> Any:
    """A default as TOML has it."""
    if isinstance(default, list):
        return [_plain(each) for each in default]
    return default.model_dump() if isinstance(default, recipe.RewardSettings) else default


def test_every_table_of_the_recipe_has_its_heading() -> None:
    assert set(documented()) == set(HEADINGS)
    tables = {name for name, field in recipe.Recipe.model_fields.items() if name not in ("name", "seed")}
    text = " ".join(documented())
    assert all(f"[{table}]" in text for table in tables)


@pytest.mark.parametrize("heading", HEADINGS)
def test_keys_and_defaults(heading: str) -> None:
    written = documented()[heading]
    fields = {name: _plain(field.default) for name, field in HEADINGS[heading].model_fields.items()}
    if heading in ("[rl]", "[[then]]"):  # keys that a stage has anyway stand there
        common = recipe.StageSettings.model_fields
        same = {name for name, field in common.items() if fields[name] == _plain(field.default)}
        fields = {name: default for name, default in fields.items() if name not in {*same, "batch_size", "rollouts"}}
    if heading == "The file itself":
        fields = {name: fields[name] for name in ("name", "seed")}  # its tables have headings of their own
    assert {name: default_of(text) for name, text in written.items()} == fields


def test_recipe_in_the_readme_is_one() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```toml\n(.*?)```", readme, flags=re.DOTALL)
    assert len(blocks) == 1
    parse_recipe(tomllib.loads(blocks[0]), "README.md")
    assert len(readme.splitlines()) < 150


def test_verbs_of_the_readme_are_those_of_the_command_line() -> None:
    from typer.main import get_command

    from crosschip.cli import app

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    written = set(re.findall(r"^\| `(\w+)` \|.*\| (?:yes|not yet) \|$", readme, flags=re.MULTILINE))
    assert written == set(get_command(app).commands)  # type: ignore[attr-defined]


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_overrides_that_a_document_gives_to_a_shipped_recipe_fit_it(document: Path) -> None:
    for line in document.read_text(encoding="utf-8").splitlines():
        named = re.search(r"crosschip \w+ (recipes/[\w.-]+\.toml)", line)
        if named:
            load_recipe(ROOT / named.group(1), re.findall(r"--set ([\w.]+=[^\s`)]+)", line))


def test_documents_give_overrides() -> None:
    text = "".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    assert len(re.findall(r"crosschip \w+ recipes/\S+ --set ", text)) > 2


def _names_of(expression: ast.expr) -> set[str]:
    if isinstance(expression, ast.IfExp):
        return _names_of(expression.body) | _names_of(expression.orelse)
    word = str(expression.value) if isinstance(expression, ast.Constant) else ""
    return {word} if re.fullmatch(r"[A-Za-z]+(?:[- ][A-Za-z]+)*", word) else set()


def _told(path: Path) -> set[str]:
    """The names of events in a file: of calls that take event, detail and action, behind a step or not."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            first = {"Event": 1, "CheckpointEvent": 1, "GroupEvent": 0, "Suspicion": 0}.get(called)
            if first is None and called in ("_tell", "tell", "put", "event") and len(node.args) in (3, 4):
                first = len(node.args) - 3
            found |= _names_of(node.args[first]) if first is not None and len(node.args) > first else set()
        elif isinstance(node, ast.Tuple) and len(node.elts) == 3 and path.name == "resumption.py":
            found |= _names_of(node.elts[0])
    return found


def test_every_event_is_in_the_documents() -> None:
    files = (ROOT / "crosschip" / "train").rglob("*.py")
    told = set().union(*(_told(file) for file in files)) | set(get_args(Kind))
    assert len(told) > 50
    written = set(re.findall(r"`([^`]+)`", (ROOT / "docs" / "events.md").read_text(encoding="utf-8")))
    assert told - written == set()
