"""Evaluations in the terminal, and two of them compared pair by pair on the problems that both were asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crosschip.errors import RunDirectoryError
from crosschip.paired.intervals import bootstrap_shares, score_interval
from crosschip.paired.pairs import PairTable, sign_test, table_of
from crosschip.paired.power import pairs_for_difference, smallest_difference
from crosschip.report.documents import KNOWN_SCHEMA, Document, objects
from crosschip.report.figures import count, percent
from crosschip.rundir import read_json

__all__ = ["compare_evaluations", "comparison_lines", "evaluation_lines", "read_evaluation"]

COMPARISON_SCHEMA = 1
ALPHA = 0.05
ONE_POINT = 0.01
_SETTINGS = ("max_new_tokens", "dtype", "checker", "samples", "temperature", "seed")  # should be the same on both sides
_Rights = dict[str, tuple[bool, list[bool]]]  # problem -> is the greedy answer right, are the drawn ones


def read_evaluation(path: Path) -> Document:
    """An evaluation.json, or that of a run directory; a document of a newer schema is refused.

    Raises:
        RunDirectoryError: there is none, or it is no evaluation that this crosschip can read.
    """
    file = path / "evaluation.json" if path.is_dir() else path
    document = read_json(file)
    newest = KNOWN_SCHEMA["evaluation.json"]
    if not isinstance(document, dict) or not objects(document, "problems"):
        raise RunDirectoryError(f"{file} is no evaluation: it holds no problems", "give what crosschip evaluate wrote")
    version = document.get("schema_version", 1)
    if not isinstance(version, int) or version > newest:
        raise RunDirectoryError(
            f"{file} has schema version {version!r}; this crosschip reads up to {newest}",
            "use the crosschip that wrote it, or a newer one",
        )
    return document


def evaluation_lines(document: Document) -> list[str]:
    """The table of one evaluation: the score, pass@k, lengths."""
    rows = [
        ("greedy", _share(document["score"], document["score_low_95"], document["score_high_95"]), _of_right(document)),
        *(_pass_row(each, document) for each in document.get("pass_at_k", []) if "drawn" in document),
        ("reasoning closed", percent(document["closed_reasoning_share"]), "of greedy answers"),
        ("ended by itself", percent(document["finished_share"]), "of greedy answers"),
    ]
    for what in ("reasoning", "answer"):
        if f"mean_{what}_tokens" in document:
            middle = document[f"median_{what}_tokens"]
            rows.append((f"{what} length", f"{document[f'mean_{what}_tokens']:.1f} tokens", f"median {middle:g}"))
    rows += _room_rows(document)
    if document.get("num_checker_errors"):
        rows.append(_failed_row(document))
    widths = [max(len(row[place]) for row in rows) for place in range(2)]
    return [f"{name:<{widths[0]}}  {value:<{widths[1]}}  {note}".rstrip() for name, value, note in rows]


def _pass_row(each: dict[str, Any], document: Document) -> tuple[str, str, str]:
    note = f"of {document['samples']} answers drawn to each problem, temperature {document['temperature']:g}"
    return f"pass@{each['k']}", _share(each["value"], each["low_95"], each["high_95"]), note


def _room_rows(document: Document) -> list[tuple[str, str, str]]:
    """Prompts beside which the answer does not fit: the model's context is at fault, or they are."""
    told = {
        "num_prompts_too_long": ("prompt too long", "not answered, and counted as wrong"),
        "num_prompts_with_less_room": (
            "less room",
            f"for fewer than {document.get('max_new_tokens')} tokens of answer",
        ),
    }
    most = count(document["num_problems"])
    return [(name, f"{count(document[key])} of {most}", why) for key, (name, why) in told.items() if document.get(key)]


def _failed_row(document: Document) -> tuple[str, str, str]:
    """How often the checker could not tell, and why the first time: these answers count as wrong."""
    num_answers = document["num_problems"] + document.get("drawn", {}).get("num_answers", 0)
    errors = (str(row["error"]) for row in objects(document, "problems") if row.get("error"))
    first = document.get("first_checker_error") or next(errors, "no reason was written down")
    return (
        "checker failed",
        f"{count(document['num_checker_errors'])} of {count(num_answers)} answers",
        f"first: {first}",
    )


def _of_right(document: Document) -> str:
    return f"{count(document['num_right'])} of {count(document['num_problems'])} right"


def _share(value: float, low: float, high: float) -> str:
    return f"{percent(value)} (95 %: {percent(low)} to {percent(high)})"


def compare_evaluations(a: Document, b: Document) -> dict[str, Any]:
    """Test whether B is right as often as A on the problems that both were asked; a document for JSON.

    `greedy` compares the greedy answers, one pair a problem (McNemar's exact test); `drawn` the drawn ones, where both
    have some, and then flips the sign of a whole problem, because answers to one problem hang together.

    Raises:
        RunDirectoryError: the two have no problem in common.
    """
    rights_a, rights_b = _rights(a), _rights(b)
    common = [problem for problem in rights_a if problem in rights_b]
    if not common:
        raise RunDirectoryError(
            "the two evaluations have no problem in common, so nothing can be paired",
            "evaluate both with the same level, number of problems and seed",
        )
    greedy = table_of((problem, rights_a[problem][0], rights_b[problem][0]) for problem in common)
    pairs = [
        (problem, *both) for problem in common for both in zip(rights_a[problem][1], rights_b[problem][1], strict=False)
    ]
    document = {
        "schema_version": COMPARISON_SCHEMA,
        "kind": "evaluations",
        "a": _side(a),
        "b": _side(b),
        "num_common": len(common),
        "num_only_a": len(rights_a) - len(common),
        "num_only_b": len(rights_b) - len(common),
        "differing_settings": _differing(a, b),
        "alpha": ALPHA,
        "greedy": _tested(greedy),
    }
    return document | ({"drawn": _tested(table_of(pairs))} if pairs else {})


def _rights(document: Document) -> _Rights:
    """By question and expected answer; a question that is asked twice is told apart by its turn."""
    seen: Counter[str] = Counter()
    rights: _Rights = {}
    for row in objects(document, "problems"):
        problem = f"{row.get('question')}\x00{row.get('expected')}"
        seen[problem] += 1
        drawn = [bool(each.get("right")) for each in objects(row, "drawn")]
        rights[f"{problem}\x00{seen[problem]}"] = bool(row.get("right")), drawn
    return rights


def _side(document: Document) -> dict[str, Any]:
    model = document.get("model") or {}
    return {"stage": document.get("stage"), "step": document.get("step")} | {
        key: model.get(key) for key in ("directory", "weights_sha256")
    }


def _differing(a: Document, b: Document) -> dict[str, list[Any]]:
    """Settings that both name and that are not the same: then not only the weights differ."""
    return {key: [a[key], b[key]] for key in _SETTINGS if key in a and key in b and a[key] != b[key]}


def _tested(table: PairTable) -> dict[str, Any]:
    test = sign_test(table.differences)
    interval, bootstrap = score_interval(table, 1 - ALPHA), bootstrap_shares(table, 1 - ALPHA, seed=0)
    needed = pairs_for_difference(ONE_POINT, table.discordance, ALPHA)
    pairs_a_problem = table.num_pairs / len(table.sizes)
    return {
        "num_problems": len(table.sizes),
        "num_pairs": table.num_pairs,
        "a": table.share_a,
        "b": table.share_b,
        "difference": table.difference,
        "low_95": interval.low,
        "high_95": interval.high,
        "bootstrap_low_95": bootstrap.low,
        "bootstrap_high_95": bootstrap.high,
        "p": test.exact,
        "only_a": table.only_a,
        "only_b": table.only_b,
        "smallest_detectable": smallest_difference(table.num_effective, table.discordance, ALPHA),
        "problems_for_one_point": None if needed is None else round(needed * table.design_effect / pairs_a_problem),
    }


def comparison_lines(document: dict[str, Any]) -> list[str]:
    """What `crosschip evaluate A B` prints."""
    lines = [f"{name}: {_name(document[name.lower()])}" for name in "AB"]
    lines.append(f"{count(document['num_common'])} problems in both")
    lines += [
        f"{count(document[f'num_only_{name.lower()}'])} problems are in {name} alone and do not count"
        for name in "AB"
        if document[f"num_only_{name.lower()}"]
    ]
    lines += [
        f"NOT the same on both sides: {key} {a} and {b}" for key, (a, b) in document["differing_settings"].items()
    ]
    for kind in ("greedy", "drawn"):
        if kind in document:
            lines += ["", *_tested_lines(kind, document[kind])]
    return lines


def _name(side: dict[str, Any]) -> str:
    return str(side["directory"] or f"{side['stage']}, step {side['step']}")  # a run's step may be another run's too


def _tested_lines(kind: str, tested: dict[str, Any]) -> Sequence[str]:
    seen, needed = tested["smallest_detectable"], tested["problems_for_one_point"]
    power = "no difference could be seen" if seen is None else f"{100 * seen:.1f} points or more"
    is_single = tested["num_pairs"] == tested["num_problems"]
    answers = "" if is_single else f" ({count(tested['num_pairs'])} pairs)"
    test = "McNemar's exact test" if is_single else "exact sign-flip test over problems"
    return [
        f"{kind} answers{answers}: A {percent(tested['a'])}, B {percent(tested['b'])}",
        f"  B - A      {_points(tested['difference'])} points (95 %: {_points(tested['low_95'])} to "
        f"{_points(tested['high_95'])}; bootstrap {_points(tested['bootstrap_low_95'])} to "
        f"{_points(tested['bootstrap_high_95'])})",
        f"  p          {tested['p']:.2g}, {test}: only A right {tested['only_a']}, only B right {tested['only_b']}",
        f"  could see  {power}, with 80 % power"
        + ("" if needed is None else f"; one point would take {count(needed)} problems"),
        f"  so         {_conclusion(tested)}",
    ]


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _conclusion(tested: dict[str, Any]) -> str:
    if tested["p"] <= ALPHA:
        return "B is better" if tested["difference"] > 0 else "B is worse"
    return "no difference is shown; that is not the same as being equal"
