"""What ranks beside each other say, as findings."""

from __future__ import annotations

import statistics

from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.exams.stability.rank_work import WAITING
from crosschip.qualify.exams.stability.ranks import RankResult
from crosschip.qualify.exams.stability.series import finite
from crosschip.qualify.exams.stability.stragglers import STRAGGLER_LIMIT, find_straggler
from crosschip.qualify.finding import Finding

__all__ = ["report_ranks"]

_CHECK = "ranks beside each other"


def report_ranks(context: ExamContext, ranks: list[RankResult]) -> None:
    """A rank that died, one that has other bits than its fellows or than before, one that is slower."""
    one_device = len({each.chip for each in ranks}) == 1
    where = f"{len(ranks)} processes on {ranks[0].chip}" if one_device else f"{len(ranks)} chips"
    for number, each in enumerate(ranks):
        if each.ended in ("crash", "hang") and each.now is not None and each.now != WAITING:
            _report_lost(context, each, number, where)
        elif each.ended != "complete":
            context.journal.not_covered(f"{_CHECK}: rank {number} on {each.chip} ended by {each.ended}: {each.detail}")
    whole = [each for each in ranks if each.rounds_s]
    if one_device:
        context.journal.not_covered(f"stragglers between chips: there is one {context.chip.name}; {where} took turns")
    if len(whole) < len(ranks):
        return
    context.journal.checked("straggler", min(len(each.rounds_s) for each in whole))
    straggler = find_straggler([each.rounds_s for each in whole])
    context.journal.measured(
        check="stragglers",
        chips=[each.chip for each in ranks],
        median_round_s=[finite(statistics.median(each.rounds_s)) for each in whole],
        slowest_rank=straggler.rank if straggler else None,
        slowness=finite(straggler.slowness.median) if straggler else None,
        slowness_lower=finite(straggler.slowness.lower) if straggler else None,
        slowness_upper=finite(straggler.slowness.upper) if straggler else None,
    )
    _compare_bits(context, whole, where)
    if straggler is None:
        context.journal.not_covered("stragglers: too few rounds")
    elif straggler.is_beyond_limit:
        bounds = straggler.slowness
        context.journal.finding(
            Finding(
                exam=context.exam,
                kind="stability",
                verdict="PASS WITH LIMITS",
                subject=f"rank {straggler.rank} on {ranks[straggler.rank].chip}",
                check="straggler",
                message=f"takes {bounds.median:.3g} times as long as the others for the same work at the same time (at "
                f"least {bounds.lower:.3g} times, 95 %), among {where}; all ranks of a run wait for it",
                measured=finite(bounds.lower),
                limit=STRAGGLER_LIMIT,
                limit_source="a tenth of the time of all ranks",
                severity=bounds.lower / STRAGGLER_LIMIT,
            )
        )


def _report_lost(context: ExamContext, rank: RankResult, number: int, where: str) -> None:
    assert rank.now is not None
    words = "hangs" if rank.ended == "hang" else "takes the process down"
    context.journal.finding(
        Finding(
            exam=context.exam,
            kind="stability",
            verdict="FAIL",
            subject=rank.now.removeprefix("soak: "),
            check=rank.ended,
            message=f"{words} on rank {number} ({rank.chip}), among {where}: {rank.detail}",
            measured=rank.ended,
            limit="ends by itself",
            limit_source="each call takes seconds at most, whatever runs beside it",
            critical=True,
            severity=100.0,
        )
    )


def _compare_bits(context: ExamContext, ranks: list[RankResult], where: str) -> None:
    first = ranks[0]
    # A rank may have had time for fewer calls.
    shared = [name for name in first.hashes if all(name in each.hashes for each in ranks)]
    context.journal.checked("bits of ranks", len(shared))
    differing = [name for name in shared if len({found for each in ranks for found in _hashes(each, name)}) > 1]
    if not differing:
        return
    name = differing[0]
    odd = [number for number, each in enumerate(ranks) if each.hashes[name] != first.hashes[name]]
    who = f"ranks {', '.join(map(str, odd))} differ from rank 0" if odd else "a rank differs from itself, later"
    context.journal.finding(
        Finding(
            exam=context.exam,
            kind="stability",
            verdict="FAIL",
            subject=name,
            check="bits of ranks",
            message=f"{len(differing)} of {len(shared)} calls have other bits among {where}, first {name}: {who}",
            measured=len(differing) / len(shared),
            limit=0.0,
            limit_source="chips of one model give the same bits for the same call",
            critical=True,
            severity=10.0,
            details={"different": differing[:20]},
        )
    )


def _hashes(rank: RankResult, name: str) -> list[str]:
    return [rank.hashes[name], rank.again.get(name, rank.hashes[name])]
