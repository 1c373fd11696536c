"""Taking the steps: what a finished step made is not made again, so a voyage that was interrupted or failed goes on
where it was when it is called again with the same recipe.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from crosschip import __version__
from crosschip.errors import CrosschipError, RunDirectoryError
from crosschip.recipe import Recipe, load_recipe, parse_recipe
from crosschip.rewards.of_recipe import check_checkers
from crosschip.rundir import RunDirectory, read_json, write_json, write_text
from crosschip.voyage.state import DOCUMENT, Step, Voyage, differences
from crosschip.voyage.steps import STEPS, target_of

__all__ = ["run_voyage"]

SCHEMA_VERSION = 1


def run_voyage(
    recipe_path: Path,
    out: Path | None = None,
    overrides: list[str] | None = None,
    serve: bool = False,
    host: str = "127.0.0.1",
    port: int = 8000,
) -> RunDirectory:
    """Take every step of `STEPS` that is not done yet, write the page, print the summary; with `serve`, stay up.

    Args:
        recipe_path: the TOML file.
        out: the run directory; `runs/NAME` when `None`.
        overrides: `KEY=VALUE` settings over the recipe.
        serve: serve the handed-off model at the end.
        host: the address to listen on.
        port: the port to listen on; 0 lets the system choose.

    Raises:
        RecipeError: a recipe that cannot be honoured.
        DataError: it wants problems asked that there are not.
        RunDirectoryError: the directory is in use, or holds the voyage of another recipe.
        ServeError: `serve` was asked for and the address cannot be had.
        CrosschipError: what a step raised, after it was recorded and the page was written.
        KeyboardInterrupt: the voyage was interrupted; what is done is kept.
    """
    recipe = load_recipe(recipe_path, overrides)
    check_checkers(recipe)
    _check_problems(recipe)
    if serve:
        _check_address(host, port)
    run = RunDirectory(out or Path("runs") / recipe.name)
    command = [str(recipe_path), *(["--out", str(out)] if out else [])]
    command += [part for override in overrides or [] for part in ("--set", override)]
    voyage = Voyage(recipe, recipe_path, overrides or [], run, command, STEPS)
    with run.lock():
        _open(voyage, recipe_path)
        _take_steps(voyage)
    if serve:
        _serve(voyage, host, port)
    return run


def _check_problems(recipe: Recipe) -> None:
    """Problems that there are not are told now and not after the training."""
    from crosschip.train.evaluate.of_recipe import check_problems

    check_problems(recipe)


def _open(voyage: Voyage, recipe_path: Path) -> None:
    """Begin a new voyage, or take up the one that the directory holds."""
    run = voyage.run
    _check_same_recipe(voyage)
    voyage.document = {
        "schema_version": SCHEMA_VERSION,
        "crosschip": __version__,
        "began": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "finished": False,
        "steps": [],
    }
    if (run.path / DOCUMENT).exists():
        earlier = read_json(run.path / DOCUMENT)
        version = earlier.get("schema_version") if isinstance(earlier, dict) else None
        if not isinstance(version, int) or version > SCHEMA_VERSION:
            raise RunDirectoryError(
                f"{run.path / DOCUMENT} has schema version {version!r}; this crosschip reads up to {SCHEMA_VERSION}",
                "update crosschip, or give another --out",
            )
        voyage.document = earlier | {"finished": False}
    write_text(run.recipe, recipe_path.read_text(encoding="utf-8"))
    write_json(run.resolved_recipe, voyage.recipe.model_dump(mode="json"))
    voyage.save()


def _check_same_recipe(voyage: Voyage) -> None:
    """Refuse to mix two recipes. Until something is trained, the chip that trains and what is asked of it may change:
    that is what the step which examines it advises when the chip fails.
    """
    path = voyage.run.resolved_recipe
    if not path.exists():
        return
    before = parse_recipe(read_json(path), str(path)).model_dump(mode="json")
    now = voyage.recipe.model_dump(mode="json")
    if not (voyage.run.path / "train").exists():
        before["qualify"], before["chips"]["train"] = now["qualify"], now["chips"]["train"]
    differing = differences(before, now)
    if differing:
        raise RunDirectoryError(
            f"{voyage.run.path} holds the run of another recipe: {'; '.join(differing)}",
            "set these keys back to go on with that run, or give another --out to begin a new one",
        )


def _take_steps(voyage: Voyage) -> None:
    from crosschip.report import voyage_summary, write_run_page

    anew = False  # once a step is taken, what later steps made of its earlier result is out of date
    for number, step in enumerate(voyage.steps, start=1):
        header = f"[{number}/{len(voyage.steps)}] {step.title}"
        recorded = voyage.record_of(step.name)
        if not anew and recorded is not None and _is_done(voyage, step, recorded):
            print(f"{header}: done before ({recorded['outcome']})", flush=True)
            continue
        anew = anew or step.is_there is not None
        print(header, flush=True)
        _take(voyage, step, recorded)
    voyage.document["finished"] = True
    voyage.save()
    write_run_page(voyage.run)
    print(f"\n{voyage_summary(voyage.run)}", flush=True)


def _is_done(voyage: Voyage, step: Step, recorded: dict[str, Any]) -> bool:
    return step.is_there is not None and recorded["state"] == "finished" and step.is_there(voyage)


def _take(voyage: Voyage, step: Step, recorded: dict[str, Any] | None) -> None:
    """Take one step and record how it ended. An unfinished step's earlier time counts with what it takes now."""
    earlier_s = recorded["seconds"] if recorded is not None and recorded["state"] != "finished" else 0.0
    began = time.monotonic()
    state, outcome = "failed", ""
    try:
        outcome = step.act(voyage)
        state = "finished"
    except KeyboardInterrupt:
        state, outcome = "interrupted", "interrupted"
        raise
    except CrosschipError as error:
        outcome = error.problem
        raise
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
        raise
    finally:
        seconds = round(time.monotonic() - began, 3)
        _record(voyage, step, state, outcome, round(earlier_s + seconds, 3))
        if state == "finished":
            print(f"      {outcome} ({seconds:.1f} s)", flush=True)
        else:
            _tell_what_is_kept(voyage, step, state)


def _record(voyage: Voyage, step: Step, state: str, outcome: str, seconds: float) -> None:
    """Put the step's record in its place and save; records of later steps are of an earlier result and go."""
    names = [known.name for known in voyage.steps]
    place = names.index(step.name)
    records = {one["name"]: one for one in voyage.document["steps"]}
    records[step.name] = {
        "name": step.name,
        "title": step.title,
        "state": state,
        "seconds": seconds,
        "outcome": outcome,
    }
    valid = names if step.is_there is None else names[: place + 1]
    voyage.document["steps"] = [records[name] for name in valid if name in records]
    voyage.save()


def _tell_what_is_kept(voyage: Voyage, step: Step, state: str) -> None:
    from crosschip.report import write_run_page

    finished = [one["title"] for one in voyage.document["steps"] if one["state"] == "finished"]
    print(f"\n{step.title}: {state}", flush=True)
    print(f"  kept in {voyage.run.path}: {', '.join(finished) or 'nothing yet'}, and what this step saved", flush=True)
    print(f"  go on from here with: {voyage.again()}", flush=True)
    try:
        print(f"  the run so far as a page: {write_run_page(voyage.run)}", flush=True)
    except Exception as error:  # the step's own error is the one to be seen
        print(f"  the page could not be written: {type(error).__name__}: {error}", flush=True)


def _check_address(host: str, port: int) -> None:
    """A port that is taken is told now and not after the training."""
    from crosschip.serve.api.server import bind

    bind(host, port).close()


def _serve(voyage: Voyage, host: str, port: int) -> None:
    from crosschip.serve import serve

    settings = voyage.recipe.serve
    serve(
        target_of(voyage),
        host=host,
        port=port,
        device=voyage.recipe.chips.serve,
        max_batch_size=settings.max_batch_size,
        max_model_len=settings.max_model_len,
    )
