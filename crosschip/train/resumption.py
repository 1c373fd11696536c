"""What is told when a stage begins or goes on: what was lost, and what is not as it was before."""

from __future__ import annotations

from pathlib import Path

import torch

from crosschip.recipe import StageSettings
from crosschip.train.checkpoint import CheckpointState
from crosschip.train.guard.run_files import last_logged_step
from crosschip.train.metrics import METRICS_FILE
from crosschip.train.stage_making import Event, StageRun, trainer_threads

__all__ = ["beginning_events", "resumption_events"]


def beginning_events(run: StageRun, name: str, before: Path | None) -> list[Event]:
    """The events of a stage that begins at step 1, from the checkpoint `before` where there is one.

    On a resume that is one which was ended before its first checkpoint.
    """
    events = [("started", f"from {before or run.recipe.model.directory or 'new weights'}", "training")]
    if run.resume:
        begins = f"{name}: no checkpoint yet, so it begins at step 1"
        if logged := last_logged_step(run.directory.stage(name) / METRICS_FILE):
            lost = f"{logged} logged step{'s were' if logged > 1 else ' was'} lost"
            begins = f"{begins}; {lost}"
            events.append(("steps-lost", f"{lost}: there was no checkpoint yet", "computing them again"))
        run.rank.progress.say(begins)
    return events


def resumption_events(
    run: StageRun, name: str, settings: StageSettings, state: CheckpointState, changed: list[str], aside: list[Path]
) -> list[Event]:
    """The events of a stage that goes on from a checkpoint, and what it does not have in common with the run before.

    `changed` are settings of the stage that differ, `aside` checkpoints that were renamed.
    """
    logged = last_logged_step(run.directory.stage(name) / METRICS_FILE)
    lost = _lost(state.step, logged)
    run.rank.progress.say(f"{name}: going on after step {state.step}; {lost}")
    events = [("resumed", f"after step {state.step}; {lost}", "training")]
    if logged < state.step:
        events.append(("log-lines-lost", lost, "training: the weights hold these steps, the log does not"))
    events += [("damaged-checkpoint", str(path), "renamed and passed over") for path in aside]
    for kept in (each for each in changed if _is_kept(name, each)):
        told = f"{kept}, but a stage goes on as it began, in {state.compute_dtype}"
        run.rank.progress.say(f"{name}: {told}")
        events.append(("setting-not-taken", told, "training as recorded; for the new one begin another run"))
    changed = [each for each in changed if not _is_kept(name, each)]
    if changed := [*changed, *_other_surroundings(run, settings, state)]:
        told = "; ".join(changed)
        run.rank.progress.say(
            f"{name}: NOT the same run any more, its numbers will differ from an uninterrupted one: {told}"
        )
        events.append(("changed-settings", told, "training with the new ones"))
    return events


def _is_kept(name: str, changed: str) -> bool:
    """Whether a stage goes on as recorded in a setting that has changed: the dtype (see `stage_making`)."""
    return changed.startswith(f"{name}.dtype ")


def _lost(step: int, logged: int) -> str:
    """What is gone of a run with a checkpoint after `step` and a log whose last line is of step `logged`."""
    if logged == step:
        return "nothing was lost"
    if logged > step:
        return f"{logged - step} step{'s after it were' if logged - step > 1 else ' after it was'} lost"
    if logged + 1 == step:
        return f"the log line of step {step} is lost"
    return f"log lines of steps {logged + 1} to {step} are lost"


def _other_surroundings(run: StageRun, settings: StageSettings, state: CheckpointState) -> list[str]:
    """What belongs to the rounding of every step and is another than before."""
    pairs = {
        "threads was": (state.num_threads, trainer_threads(settings, run.rank)),
        "ranks were": (state.num_processes, run.rank.world.size),
        "parallel.expert_parallel was": (state.expert_parallel, run.recipe.parallel.expert_parallel),
        "device was": (state.device, str(run.rank.chip.device)),
        "torch was": (state.versions.get("torch", str(torch.__version__)), str(torch.__version__)),
    }
    is_now = {name: "are" if name.endswith("were") else "is" for name in pairs}
    return [f"{name} {old} and {is_now[name]} now {new}" for name, (old, new) in pairs.items() if old != new]
