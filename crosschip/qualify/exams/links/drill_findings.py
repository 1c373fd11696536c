"""What the drill's outcomes mean. Documents only: no torch."""

from __future__ import annotations

from crosschip.qualify.exams.links.drill import GRACE_S, Detection, Skew
from crosschip.qualify.finding import Finding

__all__ = ["detection_finding", "skew_finding"]


def detection_finding(exam: str, found: Detection) -> Finding | None:
    """A dead or stopped rank that the others do not notice within their time-out; None when they do."""
    subject = f"rank {found.struck} {found.how}"
    if found.trouble:
        return Finding(
            exam=exam,
            kind="links",
            verdict="INCONCLUSIVE",
            subject=subject,
            check="drill",
            message=f"the drill with {subject} could not be made: {found.trouble}",
            measured="not made",
            limit="made",
        )
    if found.slowest_s is not None and found.slowest_s <= found.timeout_s + GRACE_S:
        return None
    waited_s = found.timeout_s + GRACE_S
    silent = ", ".join(map(str, found.silent))
    return Finding(
        exam=exam,
        kind="links",
        verdict="FAIL",
        subject=subject,
        check="drill",
        message=f"rank {found.struck} was {found.how} in an all_reduce, and rank {silent or '0'} still waited for it "
        f"{waited_s:.0f} s later: the time-out of {found.timeout_s:g} s is not honoured",
        measured=found.slowest_s if found.slowest_s is not None else f"more than {waited_s:.0f} s",
        limit=waited_s,
        limit_source=f"the time-out of {found.timeout_s:g} s that was set, and {GRACE_S:g} s of grace",
        critical=True,
        severity=100.0,
        details={"detected_s": found.detected_s, "words": found.words},
    )


def skew_finding(exam: str, found: Skew) -> Finding | None:
    """Ranks that do not meet because one started late; None when they do."""
    if found.met_after_s is not None and not found.deaths:
        return None
    died = found.deaths[0] if found.deaths else None
    what = f"rank {died.rank}: {died.how}" if died else "they had not met when the time was over"
    return Finding(
        exam=exam,
        kind="links",
        verdict="FAIL",
        subject=f"rank {found.late_rank} starts {found.skew_s:g} s late",
        check="start skew",
        message=f"ranks that start {found.skew_s:g} s apart fail to connect (rank {found.late_rank} was late): {what}",
        measured="not connected",
        limit="connected",
        limit_source=f"the time-out of {found.timeout_s:g} s that was set; ranks of a large job start minutes apart",
        critical=True,
        severity=100.0,
    )
