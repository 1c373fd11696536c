"""How much was examined: only a report of all exams of its kind can recommend a chip. Pure.

A report lists the exams that were taken and not those that were left out, so all that there are stand here. A test
holds them against the programme of the qualification, which a report does not import.
"""

from __future__ import annotations

from crosschip.report.documents import Document, objects

__all__ = ["LONGER_EXAMS", "SERVING_PROBES", "SMOKE_EXAMS", "TIERS", "shortfall", "thoroughness"]

TIERS = ("smoke", "standard", "soak")
SMOKE_EXAMS = ("software", "special_values", "attention", "determinism", "rehearsal", "operators")
LONGER_EXAMS = (*SMOKE_EXAMS, "links", "stability")  # of the other tiers
SERVING_PROBES = (
    "serving_determinism",
    "serving_ladder",
    "serving_batching",
    "serving_prefix_cache",
    "serving_streaming",
    "serving_stopping",
    "serving_utf8",
    "serving_reasoning",
)
_DRY_VOYAGE = "dry_voyage"


def shortfall(report: Document) -> tuple[str, str]:
    """Why a report cannot recommend, whatever its verdict, and what to do; two empty texts if all was examined."""
    taken = [exam.get("exam") for exam in objects(report, "exams")]
    if _DRY_VOYAGE in taken:
        return "a dry voyage has random weights", "examine the engine with the trained weights: qualify --engine URL"
    fingerprint = report.get("fingerprint")
    demanded: tuple[str, ...]
    if isinstance(fingerprint, dict) and "engine" in fingerprint:
        demanded, todo = SERVING_PROBES, "examine it again with all exams: qualify --engine URL, without --exams"
    else:
        demanded = SMOKE_EXAMS if report.get("tier") == "smoke" else LONGER_EXAMS
        todo = f"qualify it again with --role {report['role']} and all exams: without --exams"
    mine = [name for name in demanded if name in taken]
    if len(mine) == len(demanded):
        return "", ""
    return f"only the exams {', '.join(mine)} were taken" if mine else "none of the exams was taken", todo


def thoroughness(report: Document) -> tuple[bool, bool, int, str]:
    """By which of several reports of one chip and role counts: the largest one."""
    tier = report.get("tier")
    is_full = not shortfall(report)[0]
    rank = TIERS.index(tier) if tier in TIERS else -1
    return report.get("complete") is True, is_full, rank, str(report.get("began", ""))
