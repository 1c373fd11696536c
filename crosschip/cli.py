"""The verbs. Nothing is computed here: each command reads its options, imports its room and calls it.

Rooms are imported inside the commands, so that `--help` answers at once and without torch. `_guarded` is the one place
where an error becomes a message and an exit code.
"""

from __future__ import annotations

import errno
import functools
import json
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, NoReturn, ParamSpec

import typer

from crosschip import __version__
from crosschip.errors import EXIT_BAD_USAGE, EXIT_DEFECT, CrosschipError, NotBuiltYet, QualifyError

__all__ = ["app", "main"]

EXIT_INTERRUPTED = 130

# What the operating system may refuse without any fault of ours.
_REFUSALS = {
    errno.ENOSPC: "free some space on that disk, or write elsewhere with --out",
    errno.EDQUOT: "free some of your quota, or write elsewhere with --out",
    errno.EACCES: "give this user the permission, or use another place",
    errno.EROFS: "that file system cannot be written to; use another place with --out",
}

app = typer.Typer(
    name="crosschip",
    help="Train a reasoning model on one vendor's chips, serve it on another's, and prove every step.",
    epilog="Exit codes: 0 done, 1 an examination failed, 2 bad usage, 3 inconclusive, 4 a defect of crosschip.",
    rich_markup_mode=None,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="The TOML file that describes the run.")]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="The run directory; runs/NAME if not given.", show_default=False),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe, as in train.steps=200. Repeatable."),
]
SkipBadRowsOption = Annotated[
    int | None,
    typer.Option(min=0, metavar="N", help="Leave out up to N rows of data that cannot be read; they are counted."),
]
HostOption = Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 lets other machines in.")]
PortOption = Annotated[int, typer.Option(min=0, max=65535, help="The port to listen on.")]
ChipOption = Annotated[str, typer.Option(metavar="CHIP", help="auto, cpu, or a torch device such as cuda:1 or npu.")]

ExaminedChipOption = Annotated[
    str,
    typer.Option(
        metavar="CHIP", help="auto, cpu, a torch device such as npu:0, or a simulated chip such as sim:N1,limit=512."
    ),
]

Parameters = ParamSpec("Parameters")


def _guarded(command: Callable[Parameters, None]) -> Callable[Parameters, None]:
    """Turn what a command raises into a message on stderr and an exit code."""

    @functools.wraps(command)
    def guarded(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (typer.Exit, BrokenPipeError):
            raise
        except CrosschipError as error:
            _end(f"crosschip: {error}", error.exit_code)
        except KeyboardInterrupt:
            _end("crosschip: interrupted", EXIT_INTERRUPTED)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _REFUSALS:
                _end(f"crosschip: {error}\n  what to do: {_REFUSALS[error.errno]}", EXIT_BAD_USAGE)
            traceback.print_exc()
            _end(f"crosschip: {type(error).__name__}: this is a defect of crosschip, please report it", EXIT_DEFECT)

    return guarded


def _end(message: str, exit_code: int) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    raise typer.Exit(exit_code) from None


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"crosschip {__version__}")
        raise typer.Exit


@app.callback()
def crosschip(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Hold the options that stand before a verb."""


@app.command()
@_guarded
def run(
    recipe: RecipeArgument,
    out: OutOption = None,
    overrides: SetOption = None,
    skip_bad_rows: SkipBadRowsOption = None,
    serve: Annotated[bool, typer.Option("--serve", help="Stay up at the end and serve the model.")] = False,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
) -> None:
    """The whole voyage of a recipe on this machine: train, evaluate, hand off, compare, and show how to chat."""
    from crosschip.voyage import run_voyage

    settings = _overrides(recipe, overrides, skip_bad_rows)
    run_voyage(recipe, out=out, overrides=settings, serve=serve, host=host, port=port)


@app.command()
@_guarded
def qualify(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="SUBJECT", help="A recipe, a model directory, or package.module:function.", show_default=False
        ),
    ] = None,
    chip: ExaminedChipOption = "auto",
    role: Annotated[Literal["train", "serve"], typer.Option(help="What the chip shall do.")] = "train",
    tier: Annotated[
        Literal["smoke", "standard", "soak"], typer.Option(help="How long to look: 2, 15 or 30 minutes.")
    ] = "smoke",
    json_path: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="The report; else qualify/CHIP-ROLE.json.", show_default=False),
    ] = None,
    trace_only: Annotated[
        bool, typer.Option("--trace-only", help="Only print which operator calls the subject makes.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="The seed of all inputs that are drawn.")] = 0,
    exams: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Only these exams: software, operators, ...", show_default=False),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.1, help="Wall time, instead of the tier's.", show_default=False)
    ] = None,
) -> None:
    """Examine whether a chip can train or serve a subject: findings, reproducers, a verdict.

    Exit codes: 0 PASS or PASS WITH LIMITS, 1 FAIL, 3 INCONCLUSIVE.
    """
    if model is None:
        raise QualifyError(
            "--model is missing: a chip is examined for a model and its workload",
            "give a recipe (--model recipes/first.toml), a model directory, or package.module:function",
        )
    from crosschip.qualify.finding import EXIT_CODES
    from crosschip.qualify.programme import Request, named_exams
    from crosschip.qualify.qualification import qualify as examine
    from crosschip.qualify.qualification import record_trace_document
    from crosschip.rundir import RunDirectory, write_json

    report_path = json_path or RunDirectory(Path()).qualification(chip, role)
    chosen = None if exams is None else named_exams([name.strip() for name in exams.split(",")])
    time_s = None if minutes is None else 60.0 * minutes
    request = Request(model, chip, role, tier, report_path, seed, chosen, time_s)
    if trace_only:
        trace = record_trace_document(request, _tell)
        if json_path is not None:
            write_json(json_path, trace)
        from crosschip.report.trace_table import print_trace

        print_trace(trace)
        return
    report = examine(request, _tell)
    from crosschip.report.qualify_table import print_qualification

    print_qualification(report)
    print(f"\nreport: {request.report}")
    raise typer.Exit(EXIT_CODES[report["verdict"]])


def _tell(line: str) -> None:
    """A line of progress, for people who wait."""
    if sys.stderr.isatty():
        print(f"crosschip: {line}", file=sys.stderr, flush=True)


@app.command()
@_guarded
def plan(
    recipe: RecipeArgument,
    cluster: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The cluster: chips, nodes, network, price.", show_default=False),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A report of `qualify`, for measured rates.", show_default=False)
    ] = None,
    by: Annotated[
        str | None, typer.Option(metavar="YYYY-MM-DD", help="The date it must be ready by.", show_default=False)
    ] = None,
) -> None:
    """Say memory, layout, step time, goodput, cost and date of a run on a cluster (not built yet)."""
    raise NotBuiltYet(
        f"`crosschip plan` is not built yet: nothing was computed for {recipe} on {cluster or 'no cluster'}, "
        f"with {report or 'no report'}, by {by or 'no date'}",
        "measure a short run with `crosschip train` on one machine of that cluster",
    )


@app.command()
@_guarded
def train(
    recipe: RecipeArgument,
    out: OutOption = None,
    overrides: SetOption = None,
    skip_bad_rows: SkipBadRowsOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last complete checkpoint.")] = False,
) -> None:
    """Train what the recipe says: pre-training, then fine-tuning; checkpoints and metrics in the run directory."""
    from crosschip.recipe import load_recipe
    from crosschip.rundir import RunDirectory, write_text

    settings = _overrides(recipe, overrides, skip_bad_rows)
    resolved = load_recipe(recipe, settings)
    from crosschip.train import train_recipe  # takes seconds: a recipe's fault is told before

    run = RunDirectory(out or Path("runs") / resolved.name)
    if not resume and not (run.path / "train").exists():
        write_text(run.recipe, recipe.read_text(encoding="utf-8"))
    again = ["crosschip", "train", str(recipe), "--out", str(run.path)]
    again += [*(part for setting in settings for part in ("--set", setting)), "--resume"]
    outcome = train_recipe(resolved, run, resume=resume, resume_command=shlex.join(again))
    raise typer.Exit(outcome.exit_code)


@app.command()
@_guarded
def handoff(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory with a trained model.")],
    to: Annotated[str, typer.Option("--to", metavar="TARGET", help="The form to hand off: hf (Hugging Face).")],
) -> None:
    """Write the model files of a run for a target engine."""
    from crosschip.recipe import parse_recipe
    from crosschip.rundir import RunDirectory, read_json

    directory = RunDirectory(run)
    recipe = parse_recipe(read_json(directory.resolved_recipe), str(directory.resolved_recipe))
    if to != "hf":
        raise NotBuiltYet(f"--to {to!r} is not a target that is built yet", "use --to hf, which most engines read")
    from crosschip.handoff import export_hf

    with directory.lock():
        export_hf(directory, recipe, directory.handoff(to))
    print(f"{directory.handoff(to)}\nserve it with: crosschip serve {shlex.quote(str(directory.handoff(to)))}")


@app.command()
@_guarded
def serve(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A model directory in the published layout.")],
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    chip: ChipOption = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"], typer.Option(help="Compute type; auto is the checkpoint's own.")
    ] = "auto",
    max_batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Requests computed together.")] = 16,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            min=2, metavar="N", help="Tokens of prompt and answer; else the model's limit.", show_default=False
        ),
    ] = None,
    model_name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The name in the API; else the directory's.", show_default=False),
    ] = None,
    require_certificate: Annotated[
        bool, typer.Option("--require-certificate", help="Refuse a model without a valid certificate.")
    ] = False,
) -> None:
    """Serve a model: an OpenAI-compatible API at /v1 and a chat page at /."""
    from crosschip.serve import serve as serve_directory

    serve_directory(
        directory,
        host=host,
        port=port,
        max_batch_size=max_batch_size,
        max_model_len=max_model_len,
        dtype=dtype,
        device=chip,
        model_name=model_name,
        require_certificate=require_certificate,
    )


@app.command()
@_guarded
def compare(
    reports: Annotated[list[Path], typer.Argument(metavar="REPORT REPORT...", help="Qualification reports (JSON).")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The page to write.", show_default=False)
    ] = None,
) -> None:
    """Put the reports of several chips side by side for one model (not built yet)."""
    raise NotBuiltYet(
        f"`crosschip compare` is not built yet; {len(reports)} reports were not read",
        "read the run pages (index.html) of the runs beside each other",
    )


@app.command()
@_guarded
def chat(
    target: Annotated[str, typer.Argument(metavar="DIR_OR_URL", help="A model directory, or a server's address.")],
) -> None:
    """Chat in the terminal with a model directory or with a running server."""
    from crosschip.serve import chat_terminal

    chat_terminal(target)


@app.command()
@_guarded
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Look at drivers, plug-ins and versions before torch is imported, and say what to do."""
    from crosschip.doctor import examine, print_report

    report = examine()
    if as_json:
        print(json.dumps(report.document(), indent=2))
    else:
        print_report(report)
    raise typer.Exit(report.exit_code)


def _overrides(recipe: Path, overrides: list[str] | None, skip_bad_rows: int | None) -> list[str]:
    """What `--set` says, and `--skip-bad-rows` written as settings of every data table that the recipe has."""
    if skip_bad_rows is None:
        return overrides or []
    from crosschip.recipe import load_recipe

    resolved = load_recipe(recipe, overrides)
    stages = {"train": resolved.train, "sft": resolved.sft}
    tables = ["data", *(f"{name}.data" for name, stage in stages.items() if stage is not None and stage.data)]
    return [*(overrides or []), *(f"{table}.skip_bad_rows={skip_bad_rows}" for table in tables)]


def main() -> None:
    """Run the command line; `python -m crosschip` and the `crosschip` script both come here."""
    app()
