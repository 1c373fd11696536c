"""A comparison as Markdown and as one HTML page: the answer with its grounds, then the chips beside each other."""

from __future__ import annotations

import re
from typing import Any

from crosschip.report.documents import Document
from crosschip.report.qualification import shown
from crosschip.report.templating import render

__all__ = ["compare_markdown", "compare_page"]

_STATES = {"PASS": "good", "PASS WITH LIMITS": "open", "INCONCLUSIVE": "open", "FAIL": "bad"}
_ANSWERS = {"RECOMMENDED": "good", "NONE": "bad", "INCONCLUSIVE": "open", "NOT EXAMINED": "open"}
_QUESTIONS = {"train": "Which chip for training?", "serve": "Which chip for inference?"}
_ROLES = {"train": "to train", "serve": "to serve"}

Table = tuple[str, list[str], list[list[str]]]  # title, headings, rows


def compare_markdown(document: Document) -> str:
    """A comparison document as Markdown."""
    lines = [f"# Chips for {_plain(document['subject'])}", "", f"**{_plain(document['summary'])}**", ""]
    for role, question in _QUESTIONS.items():
        answer = document["recommendations"][role]
        lines += [f"## {question}", "", f"**{_plain(_answer_text(answer))}**", ""]
        lines += [f"- {_plain(each)}" for each in answer["grounds"]]
        lines += [f"- {_plain(answer['leaning'])}"] if answer["leaning"] else []
        lines += [f"- not shown yet: {_plain(each)}" for each in answer["missing"]] + [""]
    for title, headings, rows in _tables(document):
        lines += [f"## {title}", "", _markdown_row(headings), _markdown_row(["---"] * len(headings), plain=False)]
        lines += [_markdown_row(row) for row in rows] + [""]
    if document["notes"]:
        lines += ["## Notes", "", *(f"- {_plain(note)}" for note in document["notes"]), ""]
    return "\n".join(lines)


def compare_page(document: Document) -> str:
    """A comparison document as one HTML page."""
    answers = [
        {
            "question": question,
            "answer": _answer_text(document["recommendations"][role]),
            "state": _ANSWERS[document["recommendations"][role]["answer"]],
            **{key: document["recommendations"][role][key] for key in ("grounds", "missing", "leaning")},
        }
        for role, question in _QUESTIONS.items()
    ]
    tables = [
        {"title": title, "headings": headings, "rows": [[_cell(text) for text in row] for row in rows]}
        for title, headings, rows in _tables(document)
    ]
    view = {
        "subject": str(document["subject"]),
        "summary": str(document["summary"]),
        "answers": answers,
        "tables": tables,
        "worst": _worst(document),
        "notes": document["notes"],
    }
    return render("comparison.html", view, styles=("style.css", "qualification.css"))


def _cell(text: str) -> tuple[str, str]:
    """(text, CSS class): a verdict has its colour, beside its words."""
    verdict = next((each for each in ("PASS WITH LIMITS", "PASS", "FAIL", "INCONCLUSIVE") if text.startswith(each)), "")
    return text, _STATES.get(verdict, "unconfirmed" if "unconfirmed" in text else "")


def _answer_text(answer: Document) -> str:
    if answer["chip"]:
        return str(answer["chip"])
    words = {
        "NONE": "None of these",
        "INCONCLUSIVE": "INCONCLUSIVE: the evidence does not carry an answer",
        "NOT EXAMINED": "Not examined",
    }
    return words[answer["answer"]]


def _tables(document: Document) -> list[Table]:
    chips = document["chips"]
    headings = ["", *(str(chip["title"]) for chip in chips)]
    tables = [
        ("Verdicts", headings, _verdict_rows(chips)),
        ("The exams", headings, _exam_rows(chips)),
        ("Measured", headings, _measured_rows(chips)),
        ("Published, not measured", headings, _published_rows(chips)),
    ]
    return [table for table in tables if table[2]]


def _verdict_rows(chips: list[Document]) -> list[list[str]]:
    rows = []
    for role, words in _ROLES.items():
        mine = [chip["roles"].get(role) for chip in chips]
        if not any(mine):
            continue
        rows.append([words, *(_verdict(each) for each in mine)])
        rows.append([f"{words}: in", *((each or {}).get("compute_dtype") or "–" for each in mine)])
        rows.append(
            [f"{words}: examined", *(f"{each['tier']} tier, {each['began'][:10]}" if each else "–" for each in mine)]
        )
        dates = [chip["plans"].get(role) for chip in chips]
        if any(dates):
            rows.append([f"{words}: ready, P50 and P90", *(_dates(each) if each else "no plan" for each in dates)])
    return rows


def _dates(plan: Document) -> str:
    where = f" (planned on {plan['cluster']})" if plan.get("cluster") else ""
    return f"{plan['p50']}, {plan['p90']}{where}"


def _verdict(role: Document | None) -> str:
    if role is None:
        return "not examined"
    counts = role["num_findings"]
    told = f"{role['verdict']}, {_number(counts['FAIL'], 'failure')}, {_number(counts['PASS WITH LIMITS'], 'limit')}"
    if not role["complete"]:
        return f"{told}, interrupted"
    return f"{told}; {role['partial']}" if role["partial"] else told


def _number(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _exam_rows(chips: list[Document]) -> list[list[str]]:
    rows = []
    for role, words in _ROLES.items():
        taken = [chip["roles"].get(role) or {"exams": {}, "not_ended": {}} for chip in chips]
        for exam in dict.fromkeys(name for each in taken for name in each["exams"]):
            cells = [
                each["exams"].get(exam, "not taken")
                + (f" ({each['not_ended'][exam]})" if exam in each["not_ended"] else "")
                for each in taken
            ]
            rows.append([f"{exam}, {words}", *cells])
    return rows


def _measured_rows(chips: list[Document]) -> list[list[str]]:
    found: dict[str, dict[int, str]] = {}
    for place, chip in enumerate(chips):
        for each in chip["measured"]:
            role = f", {_ROLES[each['role']]}" if each.get("role") in _ROLES else ""
            unit = f" {each['unit']}" if each.get("unit") else ""
            found.setdefault(f"{each['what']}{role}", {})[place] = f"{shown(each['value'])}{unit}"
    return [[what, *(cells.get(place, "not measured") for place in range(len(chips)))] for what, cells in found.items()]


def _published_rows(chips: list[Document]) -> list[list[str]]:
    if not any(chip["published"] for chip in chips):
        return []
    found: dict[str, dict[int, str]] = {}
    for place, chip in enumerate(chips):
        for each in (chip["published"] or {"figures": []})["figures"]:
            text = each["text"] if each["confirmed"] else f"{each['text'] or '?'} (unconfirmed)"
            found.setdefault(each["what"], {})[place] = text
    named = [_taken_for(chip["published"]) for chip in chips]
    rows = [[what, *(cells.get(place, "–") for place in range(len(chips)))] for what, cells in found.items()]
    return [["taken for", *named], *rows]


def _taken_for(published: Document | None) -> str:
    if published is None:
        return "no such chip in the table"
    return f"{published['name']}; {published['note']}" if published["note"] else str(published["name"])


def _worst(document: Document) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """(chip and role, [(verdict, subject, message)])."""
    return [
        (
            f"{chip['title']} {_ROLES[role]}",
            [(each["verdict"], each["subject"], each["message"]) for each in mine["worst"]],
        )
        for chip in document["chips"]
        for role, mine in chip["roles"].items()
        if mine["worst"]
    ]


def _markdown_row(cells: list[str], plain: bool = True) -> str:
    return f"| {' | '.join(_plain(cell) if plain else cell for cell in cells)} |"


def _plain(text: Any) -> str:
    """Text that Markdown shows as it is, on one line; a terminal is sent nothing that it would obey or cannot show."""
    line = "".join(each if each.isprintable() else _in_escapes(each) for each in " ".join(str(text).split()))
    return re.sub(r"([\\`*_{}\[\]<>|#!~&])", r"\\\1", line)


def _in_escapes(character: str) -> str:
    """A control character, or half of a surrogate pair, as Python writes it."""
    return character.encode("unicode_escape").decode()
