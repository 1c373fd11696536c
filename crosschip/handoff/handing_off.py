"""From a model to files that an engine loads, with the certificate that says whether they are the same model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosschip.certificate import Certificate
from crosschip.certificate.document import NOT_COVERED, PASSED
from crosschip.certificate.signing import sign
from crosschip.checkpoints import run_of
from crosschip.chips import Chip, find_chip
from crosschip.errors import CrosschipError, HandoffError
from crosschip.golden.bundle import Bundle, load_bundle
from crosschip.golden.config_fields import TIED
from crosschip.golden.files import FileCheck
from crosschip.golden.weights import WeightDifference
from crosschip.handoff.bundles import check_numbers, choose_bundle, removed_if_refused
from crosschip.handoff.certificate.arrived import Arrived, open_arrived, recorded_form
from crosschip.handoff.certificate.endings import tokenizer_and_endings_gate
from crosschip.handoff.certificate.engines import Trial, check_engine, check_runs, default_engines, make_replays
from crosschip.handoff.certificate.fields import fields_gate
from crosschip.handoff.certificate.gate import Gate
from crosschip.handoff.certificate.inside import gguf_tokenizer_gate, tokenizer_files_of
from crosschip.handoff.certificate.making import GoldenUsed, Made, certify, earlier_certificate, gates_before
from crosschip.handoff.certificate.overwriting import overwrite_gate
from crosschip.handoff.certificate.replays import Replayed
from crosschip.handoff.certificate.reproducer import Evidence, write_reproducers
from crosschip.handoff.certificate.taken_over import answer_gates, bound_answer_gates, summarised, write_read_gate
from crosschip.handoff.certificate.tensors import manifest_gate, unreadable
from crosschip.handoff.certificate.tokenizers import both
from crosschip.handoff.describing import (
    chosen_dtype,
    computed_in,
    described_source,
    described_target,
    earlier_source,
    quantisation,
)
from crosschip.handoff.export import check_kept, check_place, export_model, with_a_name
from crosschip.handoff.held import held_alone
from crosschip.handoff.source import ModelSource, open_source
from crosschip.handoff.targets import TARGETS, Target
from crosschip.rundir import RunDirectory

__all__ = ["HandoffResult", "certify_directory", "hand_off", "output_directory"]

Tell = Callable[[str], None]


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
    directory, beside = _places(source, run, to, out)
    check_kept(directory, {"--golden": golden, "--key": key})
    model = open_source(source)
    written = dtype or chosen_dtype(target, model, run)
    if written not in target.dtypes:
        raise HandoffError(f"{target.name} is not written in {written}", f"choose among {', '.join(target.dtypes)}")
    wishes = _Wishes(_named(engines), find_chip(chip), key, engine_python, answers, tell)
    _check_beforehand(wishes, is_gguf=target.name.startswith("gguf"))
    described = {
        "name": target.name,
        "dtype": written,
        "computed_in": computed_in(written),
        "quantised": quantisation(target.quantised, written),
    }
    with run.lock() if run is not None else contextlib.nullcontext():
        with held_alone(directory):
            used = _exported(model, target, described, directory, golden, beside, run, wishes)
        with held_alone(directory):  # the new one
            made = _examine(directory, described, model, described_source(source, model, run), used, wishes, None)
    return HandoffResult(directory, made.certificate, made.exit_code, used.recorded_now)


def output_directory(source: Path | RunDirectory, to: str, out: Path | None = None) -> Path:
    """Where `hand_off` of the same arguments leaves its files."""
    run, path = _run_and_path(source)
    return _places(path, run, to, out)[0]


def _places(source: Path, run: RunDirectory | None, to: str, out: Path | None) -> tuple[Path, Path]:
    """Where the files go, and where the usual bundle is."""
    if run is not None:
        return (with_a_name(out) if out is not None else run.handoff(to)), run.path / "golden"
    name, of_run = source.resolve().name, run_of(source)
    if out is None and of_run is not None:  # not among the run's checkpoints, nor instead of what the run hands off
        return of_run.handoff(f"{name}-{to}"), of_run.path / f"golden-{name}"
    directory = with_a_name(out) if out is not None else source.with_name(f"{name}-{to}")
    return directory, directory.with_name(f"{directory.name}-golden")


def _exported(
    model: ModelSource,
    target: Target,
    described: dict[str, Any],
    directory: Path,
    golden: Path | None,
    beside: Path,
    run: RunDirectory | None,
    wishes: _Wishes,
) -> GoldenUsed:
    """Write the files, once nothing speaks against it any more; return the bundle that they are held against."""
    tell, dtype = wishes.tell, described["computed_in"]
    check_place(model, directory)
    target.check(model)
    used = choose_bundle(model, golden, beside, wishes.chip, dtype, described["quantised"], tell)
    with removed_if_refused(used):
        check_numbers(used.bundle)
        for engine in wishes.engines or ():
            check_runs(engine, used.bundle)
        tell(f"writing {directory}")
        relative_to = None if run is None else run.path
        export_model(model, target, directory, described["dtype"], tell=tell, relative_to=relative_to)
    return used


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
        CrosschipError: there is no directory, the bundle or a key cannot be read, an engine is not known or refuses,
            nothing can be written, another process is at it.
    """
    directory = with_a_name(directory)
    if not directory.is_dir():
        raise HandoffError(f"there is no directory {directory}", "give the directory with the files that are certified")
    used = GoldenUsed(load_bundle(golden))
    check_numbers(used.bundle)
    wishes = _Wishes(_named(engines), find_chip(chip), key, engine_python, answers, tell)
    _check_beforehand(wishes, _is_gguf(directory))
    for engine in wishes.engines or ():
        check_runs(engine, used.bundle)
    with held_alone(directory):
        earlier = earlier_certificate(directory, tell)
        target = described_target(directory, earlier, used.bundle, dtype)
        source = {"kind": "not at hand", "path": None} if earlier is None else earlier_source(earlier)
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
            tokenizer_files_of(directory, source),
            wishes.engine_python,
        )
        engines, left_out = (wishes.engines, []) if wishes.engines else default_engines(bundle, _is_gguf(directory))
        replays = make_replays(trial, engines, tell)
    for replayed in replays:
        if replayed.tokenizer is not None and _says_more(replayed.tokenizer, source, earlier):
            gates = [*gates[:-1], both(gates[-1], replayed.tokenizer)]
    failed = [
        (each.engine.partition("://")[0], each.comparison) for each in replays if each.judgement.verdict not in PASSED
    ]
    tensors = None if arrived is None else arrived.tensors
    write_reproducers(directory, bundle, gates, failed, Evidence(source, tensors, target["quantised"]))
    native = next((each for each in replays if each.engine == "native"), None)
    if native is not None and native.judgement.verdict in PASSED:
        gates.append(overwrite_gate(directory, bundle.rows, wishes.chip.name, target["computed_in"], tell))
    write_read = None if source is None else write_read_gate(source.directory)
    answered = bound_answer_gates(wishes.answers, directory, None if source is None else source.directory, tell)
    gates += [*answered, *([write_read] if write_read is not None else [])]
    return certify(
        directory,
        target=target,
        source=described,
        golden=used,
        gates=gates,
        replays=replays,
        chip=wishes.chip,
        earlier=earlier,
        answers=_in_certificate(wishes.answers, answered),
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
    tokenizer = tokenizer_and_endings_gate(directory, source, bundle)
    try:
        arrived = open_arrived(directory, recorded_form(bundle) if source is None else source.config)
    except CrosschipError as error:
        return [unreadable(error), tokenizer], FileCheck([], [], None), None
    is_gguf = _is_gguf(directory)
    if is_gguf:
        inside = gguf_tokenizer_gate(next(directory.glob("*.gguf")), source)
        tokenizer = both(tokenizer, inside, "in the file") if _says_more(inside, source, earlier) else tokenizer
    known = None if source is not None or earlier is None else _known_manifest(earlier, bundle)
    if known is not None:
        manifest, weights = known, list[WeightDifference]()
    else:
        manifest, weights = manifest_gate(
            bundle,
            arrived.tensors,
            source=None if source is None else source.tensors,
            quantised=target["quantised"],
            left_out=_without_a_place(bundle) if is_gguf else (),
            tell=tell,
        )
    fields, differing = fields_gate(bundle, arrived.config, is_gguf)
    return [manifest, fields, tokenizer], FileCheck(differing, weights, target["computed_in"]), arrived


def _says_more(tokenizer: Gate, source: ModelSource | None, earlier: Certificate | None) -> bool:
    """Whether a look at the tokenizer inside adds to what an earlier certificate says, which had the source at hand."""
    before = None if earlier is None else gates_before(earlier).get(tokenizer.name)
    is_known = before is not None and before.verdict != NOT_COVERED
    return source is not None or not is_known or tokenizer.verdict == "FAIL"


def _is_gguf(directory: Path) -> bool:
    return any(directory.glob("*.gguf"))


def _known_manifest(earlier: Certificate, bundle: Bundle) -> Gate | None:
    """What was found when the source was at hand: it saw more, the files are unchanged, and so is the bundle."""
    gate = gates_before(earlier).get("tensor manifest")
    same = earlier.document["golden"].get("seal") == bundle.manifest["seal"]
    return gate if gate is not None and same and gate.verdict == "PASS" else None


def _without_a_place(bundle: Bundle) -> list[str]:
    """Beginnings of the names that GGUF has no place for; the model answers the same without these tensors.

    The layers of multi-token prediction; rotary tables, which are computed anew; the output where it is the embedding.
    """
    config, records = bundle.manifest["config"], bundle.weights
    number, extra = config.get("num_hidden_layers"), bundle.manifest["num_nextn_predict_layers"]
    layers = [f"model.layers.{number + index}." for index in range(extra)] if isinstance(number, int) else []
    tables = [name for name in records if name.endswith("rotary_emb.inv_freq")]
    output, embedding = (records.get(f"{each}.weight") for each in ("lm_head", "model.embed_tokens"))
    is_tied = config.get(TIED) and output is not None and embedding is not None and output.sha256 == embedding.sha256
    return [*layers, *tables, *(["lm_head.weight"] if is_tied else [])]


def _run_and_path(source: Path | RunDirectory) -> tuple[RunDirectory | None, Path]:
    if isinstance(source, RunDirectory):
        return source, source.path
    source = with_a_name(source)
    return (None if (source / "config.json").is_file() else RunDirectory(source)), source


def _target(to: str) -> Target:
    if to not in TARGETS:
        raise HandoffError(f"--to {to!r} is not a target that is known here", f"choose among {', '.join(TARGETS)}")
    return TARGETS[to]


def _named(engines: Sequence[str] | None) -> tuple[str, ...] | None:
    return tuple(dict.fromkeys(engines)) if engines else None


def _in_certificate(answers: dict[str, Any] | None, gates: Sequence[Gate]) -> dict[str, Any] | None:
    """The report of answers, if a gate says that it is about these files."""
    if answers is None or all(gate.verdict == NOT_COVERED for gate in gates):
        return None
    return summarised(answers)


def _check_beforehand(wishes: _Wishes, is_gguf: bool) -> None:
    """What would end hours of work is told before them.

    A key that cannot sign, a report that cannot be read, an engine that is not there or does not read the form.
    """
    if wishes.key is not None:
        sign({}, wishes.key)
    answer_gates(wishes.answers)
    if wishes.answers is not None:
        summarised(wishes.answers)
    for engine in wishes.engines or ():
        check_engine(engine, wishes.engine_python, is_gguf)
