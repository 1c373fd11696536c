"""What the measured times of messages mean: fits, slow pairs, flaps. Documents only: no torch."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from crosschip.qualify.exams.links.alpha_beta import AlphaBeta, fit_alpha_beta
from crosschip.qualify.exams.links.flaps import FLAP_FRACTION, Flap, Second, Sustained
from crosschip.qualify.exams.links.outliers import Outlier, Pair
from crosschip.qualify.finding import Finding

__all__ = [
    "Times",
    "bandwidth_entry",
    "collective_times",
    "fits_document",
    "flap_finding",
    "largest_times",
    "outlier_finding",
    "pair_times",
    "pooled_visits",
    "sustained_entry",
    "sustained_seconds",
]

Times = dict[int, list[float]]  # by size in bytes, the times of the repeats in seconds


def pair_times(notes: Iterable[Mapping[str, Any]]) -> dict[Pair, list[Times]]:
    """For each pair, the times of each of its visits."""
    found: dict[Pair, list[Times]] = {}
    for note in notes:
        if "pair" in note and "num_bytes" in note:
            visits = found.setdefault((note["pair"][0], note["pair"][1]), [{}])
            if note["num_bytes"] in visits[-1]:
                visits.append({})
            visits[-1][note["num_bytes"]] = note["times_s"]
    return found


def pooled_visits(visits: Sequence[Times]) -> Times:
    """The repeats of all visits together."""
    pooled: Times = {}
    for visit in visits:
        for size, times in visit.items():
            pooled.setdefault(size, []).extend(times)
    return pooled


def collective_times(notes: Iterable[Mapping[str, Any]]) -> dict[str, Times]:
    """For each collective and size, its time in each repeat: that of the rank which took longest."""
    ranks: dict[tuple[str, int], list[list[float]]] = {}
    for note in notes:
        if "collective" in note and "times_s" in note:
            ranks.setdefault((note["collective"], note["num_bytes"]), []).append(note["times_s"])
    found: dict[str, Times] = {}
    for (collective, size), times in ranks.items():
        found.setdefault(collective, {})[size] = [max(each) for each in zip(*times, strict=False)]
    return found


def largest_times(pairs: Mapping[Pair, Sequence[Times]]) -> dict[Pair, float]:
    """Each pair's fastest largest message of all visits: a passing burden slows some of them, a bad cable all."""
    found = {}
    for pair, visits in pairs.items():
        fastest = [min(visit[max(visit)]) for visit in visits if visit]
        if fastest:
            found[pair] = min(fastest)
    return found


def fits_document(times: Mapping[str, Times]) -> list[dict[str, Any]]:
    """For each name the fit and, of each size, the median time, the slowest and the number of repeats.

    A link that loses packets shows in the slowest time: what is sent again comes some 200 ms late.
    """
    made = []
    for name, sizes in times.items():
        fitted: AlphaBeta | None = fit_alpha_beta(sizes)
        medians = {str(size): statistics.median(each) for size, each in sorted(sizes.items()) if each}
        repeats = {str(size): len(each) for size, each in sorted(sizes.items())}
        made.append(
            {
                "between": name,
                "fit": fitted.document() if fitted else None,
                "median_s": medians,
                "slowest_s": {str(size): max(each) for size, each in sorted(sizes.items()) if each},
                "num_repeats": repeats,
            }
        )
    return made


def bandwidth_entry(document: Mapping[str, Any], num_ranks: int | None = None) -> dict[str, Any]:
    """A measured entry out of a document of `fits_document`, for the page's drawing of bandwidth by size.

    Without `num_ranks` it is that of a pair.
    """
    return {
        "plot": "bandwidth",
        "check": "collectives" if num_ranks else "pairs",
        "collective": document["between"],
        **({"num_ranks": num_ranks} if num_ranks else {}),
        "sizes_bytes": [int(size) for size in document["median_s"]],
        "seconds": list(document["median_s"].values()),
        "slowest_s": list(document["slowest_s"].values()),
        "num_repeats": list(document["num_repeats"].values()),
        **(document["fit"] or {}),
    }


def outlier_finding(exam: str, outlier: Outlier, num_bytes: int, num_pairs: int, limit_ratio: float) -> Finding:
    """A slow pair of ranks as a finding: alone a bad cable, in company a kind of link."""
    first, second = outlier.pair
    shared = "" if outlier.shared_rank is None else f"; all slow pairs share rank {outlier.shared_rank}"
    kind = "" if outlier.is_alone else "; many pairs are as slow, so this is a kind of link rather than a bad cable"
    bandwidth, typical = (num_bytes / each / 1e9 for each in (outlier.time_s, outlier.typical_s))
    return Finding(
        exam=exam,
        kind="links",
        verdict="FAIL" if outlier.is_alone else "PASS WITH LIMITS",
        subject=f"ranks {first} and {second}",
        check="pairs",
        message=f"the fastest of the messages of {num_bytes} bytes between the ranks {first} and {second} takes "
        f"{outlier.time_s * 1e3:.3g} ms ({bandwidth:.3g} GB/s), {outlier.ratio:.3g} times as long as between the "
        f"median pair of {num_pairs} ({typical:.3g} GB/s){shared}{kind}",
        measured=outlier.ratio,
        limit=limit_ratio,
        limit_source="the median of all pairs, the fastest message of each; a link at half its width takes twice as "
        "long",
        critical=outlier.is_alone,
        severity=outlier.ratio,
        details={"pair": [first, second], "num_bytes": num_bytes},
    )


def sustained_seconds(notes: Iterable[Mapping[str, Any]]) -> list[Second]:
    """The seconds of rank 0, each with the largest wait for a core that any rank had meanwhile."""
    found = [note for note in notes if "second_at_s" in note]
    seconds = []
    for note in found:
        if note["rank"] == 0:
            at_s = note["second_at_s"]
            waits = [
                each["host_wait"]
                for each in found
                if at_s - each["passed_s"] < each["second_at_s"] < at_s + note["passed_s"]
            ]
            seconds.append(Second(at_s, note["num_bytes"] / note["passed_s"] / 1e9, max(waits), note["passed_s"]))
    return seconds


def sustained_entry(seconds: Sequence[Second], sustained: Sustained, num_bytes: int, num_ranks: int) -> dict[str, Any]:
    """A measured entry of the sustained run, for the page's drawing of a series over time."""
    return {
        "plot": "series",
        "check": "sustained",
        "title": f"sustained all_reduce of {num_bytes} bytes over {num_ranks} ranks",
        "unit": "GB/s",
        "x_unit": "s",
        "x": [round(each.at_s, 2) for each in seconds],
        "y": [each.bandwidth_gb_s for each in seconds],
        "limit": sustained.flap_below_gb_s,
        "median_gb_s": sustained.median_gb_s,
        "lowest_gb_s": sustained.lowest_gb_s,
        "host_wait": [round(each.host_wait, 3) for each in seconds],
    }


def flap_finding(exam: str, sustained: Sustained, flap: Flap, num_ranks: int, num_bytes: int) -> Finding:
    """A fall of bandwidth as a finding; inconclusive when the ranks waited for the host."""
    host = "; the ranks waited for a core of the busy host meanwhile" if flap.is_hosts else ""
    return Finding(
        exam=exam,
        kind="links",
        verdict="INCONCLUSIVE" if flap.is_hosts else "FAIL",
        subject=f"all_reduce of {num_bytes} bytes over {num_ranks} ranks",
        check="sustained",
        message=f"bandwidth fell to {flap.bandwidth_gb_s:.3g} GB/s for {flap.for_s} s at second {flap.at_s:.0f} of a "
        f"sustained all_reduce of {num_bytes} bytes over {num_ranks} ranks; the median is {sustained.median_gb_s:.3g} "
        f"GB/s{host}",
        measured=flap.bandwidth_gb_s * FLAP_FRACTION / sustained.flap_below_gb_s,
        limit=FLAP_FRACTION,
        limit_source="the median of the better half of the run's seconds; a link that trains anew is down for seconds",
        critical=not flap.is_hosts,
        severity=sustained.median_gb_s / max(flap.bandwidth_gb_s, 1e-9),
    )
