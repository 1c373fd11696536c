"""Code: the last fenced block of the answer, run in the sandbox against the row's tests."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from crosschip.errors import DataError
from crosschip.rewards.attempt import Attempt
from crosschip.rewards.sandbox import Limits, run_script, run_tests

__all__ = ["CodeProblem", "candidate_of", "check_code", "parse_problem"]

_REMEDY = (
    'give Python code with asserts, {"tests": "..."} with the same as JSON, '
    'or {"inputs": [...], "outputs": [...]} with texts for standard input and output'
)
_PYTHON_FENCES = ("python", "py", "python3")


@dataclass(frozen=True)
class CodeProblem:
    """Tests as Python code, or pairs of standard input and the output that is expected for it."""

    tests: str | None
    cases: tuple[tuple[str, str], ...] = ()


def check_code(attempt: Attempt, limits: Limits = Limits()) -> float:  # noqa: B008 (frozen)
    """1.0 where the candidate passes all tests within `limits`, else 0.0; a candidate that hangs has failed them.

    Tests that cannot be run (empty, no Python, a malformed object) are a `DataError`, a sandbox that cannot be set up
    is a `SandboxError`. What the sandbox guards against and what not stands in docs/rewards.md.
    """
    problem = parse_problem(attempt.expected)
    candidate = candidate_of(attempt.answer) if attempt.closed else ""
    if not candidate.strip():
        return 0.0
    if problem.tests is not None:
        return float(run_tests(candidate, problem.tests, limits))
    left_s = limits.wall_s  # of the candidate's own time: each case starts a sandbox, which is none of its
    for given, wanted in problem.cases:
        if left_s <= 0:
            return 0.0
        run = run_script(candidate, given, replace(limits, wall_s=left_s))
        if run.output is None or _lines(run.output) != _lines(wanted):
            return 0.0
        left_s -= run.wall_s
    return 1.0


def parse_problem(expected: str) -> CodeProblem:
    """The tests of a row: Python code, or a JSON object of one of two forms; anything else is a `DataError`."""
    if not expected.lstrip().startswith("{"):
        return CodeProblem(_compiled(expected))
    try:
        document = json.loads(expected)
    except json.JSONDecodeError as error:
        raise DataError(f"the row's tests start with a brace and are no JSON: {error}", _REMEDY) from error
    if document.keys() == {"tests"} and isinstance(document["tests"], str):
        return CodeProblem(_compiled(document["tests"]))
    if document.keys() == {"inputs", "outputs"}:
        return CodeProblem(None, _cases(document["inputs"], document["outputs"]))
    raise DataError(f"the row's tests are an object of {sorted(document)}", _REMEDY)


def candidate_of(answer: str) -> str:
    """The last fenced block of Python; else the last one without a language; else, without a fence, the whole answer.

    A block that is never closed counts as well: many models end behind their last line of code.
    """
    blocks: dict[bool, str] = {}
    language: str | None = None  # of the block that is open
    lines: list[str] = []
    for line in [*answer.split("\n"), "```"]:
        fence = line.strip()
        if not fence.startswith("```"):
            lines.append(line)
        elif language is None:
            language, lines = fence.strip("`").strip().casefold(), []
        else:
            if language in _PYTHON_FENCES or language == "":
                blocks[language in _PYTHON_FENCES] = "\n".join(lines)
            language = None
    return blocks.get(True, blocks.get(False, answer if "```" not in answer else ""))


def _compiled(tests: str) -> str:
    if not tests.strip():
        raise DataError("the row's tests are empty, so anything would pass them", _REMEDY)
    try:
        compile(tests, "<tests>", "exec")
    except (SyntaxError, ValueError) as error:
        raise DataError(f"the row's tests are no Python: {error}", _REMEDY) from error
    return tests


def _cases(inputs: object, outputs: object) -> tuple[tuple[str, str], ...]:
    are_texts = all(isinstance(each, list) and all(isinstance(one, str) for one in each) for each in (inputs, outputs))
    if not are_texts:
        raise DataError("the row's inputs and outputs are not lists of texts", _REMEDY)
    assert isinstance(inputs, list)
    assert isinstance(outputs, list)
    if len(inputs) != len(outputs) or not inputs:
        raise DataError(f"the row has {len(inputs)} inputs and {len(outputs)} outputs", _REMEDY)
    return tuple(zip(inputs, outputs, strict=True))


def _lines(output: str) -> list[str]:
    """The lines of an output, without blanks at their ends and without empty lines at its end."""
    return [line.rstrip() for line in output.rstrip().split("\n")]
