"""`crosschip golden`: record what a model answers on the chip that trained it, and replay it anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from crosschip.cli.guard import guarded
from crosschip.cli.options import ExaminedChipOption
from crosschip.cli.reports import output_place, tell
from crosschip.errors import GoldenError

if TYPE_CHECKING:
    from crosschip.golden.comparison import Comparison

__all__ = ["golden"]

DtypeOption = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option("--dtype", help="The arithmetic; auto is the dtype of the files (record) or of the bundle (replay)."),
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers and findings.", show_default=False)
]

golden = typer.Typer(
    help="Record a model's answers on the chip that trained it, and replay them anywhere without that chip.",
    rich_markup_mode=None,
    no_args_is_help=True,
)


def record(
    source: Annotated[
        Path, typer.Argument(metavar="RUN_OR_DIR", help="A run directory after training, or a model directory.")
    ],
    chip: ExaminedChipOption = "auto",
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="The bundle; RUN/golden if not given.", show_default=False),
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option("--texts", metavar="FILE", help="Real text to add, one a line (UTF-8).", show_default=False),
    ] = None,
    dtype: DtypeOption = "auto",
) -> None:
    """Record a golden bundle: answers, activations, router choices, a training curve, the chip's own noise.

    Of a run its validation data are recorded as well.
    """
    import torch

    from crosschip.chips import find_chip
    from crosschip.data.validation_rows import validation_rows
    from crosschip.golden.bundle import ARRAYS_FILE
    from crosschip.golden.record import record as record_bundle
    from crosschip.rundir import RunDirectory

    is_run = not (source / "config.json").is_file()
    if out is None and not is_run:
        raise GoldenError("--out is missing: where the bundle of a model directory goes", "give --out DIR")
    target = out or source / "golden"
    manifest = record_bundle(
        source,
        find_chip(chip),
        target,
        dtype=None if dtype == "auto" else getattr(torch, dtype),
        texts=_lines_of(texts) if texts is not None else (),
        token_rows=validation_rows(RunDirectory(source)) if is_run else (),
        tell=tell,
    )
    floor, num_tokens = manifest["noise_floor"], sum(row["length"] for row in manifest["rows"])
    where = f"in {manifest['compute_dtype']} on {manifest['recorded_on']}"
    print(f"{len(manifest['rows'])} rows, {num_tokens} tokens, {where}")
    print(f"the chip's own noise: mean KL {floor['mean_kl']:.1e}, one log-prob up to {floor['logprob']:.1e}")
    if manifest["lengths_left_out"]:
        print(f"left out for size: rows of {', '.join(map(str, manifest['lengths_left_out']))} tokens")
    print(f"bundle: {target} ({(target / ARRAYS_FILE).stat().st_size / 1e6:.1f} MB of numbers)")


def replay(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The directory that `golden record` wrote.")],
    model: Annotated[
        Path | None,
        typer.Option("--model", metavar="DIR", help="The model to run, or that --url serves.", show_default=False),
    ] = None,
    chip: ExaminedChipOption = "auto",
    url: Annotated[
        str | None,
        typer.Option(
            "--url", metavar="URL", help="An OpenAI-compatible engine with prompt log-probs.", show_default=False
        ),
    ] = None,
    dtype: DtypeOption = "auto",
    quantised: Annotated[
        Literal["q8_0", "int8", "fp8"] | None,
        typer.Option("--quantised", help="How the replayed model was quantised, for its limit.", show_default=False),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", envvar="CROSSCHIP_API_KEY", metavar="KEY", help="For --url.", show_default=False),
    ] = None,
    json_path: JsonOption = None,
) -> None:
    """Replay a bundle through a model on a chip, or through an engine at an address, and name what differs.

    Exit codes: 0 PASS or PASS WITH LIMITS, 1 FAIL, 3 INCONCLUSIVE; 2 when the bundle is refused.
    """
    from crosschip.golden.bundle import load_bundle
    from crosschip.golden.judge import judge
    from crosschip.golden.words import replay_lines
    from crosschip.qualify.finding import EXIT_CODES
    from crosschip.rundir import write_json

    if model is None and url is None:
        raise GoldenError("neither --model nor --url is given", "give --model DIR (with --chip CHIP) or --url URL")
    output_place(json_path, "the numbers", "--json")
    comparison: Comparison
    chosen = None if dtype == "auto" else dtype
    recorded = load_bundle(bundle)
    if url is not None:
        from crosschip.golden.engine_replay import replay_over_http

        comparison = replay_over_http(
            recorded, url, files=model, dtype=chosen, quantised=quantised, api_key=api_key, tell=tell
        )
    else:
        assert model is not None
        from crosschip.chips import find_chip

        if recorded.route == "transformers":
            from crosschip.golden.transformers_replay import replay_through_transformers as replay_model
        else:
            from crosschip.golden.replay import replay as replay_model
        comparison = replay_model(recorded, model, find_chip(chip), dtype=chosen, quantised=quantised, tell=tell)
    judgement = judge(comparison)
    for line in replay_lines(comparison, judgement):
        print(line)
    if json_path is not None:
        write_json(json_path, {**judgement.document(), "comparison": comparison.document()})
    raise typer.Exit(EXIT_CODES[judgement.verdict])  # type: ignore[index]  # golden spells the verdicts itself


def _lines_of(file: Path) -> list[str]:
    """The texts of a file, one a line; empty lines are none."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # U+2028 and its like are part of a text
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError) as error:
        problem = f"the texts in {file} cannot be read: {error}"
        raise GoldenError(problem, "give a UTF-8 file, one text a line") from None
    return [line for line in lines if line.strip()]


golden.command()(guarded(record))
golden.command()(guarded(replay))
