"""The end of a voyage in the terminal, from the same documents as the page."""

from __future__ import annotations

from crosschip.report.answers import view_agreement, view_evaluation
from crosschip.report.certificates import view_certificate
from crosschip.report.documents import objects, read_run
from crosschip.report.figures import duration
from crosschip.rundir import RunDirectory

__all__ = ["voyage_summary"]


def voyage_summary(run: RunDirectory) -> str:
    """A dozen lines: the score, the agreement, the time of each step, where the page is, how to chat."""
    documents = read_run(run)
    voyage = documents.voyage or {}
    evaluation, agreement = view_evaluation(documents.evaluation), view_agreement(voyage)
    timed = [step for step in objects(voyage, "steps") if isinstance(step.get("seconds"), int | float)]
    rows = [(str(step.get("title", "?")), float(step["seconds"])) for step in timed]
    rows.append(("all together", sum(seconds for _, seconds in rows)))
    width = max(len(title) for title, _ in rows)
    lines = [f"{documents.name}: " + ("every step finished" if voyage.get("finished") else "not finished"), ""]
    lines += [f"  {title:<{width}}  {duration(seconds):>12}" for title, seconds in rows] + [""]
    lines.append(
        "  held-out problems  " + (evaluation.sentence if evaluation else "not asked (no [evaluate] in the recipe)")
    )
    lines.append("  after handoff      " + (agreement.sentence if agreement else "not compared"))
    lines += [f"  files as {name:<10}{view_certificate(run.handoff(name)).sentence}" for name in documents.handoffs]
    lines.append(f"  the run as a page  {run.index_page}")
    if documents.handoffs.get("hf"):
        target = run.handoff("hf")
        lines += [
            "",
            f"  chat here:          crosschip chat {target}",
            f"  chat in a browser:  crosschip serve {target}",
        ]
    return "\n".join(lines)
