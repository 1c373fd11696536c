"""The steps of a voyage, as data: a new verb joins it by one more entry in `STEPS`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosschip.checkpoints import complete_checkpoints, step_of
from crosschip.errors import UnfitChipError
from crosschip.rundir import is_complete, read_json
from crosschip.voyage.state import Step, Voyage, differences

if TYPE_CHECKING:
    from crosschip.chips import Chip

__all__ = ["STEPS", "target_of"]


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
        changed = differences(before[role]["fingerprint"], chips[role]["fingerprint"]) if role in before else []
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
    from crosschip.report.qualify_page import page_beside

    settings, report = voyage.recipe.qualify, _qualification(voyage)
    if settings.time_s == 0:
        return "left out: qualify.time_s is 0"
    exams = named_exams(_EXAMS_BEFORE_TRAINING)
    chip = voyage.recipe.chips.train
    request = Request(str(voyage.run.path), chip, "train", "smoke", report, time_s=settings.time_s, exams=exams)
    with page_beside(report):
        document = qualify(request)
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
    """Whether the report is of the chip that is here now, which another machine or a new plug-in may have changed."""
    report = _qualification(voyage)
    if voyage.recipe.qualify.time_s == 0:
        return True
    if not report.exists():
        return False
    document = read_json(report)
    if not isinstance(document, dict) or document.get("complete") is not True:
        return False
    if not (_is_trained(voyage) or _is_of_chip(document, voyage.document["chips"]["train"]["fingerprint"])):
        return False
    return document.get("verdict") != "FAIL" or voyage.recipe.qualify.on_fail == "go on"


def _is_of_chip(report: dict[str, Any], fingerprint: dict[str, Any]) -> bool:
    examined = (report.get("fingerprint") or {}).get("chip") or {}
    return all(examined.get(key) == fingerprint["chip"].get(key) for key in ("name", "vendor", "model_name"))


def _train(voyage: Voyage) -> str:
    """Train as `crosschip train` does, watched by a supervisor: what hangs or dies is started again."""
    from crosschip.train.launching import TrainCommand, train_to_the_end

    # Whatever an earlier call trained is gone on with; without anything trained there is nothing to resume.
    resume = (voyage.run.path / "train").is_dir()
    overrides = [part for override in voyage.overrides for part in ("--set", override)]
    arguments = ["train", str(voyage.recipe_path), "--out", str(voyage.run.path), *overrides]
    train_to_the_end(TrainCommand(voyage.recipe, voyage.run, arguments, resume, 1, None, go_on_with=voyage.again()))
    return ", ".join(f"{name} {_trained_steps(voyage, name)} steps" for name, _ in voyage.recipe.stages)


def _trained_steps(voyage: Voyage, stage: str) -> int | None:
    """The step of a stage's newest checkpoint."""
    return step_of(complete_checkpoints(voyage.run.stage(stage))[-1])


def _is_trained(voyage: Voyage) -> bool:
    return all(complete_checkpoints(voyage.run.stage(name)) for name, _ in voyage.recipe.stages)


def _evaluate(voyage: Voyage) -> str:
    from crosschip.report.answers import score_sentence
    from crosschip.train import evaluate_recipe

    if voyage.recipe.evaluate is None:
        return "left out: the recipe has no [evaluate]"
    document = evaluate_recipe(voyage.recipe, voyage.run)
    return score_sentence(document["num_right"], document["num_problems"])


def _is_evaluated(voyage: Voyage) -> bool:
    return voyage.recipe.evaluate is None or voyage.run.evaluation.exists()


def target_of(voyage: Voyage) -> Path:
    """Where the handed-off files are."""
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
    return f"{target_of(voyage)} ({settings.dtype}), certificate {made.certificate.document['verdict']}"


def _compare(voyage: Voyage) -> str:
    from crosschip.agreement import compare_answers

    voyage.document.pop("agreement", None)
    return compare_answers(voyage.recipe, voyage.run, target_of(voyage), voyage.document)


STEPS = (
    Step("chips", "Find the chips", _find_chips),
    Step("qualify", "Examine the chip that trains", _qualify, _is_qualified),
    Step("train", "Train", _train, _is_trained),
    Step("evaluate", "Evaluate on held-out problems", _evaluate, _is_evaluated),
    Step("golden", "Record the golden bundle", _record_golden, lambda voyage: is_complete(_golden(voyage))),
    Step("handoff", "Hand off and certify", _hand_off, lambda voyage: is_complete(target_of(voyage))),
    Step(
        "compare", "Load the handoff and compare answers", _compare, lambda voyage: "num_parameters" in voyage.document
    ),
)
