"""`crosschip run`: the whole voyage of a recipe on one machine, step by step, each recorded when it is done.

The steps are the data in `STEPS`; a new verb joins the voyage by one more entry. What a finished step made is not made
again: a voyage that was interrupted or failed goes on where it was when it is called again with the same recipe.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosschip import __version__
from crosschip.errors import CrosschipError, RunDirectoryError, UnfitChipError
from crosschip.recipe import Recipe, load_recipe, parse_recipe
from crosschip.rundir import RunDirectory, is_complete, read_json, write_json, write_text

if TYPE_CHECKING:
    from crosschip.chips import Chip

__all__ = ["STEPS", "Step", "Voyage", "run_voyage"]

SCHEMA_VERSION = 1
DOCUMENT = "voyage.json"


@dataclass
class Voyage:
    """A voyage under way. `document` is what voyage.json holds: steps, chips, agreement."""

    recipe: Recipe
    recipe_path: Path
    overrides: list[str]
    run: RunDirectory
    command: list[str]  # what follows `crosschip run`, to say how to go on
    steps: tuple[Step, ...]
    document: dict[str, Any] = field(default_factory=dict)

    def record_of(self, name: str) -> dict[str, Any] | None:
        """What is recorded about a step, or `None`."""
        return next((step for step in self.document["steps"] if step["name"] == name), None)

    def save(self) -> None:
        """Write voyage.json."""
        write_json(self.run.path / DOCUMENT, self.document)


@dataclass(frozen=True)
class Step:
    """A named part of the voyage. `act` does it and returns its outcome in words.

    `is_there` tells whether what a finished step made still exists; without it the step is taken on every call.
    """

    name: str
    title: str
    act: Callable[[Voyage], str]
    is_there: Callable[[Voyage], bool] | None = None


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
        RunDirectoryError: the directory is in use, or holds the voyage of another recipe.
        ServeError: `serve` was asked for and the address cannot be had.
        CrosschipError: what a step raised, after it was recorded and the page was written.
        KeyboardInterrupt: the voyage was interrupted; what is done is kept.
    """
    recipe = load_recipe(recipe_path, overrides)
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
    path = voyage.run.resolved_recipe
    if not path.exists():
        return
    before = parse_recipe(read_json(path), str(path)).model_dump(mode="json")
    differing = _differences(before, voyage.recipe.model_dump(mode="json"))
    if differing:
        raise RunDirectoryError(
            f"{voyage.run.path} holds the run of another recipe: {'; '.join(differing)}",
            "set these keys back to go on with that run, or give another --out to begin a new one",
        )


def _differences(before: Any, now: Any, key: str = "") -> list[str]:
    """`train.steps was 600 and is now 700` for each leaf that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = list(dict.fromkeys([*before, *now]))
        inside = ((name, f"{key}.{name}" if key else name) for name in names)
        return [found for name, path in inside for found in _differences(before.get(name), now.get(name), path)]
    return [] if before == now else [f"{key} was {before!r} and is now {now!r}"]


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
    print(f"  go on from here with: {_again(voyage)}", flush=True)
    try:
        print(f"  the run so far as a page: {write_run_page(voyage.run)}", flush=True)
    except Exception as error:  # the step's own error is the one to be seen
        print(f"  the page could not be written: {type(error).__name__}: {error}", flush=True)


def _find_chips(voyage: Voyage) -> str:
    from crosschip.chips import find_chip, fingerprint

    before = voyage.document.get("chips", {})
    chips: dict[str, Any] = {}
    outcomes = []
    for role, wanted in (("train", voyage.recipe.chips.train), ("serve", voyage.recipe.chips.serve)):
        chip = find_chip(wanted)
        reason = _why(role, wanted, chip)
        chips[role] = {"name": chip.name, "reason": reason, "fingerprint": fingerprint(chip)}
        outcomes.append(f"{role} on {chip.name} ({reason})")
        changed = _differences(before[role]["fingerprint"], chips[role]["fingerprint"]) if role in before else []
        if changed:
            outcomes.append(f"{len(changed)} facts differ from the call before, first {changed[0]}")
    voyage.document["chips"] = chips
    return "; ".join(outcomes)


def _why(role: str, wanted: str, chip: Chip) -> str:
    if wanted != "auto":
        return f"the recipe says chips.{role} = {wanted!r}"
    if chip.device.type == "cpu":
        return "torch finds no accelerator"
    return "the first accelerator that torch finds"


def _qualify(voyage: Voyage) -> str:
    """Examine the chip that trains with what it is to train; a chip that fails stops the voyage here."""
    from crosschip.qualify.programme import Request, named_exams
    from crosschip.qualify.qualification import qualify
    from crosschip.report.qualify_page import write_qualification_page

    settings, report = voyage.recipe.qualify, _qualification(voyage)
    if settings.time_s == 0:
        return "left out: qualify.time_s is 0"
    exams = named_exams(_EXAMS_BEFORE_TRAINING)
    chip = voyage.recipe.chips.train
    request = Request(str(voyage.run.path), chip, "train", "smoke", report, time_s=settings.time_s, exams=exams)
    document = qualify(request)
    write_qualification_page(report)
    outcome = f"{document['verdict']}: {document['chip']} to train"
    worst = [finding for finding in document["findings"] if finding["verdict"] == document["verdict"]]
    if worst:
        outcome += f"; {worst[0]['subject']}: {worst[0]['message']} ({len(document['findings'])} findings in {report})"
    if document["verdict"] == "FAIL" and settings.on_fail == "stop":
        raise UnfitChipError(
            outcome,
            "give the vendor the reproducers beside the report; train on another chip (--set chips.train=cpu), or all "
            "the same with --set 'qualify.on_fail=\"go on\"'",
        )
    return outcome


# The rehearsal and the matrix of determinism take longer; `crosschip qualify` has them.
_EXAMS_BEFORE_TRAINING = ("software", "special_values", "operators", "attention")


def _qualification(voyage: Voyage) -> Path:
    return voyage.run.qualification(voyage.recipe.chips.train, "train")


def _is_qualified(voyage: Voyage) -> bool:
    report = _qualification(voyage)
    if voyage.recipe.qualify.time_s == 0:
        return True
    if not report.exists():
        return False
    document = read_json(report)
    return bool(document["complete"]) and (document["verdict"] != "FAIL" or voyage.recipe.qualify.on_fail == "go on")


def _train(voyage: Voyage) -> str:
    """Train as `crosschip train` does, watched by a supervisor: what hangs or dies is started again."""
    from crosschip.train.launching import TrainCommand, train_to_the_end

    # Whatever an earlier call trained is gone on with; without anything trained there is nothing to resume.
    resume = (voyage.run.path / "train").is_dir()
    overrides = [part for override in voyage.overrides for part in ("--set", override)]
    arguments = ["train", str(voyage.recipe_path), "--out", str(voyage.run.path), *overrides]
    train_to_the_end(TrainCommand(voyage.recipe, voyage.run, arguments, resume, 1, None, go_on_with=_again(voyage)))
    return ", ".join(f"{name} {_trained_steps(voyage, name)} steps" for name, _ in voyage.recipe.stages)


def _trained_steps(voyage: Voyage, stage: str) -> int:
    """The step of a stage's newest checkpoint."""
    return max(int(path.name.removeprefix("step-")) for path in voyage.run.stage(stage).glob("checkpoints/step-*"))


def _again(voyage: Voyage) -> str:
    return shlex.join(["crosschip", "run", *voyage.command])


def _is_trained(voyage: Voyage) -> bool:
    return all(any(voyage.run.stage(name).glob("checkpoints/step-*")) for name, _ in voyage.recipe.stages)


def _evaluate(voyage: Voyage) -> str:
    from crosschip.report.answers import score_sentence
    from crosschip.train import evaluate_recipe

    if voyage.recipe.evaluate is None:
        return "left out: the recipe has no [evaluate]"
    document = evaluate_recipe(voyage.recipe, voyage.run)
    return score_sentence(document["num_right"], document["num_problems"])


def _is_evaluated(voyage: Voyage) -> bool:
    return voyage.recipe.evaluate is None or voyage.run.evaluation.exists()


def _target(voyage: Voyage) -> Path:
    return voyage.run.handoff(voyage.recipe.handoff.target)


def _record_golden(voyage: Voyage) -> str:
    """What the trained model answers on the chip that trained it, in the dtype that is handed off."""
    import torch

    from crosschip.chips import find_chip
    from crosschip.data.validation_rows import validation_rows
    from crosschip.golden.record import record

    dtype = getattr(torch, voyage.recipe.handoff.dtype)
    chip = find_chip(voyage.recipe.chips.train)
    manifest = record(
        voyage.run.path, chip, _golden(voyage), dtype=dtype, token_rows=validation_rows(voyage.run), tell=_tell
    )
    num_tokens = sum(row["length"] for row in manifest["rows"])
    noise = manifest["noise_floor"]["mean_kl"]
    return f"{num_tokens} tokens on {manifest['recorded_on']}, whose own noise is a mean KL of {noise:.1e}"


def _golden(voyage: Voyage) -> Path:
    return voyage.run.path / "golden"


def _tell(line: str) -> None:
    print(f"  {line}", flush=True)


def _hand_off(voyage: Voyage) -> str:
    """Write the files and certify them; a certificate that says FAIL does not end the voyage, and serving says so."""
    from crosschip.handoff.handing_off import hand_off

    settings, chip = voyage.recipe.handoff, voyage.recipe.chips.serve
    made = hand_off(voyage.run, settings.target, golden=_golden(voyage), engines=("model", "native"), chip=chip)
    return f"{_target(voyage)} ({settings.dtype}), certificate {made.certificate.document['verdict']}"


def _compare(voyage: Voyage) -> str:
    from crosschip.agreement import compare_answers

    voyage.document.pop("agreement", None)
    return compare_answers(voyage.recipe, voyage.run, _target(voyage), voyage.document)


def _check_address(host: str, port: int) -> None:
    """A port that is taken is told now and not after the training."""
    from crosschip.serve.api.server import bind

    bind(host, port).close()


def _serve(voyage: Voyage, host: str, port: int) -> None:
    from crosschip.serve import serve

    settings = voyage.recipe.serve
    serve(
        _target(voyage),
        host=host,
        port=port,
        device=voyage.recipe.chips.serve,
        max_batch_size=settings.max_batch_size,
        max_model_len=settings.max_model_len,
    )


STEPS = (
    Step("chips", "Find the chips", _find_chips),
    Step("qualify", "Examine the chip that trains", _qualify, _is_qualified),
    Step("train", "Train", _train, _is_trained),
    Step("evaluate", "Evaluate on held-out problems", _evaluate, _is_evaluated),
    Step("golden", "Record the golden bundle", _record_golden, lambda voyage: is_complete(_golden(voyage))),
    Step("handoff", "Hand off and certify", _hand_off, lambda voyage: is_complete(_target(voyage))),
    Step(
        "compare", "Load the handoff and compare answers", _compare, lambda voyage: "num_parameters" in voyage.document
    ),
)
