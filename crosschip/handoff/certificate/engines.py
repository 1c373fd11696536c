"""The replays of a handoff: our own model, transformers, an engine that is started for it, or one at an address."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

import crosschip
from crosschip.chips import Chip
from crosschip.engines import EngineCommand, RunningEngine, engine_command, engine_python, running_engine
from crosschip.errors import CrosschipError, GoldenError, HandoffError, ModelError
from crosschip.golden.bundle import Bundle
from crosschip.golden.comparison import Comparison
from crosschip.golden.engine_replay import replay_over_http
from crosschip.golden.files import FileCheck
from crosschip.golden.limits import limit_for, target_of
from crosschip.golden.replay import replay
from crosschip.golden.scoring_http import check_address
from crosschip.golden.transformers_replay import replay_through_transformers
from crosschip.handoff.certificate.arrived import Arrived, write_multiplied_out
from crosschip.handoff.certificate.engine_codec import EngineCodec, told_by
from crosschip.handoff.certificate.replays import Replayed
from crosschip.handoff.certificate.tokenizers import tokenizer_gate
from crosschip.handoff.scratch import scratch_directory

__all__ = ["IN_PROCESS", "STARTED", "Trial", "check_engine", "check_runs", "default_engines", "make_replays"]

Tell = Callable[[str], None]

IN_PROCESS = ("model", "transformers")  # run here, on a chip
STARTED = ("native", "vllm", "llamacpp")  # run as a process over the files
_MULTIPLIED_OUT = "what the files are multiplied out to, in fp32"
_LAST_LINES = 12  # of an engine's log that a certificate shows


@dataclass(frozen=True)
class Trial:
    """What is replayed, where and how."""

    bundle: Bundle
    directory: Path
    arrived: Arrived
    chip: Chip
    dtype: str
    quantised: str | None
    check: FileCheck  # how the files differ, as the gates before found
    tokenizer_files: Sequence[Path] = ()  # of the source, or those beside the model
    engine_python: Path | None = None
    start_s: float = 600.0


def default_engines(bundle: Bundle, is_gguf: bool) -> tuple[tuple[str, ...], list[str]]:
    """What replays where nobody says, and what is then not covered, in words.

    Our own model shows layers, where it runs the architecture, else transformers does. Our own engine reads what our
    model reads; llama.cpp is asked where `make engines` made its environment.
    """
    seeing = "model" if bundle.route == "model" else "transformers"
    if is_gguf:
        if engine_python("llamacpp") is not None:
            return (seeing, "llamacpp"), []
        return (seeing,), ["llama.cpp itself: there is no environment with it (`make engines`, or --engine-python)"]
    return (("model", "native") if bundle.route == "model" else ("transformers",)), []


def check_engine(engine: str, python: Path | None, is_gguf: bool) -> None:
    """Refuse an engine that is not known, does not read the form, or whose environment is not there.

    Raises:
        HandoffError: it is neither a name nor an address, or it reads another form.
        GoldenError: the address holds a password.
        EngineError: its interpreter is missing.
    """
    if engine in STARTED:
        if (engine == "llamacpp") != is_gguf:
            form = "a GGUF file" if is_gguf else "a directory of safetensors"
            raise HandoffError(
                f"the engine {engine} does not read {form}",
                f"llamacpp reads gguf and nothing else, {' and '.join(STARTED[:2])} read all but gguf: choose another "
                "target, or one of model and transformers, which read what the files are multiplied out to",
            )
        engine_command(engine, python)
    elif engine.startswith(("http://", "https://")):
        check_address(engine)
    elif engine not in IN_PROCESS:
        raise _unknown(engine)


def check_runs(engine: str, bundle: Bundle) -> None:
    """Refuse an engine of ours for an architecture that our own model does not run.

    Raises:
        HandoffError: the bundle was recorded through transformers.
    """
    if engine in ("model", "native") and bundle.route != "model":
        raise HandoffError(
            f"the engine {engine} does not run this architecture: {bundle.path} was recorded through {bundle.route}",
            "choose among transformers, vllm and llamacpp, or give an address",
        )


def _unknown(engine: str) -> HandoffError:
    names = ", ".join((*IN_PROCESS, *STARTED))
    return HandoffError(
        f"the engine {engine!r} is not known here", f"choose among {names}, or give an address like http://HOST:8000"
    )


def make_replays(trial: Trial, engines: Sequence[str], tell: Tell) -> list[Replayed]:
    """One replay for each engine: a name of `IN_PROCESS` or `STARTED`, or an address.

    Where an engine that shows no layers fails and our own model was not asked, it is asked as well, so that a layer is
    named if it is the model, and the engine is to blame if it is not.

    Raises:
        HandoffError: an engine that is not known here, or that does not read this form.
        GoldenError: the bundle says nothing about this dtype.
    """
    made = [_replay(trial, engine, tell) for engine in engines]
    failed = any(each.comparison.route == "http" and each.judgement.verdict == "FAIL" for each in made)
    if failed and "model" not in engines and trial.bundle.route == "model":
        tell("an engine that shows no layers failed: replaying through our own model, which does")
        made.append(_replay(trial, "model", tell))
    return made


def _replay(trial: Trial, engine: str, tell: Tell) -> Replayed:
    tell(f"golden replay through {engine}")
    if engine in IN_PROCESS:
        return _in_process(trial, engine, tell)
    if engine in STARTED:
        return _started(trial, engine, tell)
    if engine.startswith(("http://", "https://")):
        key = os.environ.get("CROSSCHIP_API_KEY")
        facts = {"url": engine, **told_by(engine, key)}
        comparison = _over_http(trial, engine, tell, key)
        unknown = "flags" if "version" in facts else "version and flags"
        comparison.not_covered.append(f"the engine's {unknown}: what answers at an address does not tell")
        return Replayed(engine, comparison, None, facts)
    raise _unknown(engine)


def _in_process(trial: Trial, engine: str, tell: Tell) -> Replayed:
    facts: dict[str, Any] = {"version": crosschip.__version__}
    if engine == "transformers":
        import transformers

        facts = {"version": transformers.__version__, "flags": ["attn_implementation=eager, then sdpa"]}
    with ExitStack() as stack:
        try:
            directory, form = stack.enter_context(_readable(trial))
        except (OSError, CrosschipError, SafetensorError) as error:  # the last is what the library makes of a full disk
            why = error.problem if isinstance(error, CrosschipError) else f"{type(error).__name__}: {error}"
            return Replayed(engine, _without_files(trial, engine, why), trial.chip, facts, _MULTIPLIED_OUT)
        settings: dict[str, Any] = {"dtype": trial.dtype, "quantised": trial.quantised, "tell": tell}
        settings["files"] = trial.check
        try:
            if engine == "transformers":
                comparison = replay_through_transformers(trial.bundle, directory, trial.chip, **settings)
            else:
                comparison = replay(trial.bundle, directory, trial.chip, with_curve=False, **settings)
        except ModelError as error:
            comparison = _broken(trial, "model", trial.chip.name, f"the model does not load: {error.problem}")
    return Replayed(engine, comparison, trial.chip, facts, form)


@contextmanager
def _readable(trial: Trial) -> Iterator[tuple[Path, str]]:
    """A directory that our model and transformers read, and what it is."""
    if trial.arrived.is_as_published:
        yield trial.directory, "the files"
        return
    with scratch_directory(trial.directory.parent, "multiplied-out") as place:
        write_multiplied_out(trial.arrived, place)
        yield place, _MULTIPLIED_OUT


def _started(trial: Trial, engine: str, tell: Tell) -> Replayed:
    check_engine(engine, trial.engine_python, any(trial.directory.glob("*.gguf")))
    command = _command(trial, engine)
    chip = trial.chip if engine == "native" else None
    with tempfile.TemporaryDirectory(prefix="crosschip-engine-") as place:
        log = Path(place) / "engine.log"
        with running_engine(command, trial.directory, log, trial.start_s) as running:
            facts = running.description()
            if not running.is_up:
                broken = _broken(trial, "http", engine, f"{running.ended}: {_end_of(running)}")
                return Replayed(engine, broken, chip, facts)
            comparison = _over_http(trial, running.url, tell)
            if comparison.broke is not None:
                comparison.broke += f"; its log ends: {_end_of(running)}"
            tokenizer = None
            if engine == "llamacpp" and trial.tokenizer_files:
                tokenizer = tokenizer_gate(trial.tokenizer_files, trial.directory, EngineCodec(running.url))
            return Replayed(engine, comparison, chip, facts, tokenizer=tokenizer)


def _end_of(running: RunningEngine) -> str:
    return "\n".join(running.read_log().splitlines()[-_LAST_LINES:])


def _command(trial: Trial, engine: str) -> EngineCommand:
    longest = max(trial.bundle.lengths) + 1
    own = trial.arrived.config.get("max_position_embeddings")
    longest = min(longest, own) if isinstance(own, int) else longest  # vLLM refuses more than the model's own
    command = engine_command(engine, trial.engine_python, chip=trial.chip.name, max_length=longest, dtype=trial.dtype)
    if engine == "native":  # quantised files do not say what they are computed in
        return replace(command, words=(*command.words, "--dtype", trial.dtype))
    return command


def _over_http(trial: Trial, url: str, tell: Tell, api_key: str | None = None) -> Comparison:
    """Score through an address. The files are compared by the gates before, which read every form; here they serve to
    place the blame, so only plain ones are of use."""
    files = trial.directory if trial.arrived.is_as_published else None
    settings: dict[str, Any] = {"dtype": trial.dtype, "quantised": trial.quantised, "api_key": api_key, "tell": tell}
    try:
        return replay_over_http(trial.bundle, url, files=files, check=trial.check, **settings)
    except GoldenError as error:  # it refuses to score, or nobody is there: the files stand, and what was seen of it
        return _broken(trial, "http", url, error.problem)


def _without_files(trial: Trial, engine: str, why: str) -> Comparison:
    """A replay for which there was no room, say: it is not covered, and tells nothing of the files."""
    route = "model" if engine == "model" else "transformers"
    comparison = _broken(trial, route, trial.chip.name, "")
    left_out = f"the replay: the files could not be multiplied out for it: {why}"
    return replace(comparison, broke=None, not_covered=[left_out])


def _broken(trial: Trial, route: Any, engine: str, why: str) -> Comparison:
    """A replay that never began."""
    target, coarser = target_of(trial.bundle.dtype, trial.dtype, trial.quantised)
    floor = {**trial.bundle.floor, **trial.bundle.floor["without_choices"]}
    limit = limit_for(target, coarser, floor["mean_kl"])
    rows = len(trial.bundle.lengths)
    return Comparison(route, engine, trial.dtype, limit, floor, broke=why, rows_planned=rows, files_checked=False)
