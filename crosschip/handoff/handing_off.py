"""From a model to files that an engine loads, with the certificate that says whether they are the same model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosschip.certificate import Certificate
from crosschip.certificate.document import PASSED
from crosschip.certificate.signing import sign
from crosschip.chips import Chip, find_chip
from crosschip.errors import CrosschipError, HandoffError
from crosschip.golden.bundle import Bundle, load_bundle
from crosschip.golden.files import FileCheck
from crosschip.golden.limits import QUANTISED
from crosschip.golden.weights import WeightDifference
from crosschip.handoff.bundles import check_numbers, choose_bundle, removed_if_refused
from crosschip.handoff.certificate.arrived import Arrived, open_arrived
from crosschip.handoff.certificate.engines import Trial, check_engine, default_engines, make_replays
from crosschip.handoff.certificate.fields import fields_gate
from crosschip.handoff.certificate.gate import Gate
from crosschip.handoff.certificate.making import GoldenUsed, Made, certify, earlier_certificate, gates_before
from crosschip.handoff.certificate.overwriting import overwrite_gate
from crosschip.handoff.certificate.replays import Replayed
from crosschip.handoff.certificate.reproducer import write_reproducers
from crosschip.handoff.certificate.taken_over import answer_gates, write_read_gate
from crosschip.handoff.certificate.tensors import manifest_gate, unreadable
from crosschip.handoff.certificate.tokenizers import both, certified_tokenizer_gate, tokenizer_gate
from crosschip.handoff.conversion.rotary_pairs import FIELD
from crosschip.handoff.export import check_place, export_model
from crosschip.handoff.source import ModelSource, open_source
from crosschip.handoff.targets import TARGETS, Target
from crosschip.rundir import RunDirectory, read_json

__all__ = ["HandoffResult", "certify_directory", "hand_off"]

Tell = Callable[[str], None]

_RECORD = "handoff.json"  # what the export wrote beside the files


@dataclass(frozen=True)
class HandoffResult:
    """A directory with its certificate. `recorded_now` says that its golden bundle is not the training chip's."""

    directory: Path
    certificate: Certificate
    exit_code: int
    recorded_now: bool = False


@dataclass(frozen=True)
class _Wishes:
    """How the files shall be tried, once they are there."""

    engines: tuple[str, ...] | None
    chip: Chip
    key: Path | None
    engine_python: Path | None
    answers: dict[str, Any] | None
    tell: Tell


def hand_off(
    source: Path | RunDirectory,
    to: str,
    *,
    out: Path | None = None,
    golden: Path | None = None,
    engines: Sequence[str] | None = None,
    chip: str = "auto",
    dtype: str | None = None,
    key: Path | None = None,
    engine_python: Path | None = None,
    answers: dict[str, Any] | None = None,
    tell: Tell = lambda line: None,
) -> HandoffResult:
    """Write the files of a target, replay the golden bundle through them, and certify what was found.

    A model that fails leaves its files with a certificate that says FAIL; one that is refused leaves nothing.

    Args:
        source: a run, a checkpoint, or a model directory in Hugging Face layout; whoever holds a run's lock gives the
            object that holds it.
        to: the target, one of `crosschip.handoff.targets.TARGETS`.
        out: where the files go; None for `RUN/handoff/TARGET`, or beside a model directory.
        golden: the bundle; None for the run's own, or one that is recorded now.
        engines: what replays it: model, native, transformers, vllm, llamacpp or an address; None for what shows most.
        chip: where it is replayed by what runs here.
        dtype: of what is not quantised; None for the recipe's, the source's, or the target's usual.
        key: a PEM file with an ed25519 private key, to sign with.
        engine_python: the interpreter of an engine's environment.
        answers: the document of a comparison of answers, to stand in the certificate.
        tell: gets a line whenever something begins.

    Raises:
        CrosschipError: what was asked for makes no sense, cannot be read, or cannot be written.
    """
    target = _target(to)
    run, source = _run_and_path(source)
    model = open_source(source)
    chosen = dtype or _dtype(target, model, run)
    if chosen not in target.dtypes:
        raise HandoffError(f"{target.name} is not written in {chosen}", f"choose among {', '.join(target.dtypes)}")
    wishes = _Wishes(_named(engines), find_chip(chip), key, engine_python, answers, tell)
    _check_beforehand(wishes)
    directory = out or (source.with_name(f"{source.resolve().name}-{to}") if run is None else run.handoff(to))
    beside = directory.with_name(f"{directory.name}-golden") if run is None else run.path / "golden"
    with run.lock() if run is not None else contextlib.nullcontext():
        computed, quantised = _arithmetic(chosen), _kind(target.quantised, chosen)
        check_place(model, directory)
        target.check(model)
        used = choose_bundle(model, golden, beside, wishes.chip, computed, quantised, tell)
        with removed_if_refused(used):
            check_numbers(used.bundle)
            tell(f"writing {directory}")
            export_model(model, target, directory, chosen, tell=tell, relative_to=None if run is None else run.path)
        described = {"name": target.name, "dtype": chosen, "computed_in": computed, "quantised": quantised}
        made = _examine(directory, described, model, _description(source, model, run), used, wishes, None)
    return HandoffResult(directory, made.certificate, made.exit_code, used.recorded_now)


def certify_directory(
    directory: Path,
    golden: Path,
    *,
    engines: Sequence[str] | None = None,
    chip: str = "auto",
    dtype: str | None = None,
    key: Path | None = None,
    engine_python: Path | None = None,
    answers: dict[str, Any] | None = None,
    tell: Tell = lambda line: None,
) -> HandoffResult:
    """Certify files that were handed off elsewhere: on the machine that serves, where the source is not at hand.

    Gates that need the source, and replays by other engines, on other chips or in other dtypes, are taken over from the
    certificate that lies there, if its files are unchanged and it speaks about the same bundle.

    Raises:
        CrosschipError: the bundle or a key cannot be read, an engine is not known or refuses, nothing can be written.
    """
    used = GoldenUsed(load_bundle(golden))
    check_numbers(used.bundle)
    wishes = _Wishes(_named(engines), find_chip(chip), key, engine_python, answers, tell)
    _check_beforehand(wishes)
    earlier = earlier_certificate(directory, tell)
    target = _described(directory, earlier, used.bundle, dtype)
    source = {"kind": "not at hand", "path": None} if earlier is None else _without_weights(earlier)
    made = _examine(directory, target, None, source, used, wishes, earlier)
    return HandoffResult(directory, made.certificate, made.exit_code, used.recorded_now)


def _examine(
    directory: Path,
    target: dict[str, Any],
    source: ModelSource | None,
    described: dict[str, Any],
    used: GoldenUsed,
    wishes: _Wishes,
    earlier: Certificate | None,
) -> Made:
    bundle, tell = used.bundle, wishes.tell
    gates, check, arrived = _file_gates(directory, target, source, bundle, earlier, tell)
    replays: list[Replayed] = []
    left_out: list[str] = []
    if arrived is None:
        left_out = ["the golden replay: the files cannot be read back"]
    else:
        trial = Trial(
            bundle,
            directory,
            arrived,
            wishes.chip,
            target["computed_in"],
            target["quantised"],
            check,
            [] if source is None else source.tokenizer_files,
            wishes.engine_python,
        )
        engines, left_out = (wishes.engines, []) if wishes.engines else default_engines(bundle, _is_gguf(directory))
        replays = make_replays(trial, engines, tell)
    for replayed in replays:
        if replayed.tokenizer is not None:
            gates = [*gates[:-1], both(gates[-1], replayed.tokenizer)]
    failed = [
        (each.engine.partition("://")[0], each.comparison) for each in replays if each.judgement.verdict not in PASSED
    ]
    write_reproducers(directory, bundle, gates, failed)
    native = next((each for each in replays if each.engine == "native"), None)
    if native is not None and native.judgement.verdict in PASSED:
        gates.append(overwrite_gate(directory, bundle.rows, wishes.chip.name, target["computed_in"], tell))
    write_read = None if source is None else write_read_gate(source.directory)
    gates += [*answer_gates(wishes.answers), *([write_read] if write_read is not None else [])]
    return certify(
        directory,
        target=target,
        source=described,
        golden=used,
        gates=gates,
        replays=replays,
        chip=wishes.chip,
        earlier=earlier,
        answers=wishes.answers,
        not_covered_too=left_out,
        key=wishes.key,
        tell=tell,
    )


def _file_gates(
    directory: Path,
    target: dict[str, Any],
    source: ModelSource | None,
    bundle: Bundle,
    earlier: Certificate | None,
    tell: Tell,
) -> tuple[list[Gate], FileCheck, Arrived | None]:
    """The gates that need no engine, how the files differ for the replays to know, and the files as they are read."""
    tokenizer = (
        certified_tokenizer_gate(directory) if source is None else tokenizer_gate(source.tokenizer_files, directory)
    )
    try:
        arrived = open_arrived(directory, _recorded_form(bundle) if source is None else source.config)
    except CrosschipError as error:
        return [unreadable(error), tokenizer], FileCheck([], [], None), None
    is_gguf = _is_gguf(directory)
    known = None if source is not None or earlier is None else _known_manifest(earlier, bundle)
    if known is not None:
        manifest, weights = known, list[WeightDifference]()
    else:
        manifest, weights = manifest_gate(
            bundle,
            arrived.tensors,
            source=None if source is None else source.tensors,
            quantised=target["quantised"],
            left_out=_prediction_layers(bundle) if is_gguf else (),
            tell=tell,
        )
    fields, differing = fields_gate(bundle, arrived.config, is_gguf)
    return [manifest, fields, tokenizer], FileCheck(differing, weights, target["computed_in"]), arrived


def _is_gguf(directory: Path) -> bool:
    return any(directory.glob("*.gguf"))


def _known_manifest(earlier: Certificate, bundle: Bundle) -> Gate | None:
    """What was found when the source was at hand: it saw more, the files are unchanged, and so is the bundle."""
    gate = gates_before(earlier).get("tensor manifest")
    same = earlier.document["golden"].get("seal") == bundle.manifest["seal"]
    return gate if gate is not None and same and gate.verdict == "PASS" else None


def _recorded_form(bundle: Bundle) -> dict[str, Any]:
    """The fields of the recorded configuration that say how tensors lie, and not what is computed."""
    recorded = bundle.manifest["config"]
    return {FIELD: recorded[FIELD]} if FIELD in recorded else {}


def _prediction_layers(bundle: Bundle) -> list[str]:
    """The layers of multi-token prediction, which GGUF has no place for; the model answers the same without them."""
    number = bundle.manifest["config"].get("num_hidden_layers")
    extra = bundle.manifest["num_nextn_predict_layers"]
    return [f"model.layers.{number + index}." for index in range(extra)] if isinstance(number, int) else []


def _run_and_path(source: Path | RunDirectory) -> tuple[RunDirectory | None, Path]:
    if isinstance(source, RunDirectory):
        return source, source.path
    return (None if (source / "config.json").is_file() else RunDirectory(source)), source


def _target(to: str) -> Target:
    if to not in TARGETS:
        raise HandoffError(f"--to {to!r} is not a target that is known here", f"choose among {', '.join(TARGETS)}")
    return TARGETS[to]


def _dtype(target: Target, model: ModelSource, run: RunDirectory | None) -> str:
    """What the recipe says, else the source's own, where the target is written in it; else the target's usual."""
    wishes: list[str] = []
    if run is not None and run.resolved_recipe.is_file():
        from crosschip.recipe import parse_recipe

        wishes.append(parse_recipe(read_json(run.resolved_recipe), str(run.resolved_recipe)).handoff.dtype)
    wishes.append(str(model.config.get("torch_dtype") or model.config.get("dtype")))
    return next((wish for wish in wishes if wish in target.dtypes), target.dtypes[0])


def _arithmetic(dtype: str) -> str:
    """What a model in this dtype computes in: `q8_0` of GGUF is multiplied out to fp32."""
    return dtype if dtype in ("float32", "bfloat16", "float16") else "float32"


def _kind(of_target: str | None, dtype: str) -> str | None:
    """The kind of quantisation, which GGUF has in its dtype and other targets in their name."""
    return of_target or (dtype if dtype in QUANTISED else None)


def _described(directory: Path, earlier: Certificate | None, bundle: Bundle, dtype: str | None) -> dict[str, Any]:
    """The target of files that lie there already."""
    if earlier is not None:
        known = dict(earlier.document["target"])
        return {**known, "computed_in": dtype or known["computed_in"]}
    record = directory / _RECORD
    name, written = "hf", bundle.dtype
    if record.is_file():
        document = read_json(record)
        name, written = str(document.get("target")), str(document.get("dtype"))
    quantised = _kind(TARGETS[name].quantised if name in TARGETS else None, written)
    return {"name": name, "dtype": written, "computed_in": dtype or _arithmetic(written), "quantised": quantised}


def _description(source: Path, model: ModelSource, run: RunDirectory | None) -> dict[str, Any]:
    kind = "run" if run is not None else "checkpoint" if (source / "dcp").is_dir() else "directory"
    step = model.directory.name.removeprefix("step-") if model.directory.name.startswith("step-") else None
    return {
        "kind": kind,
        "path": str(source),
        "checkpoint": str(model.directory),
        "step": int(step) if step is not None and step.isdigit() else None,
        "stage": model.directory.parents[1].name if step is not None else None,
        "architecture": model.config.get("model_type"),
    }


def _without_weights(earlier: Certificate) -> dict[str, Any]:
    return {key: value for key, value in earlier.document["source"].items() if key != "weights"}


def _named(engines: Sequence[str] | None) -> tuple[str, ...] | None:
    return tuple(dict.fromkeys(engines)) if engines else None


def _check_beforehand(wishes: _Wishes) -> None:
    """A key that cannot sign, a report that cannot be read, an engine that is not there: told before hours of work."""
    if wishes.key is not None:
        sign({}, wishes.key)
    answer_gates(wishes.answers)
    for engine in wishes.engines or ():
        check_engine(engine, wishes.engine_python)
