"""What `benchmarks/qualify.py` found, as Markdown."""

from __future__ import annotations

from typing import Any

__all__ = ["TINY", "table"]

TINY = "tests.qualify.tiny:subject"  # whose honest variants are qualified


def table(document: dict[str, Any]) -> str:
    """The document as Markdown."""
    lines = [
        "# What `qualify` catches",
        "",
        "Made by `make bench-qualify`, two qualifications at a time with one thread each. The chip is simulated; no "
        "accelerator was used.",
        "",
    ]
    for part, tell in (("faults", _faults_table), ("honest", _honest_table), ("honest-links", _links_table)):
        if part in document:
            lines += tell(document[part])
    return "\n".join(lines)


def _machines(part: dict[str, Any], before: str) -> str:
    """What made a part; `before` leads in each of the other makers of its rows."""
    return " ".join([_machine(part), *(f"{before}: {_machine(again)}" for again in part.get("again", []))])


def _machine(part: dict[str, Any]) -> str:
    machine = part["fingerprint"]
    return (
        f"On {machine['host']['cpu']} ({machine['host']['usable_cores']} cores), torch {machine['software']['torch']}, "
        f"in {part['time_s'] / 60:.0f} minutes: `{part['command']}`."
    )


def _faults_table(part: dict[str, Any]) -> list[str]:
    lines = [
        "## Planted faults",
        "",
        f"Subject: {part['subject']}; smoke tier, or the exams of links and stability with 120 s for what only those "
        "catch. *Calls changed*: operator calls of one step of the subject that the fault changed, delayed or "
        "refused, of all calls; a fault that changes none and is not named is not applicable to this subject. "
        "*After*: seconds from the start of the command to the finding.",
        "",
        _machines(part, "Rows made again"),
        "",
        "| fault | what it does | role | calls changed | verdict | named by | as | after |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in part["rows"]:
        found = ("not applicable" if _is_foreign(row) else "**missed**", "", "")
        if named := row["named"]:
            found = (named["exam"], f"`{named['subject']}`", f"{named['found_after_s']:.0f} s")
        changed = f"{row['calls_changed']} of {row['calls']}"
        if row["acts_on_collectives"] or row["calls_changed"] is None:
            changed = "collectives" if row["acts_on_collectives"] else "the step does not end"
        lines.append("| " + " | ".join((row["id"], row["title"], row["role"], changed, row["verdict"], *found)) + " |")
    met = [row for row in part["rows"] if row["named"] or not _is_foreign(row)]
    caught = sum(1 for row in met if row["named"])
    foreign = len(part["rows"]) - len(met)
    more = f" {foreign} not applicable." if foreign else ""
    return [*lines, "", f"{caught} of {len(met)} caught and named by an expected exam.{more}", ""]


def _is_foreign(row: dict[str, Any]) -> bool:
    """Whether the subject never meets the fault."""
    return not row["named"] and row["calls_changed"] == 0 and not row["acts_on_collectives"]


def _honest_table(part: dict[str, Any]) -> list[str]:
    subject = f"Subject: `{TINY}`, half of the seeds as a chip to train on, half to serve on."
    lines = _variants_table("Honest variants", subject, part)
    return [*lines, "## Power", "", part["power"], ""]


def _links_table(part: dict[str, Any]) -> list[str]:
    subject = (
        "Subject: a small model with random weights, half of the seeds as a chip to train on, half to serve on. Exams: "
        "links, stability, and a golden bundle that the CPU recorded."
    )
    return _variants_table("Honest variants: links, stability, golden", subject, part)


def _variants_table(title: str, subject: str, part: dict[str, Any]) -> list[str]:
    runs = part["rows"]
    lines = [
        f"## {title}",
        "",
        subject,
        "",
        _machines(part, "Begun so"),
        "",
        "An exam that runs out of its time makes a qualification inconclusive; what it had looked at by then counts.",
        "",
        "| variant | qualifications | of them out of time | checks made | false alarms |",
        "| --- | --- | --- | --- | --- |",
    ]
    for variant in dict.fromkeys(run["variant"] for run in runs):
        mine = [run for run in runs if run["variant"] == variant]
        alarms = [alarm for run in mine for alarm in run["accused"]]
        checks = sum(run["num_checks"] for run in mine)
        cut = sum(run["verdict"] == "INCONCLUSIVE" for run in mine)
        lines.append(f"| `{variant}` | {len(mine)} | {cut} | {checks:,} | {len(alarms)} |")
    return [*lines, ""]
