"""`crosschip handoff`: files for an engine with a certificate; verify, certify, keygen, compare, overwrite.

`crosschip handoff RUN --to TARGET` is the command itself: a first word that is none of the others is its source.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from crosschip.cli.comparing_answers import compare_sides
from crosschip.cli.default_command import DefaultCommandGroup
from crosschip.cli.guard import guarded
from crosschip.cli.options import ExaminedChipOption
from crosschip.cli.overwriting import overwrite
from crosschip.cli.reports import output_place, tell
from crosschip.errors import HandoffError

if TYPE_CHECKING:
    from crosschip.handoff.handing_off import HandoffResult

__all__ = ["handoff"]

ToOption = Annotated[
    str,
    typer.Option("--to", metavar="TARGET", help="The form: hf, fp8, w8a8, gguf, gguf-q8_0."),
]
EngineOption = Annotated[
    list[str] | None,
    typer.Option(
        "--engine",
        metavar="ENGINE",
        help="Replay through: model, native, transformers, vllm, llamacpp, or an address. Repeatable; else what shows "
        "most.",
        show_default=False,
    ),
]
EnginePythonOption = Annotated[
    Path | None,
    typer.Option(
        "--engine-python", metavar="PATH", help="The interpreter of the engine's environment.", show_default=False
    ),
]
DtypeOption = Annotated[
    Literal["auto", "float32", "bfloat16"],
    typer.Option("--dtype", help="Of what is not quantised; auto is the recipe's, else the model's own."),
]
KeyOption = Annotated[
    Path | None,
    typer.Option("--key", metavar="FILE", help="Sign with this ed25519 private key (PEM).", show_default=False),
]
AnswersOption = Annotated[
    Path | None,
    typer.Option("--answers", metavar="FILE", help="The report of `handoff compare --json`.", show_default=False),
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the certificate here, too.", show_default=False)
]


class _SourceOrCommand(DefaultCommandGroup):
    default = "make"


handoff = typer.Typer(
    cls=_SourceOrCommand,
    help="Hand a model off: `crosschip handoff RUN_OR_DIR --to TARGET` writes its files for an engine, replays the "
    "golden bundle through them and certifies what was found.",
    rich_markup_mode=None,
    no_args_is_help=True,
)


def make(
    source: Annotated[
        Path, typer.Argument(metavar="RUN_OR_DIR", help="A run, a checkpoint, or a Hugging Face directory.")
    ],
    to: ToOption,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="The files; RUN/handoff/TARGET if not given.", show_default=False),
    ] = None,
    dtype: DtypeOption = "auto",
    golden: Annotated[
        Path | None,
        typer.Option(
            "--golden", metavar="DIR", help="The bundle; RUN/golden, or recorded now, if not given.", show_default=False
        ),
    ] = None,
    engines: EngineOption = None,
    engine_python: EnginePythonOption = None,
    chip: ExaminedChipOption = "auto",
    key: KeyOption = None,
    answers: AnswersOption = None,
    json_path: JsonOption = None,
) -> None:
    """Write the files, replay, certify; the word `make` may be left out.

    Exit codes: 0 PASS or PASS WITH LIMITS, 1 FAIL (the files stay, with a certificate that says so), 3 INCONCLUSIVE, 2
    when nothing could be made.
    """
    from crosschip.handoff.export import check_kept
    from crosschip.handoff.handing_off import hand_off, output_directory

    directory = output_directory(source, to, out)
    check_kept(directory, {"--answers": answers})
    _check_json(json_path, directory, answers)
    result = hand_off(
        source,
        to,
        out=out,
        golden=golden,
        engines=engines,
        chip=chip,
        dtype=None if dtype == "auto" else dtype,
        key=key,
        engine_python=engine_python,
        answers=_answers(answers),
        tell=tell,
    )
    _end(result, json_path)


def certify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Files that were handed off, perhaps elsewhere.")],
    golden: Annotated[Path, typer.Option("--golden", metavar="DIR", help="The golden bundle of their model.")],
    engines: EngineOption = None,
    engine_python: EnginePythonOption = None,
    chip: ExaminedChipOption = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        typer.Option("--dtype", help="The arithmetic; auto is that of the certificate, else of the files."),
    ] = "auto",
    key: KeyOption = None,
    answers: AnswersOption = None,
    json_path: JsonOption = None,
) -> None:
    """Replay the bundle where the model will be served, and add what is found to its certificate.

    Exit codes as of the handoff itself.
    """
    from crosschip.handoff.handing_off import certify_directory

    _check_json(json_path, directory, answers)
    result = certify_directory(
        directory,
        golden,
        engines=engines,
        chip=chip,
        dtype=None if dtype == "auto" else dtype,
        key=key,
        engine_python=engine_python,
        answers=_answers(answers),
        tell=tell,
    )
    _end(result, json_path)


def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Files with their certificate.")],
    public_key: Annotated[
        Path | None,
        typer.Option(
            "--public-key", metavar="FILE", help="The key that must have signed (PEM, FILE.pub).", show_default=False
        ),
    ] = None,
) -> None:
    """Check files, hashes and signature, anywhere.

    Exit codes: 0 the files are the certified ones and passed, 1 they are not or failed, 3 they are and the certificate
    is inconclusive.
    """
    from crosschip.certificate import verify as verify_directory
    from crosschip.certificate.signing import read_public_key

    found = verify_directory(directory, None if public_key is None else read_public_key(public_key), tell)
    for line in found.lines():
        print(line)
    raise typer.Exit(found.exit_code)


def keygen(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The private key; the public one is FILE.pub.")],
) -> None:
    """Make a pair of ed25519 keys to sign certificates with. Keep FILE secret; give FILE.pub to whoever verifies."""
    from crosschip.certificate.signing import key_id, make_key, read_public_key

    public = make_key(file)
    print(f"private key: {file}\npublic key:  {public} ({key_id(read_public_key(public))})")


def _answers(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    from crosschip.rundir import read_json

    document = read_json(path)
    if not isinstance(document, dict) or "verdict" not in document:
        raise HandoffError(f"{path} is no report of a comparison", "make one with `crosschip handoff compare --json`")
    return document


def _check_json(json_path: Path | None, directory: Path, answers: Path | None) -> None:
    """Before anything is done: `--json` can be written, and is not a file more among the certified ones.

    Raises:
        CrosschipError: it cannot, or it is.
    """
    output_place(json_path, "the certificate", "--json", [answers] if answers is not None else [])
    if json_path is not None and json_path.resolve().is_relative_to(directory.resolve()):
        raise HandoffError(
            f"--json {json_path} lies in {directory}: a file more there, and its certificate no longer holds",
            "name another place; the certificate itself lies there as certificate.json",
        )


def _end(result: HandoffResult, json_path: Path | None) -> None:
    from crosschip.certificate.words import certificate_lines, serving_lines
    from crosschip.rundir import write_json

    for line in certificate_lines(result.certificate):
        print(line)
    print(f"\nfiles:       {result.directory}\ncertificate: {result.certificate.path}")
    if result.exit_code == 0:
        for line in serving_lines(result.certificate):
            print(line)
    sys.stdout.flush()
    if json_path is not None:
        write_json(json_path, result.certificate.document)
    raise typer.Exit(result.exit_code)


handoff.command(_SourceOrCommand.default)(guarded(make))
handoff.command()(guarded(certify))
handoff.command()(guarded(verify))
handoff.command()(guarded(keygen))
handoff.command()(guarded(overwrite))
handoff.command("compare")(guarded(compare_sides))
