"""The links between machines: every node runs `python -m crosschip.qualify.exams.links.measure`.

    node 0: ... --rank 0 --world-size 2 --master 10.0.0.1:29500 --device cpu --json links.json
    node 1: ... --rank 1 --world-size 2 --master 10.0.0.1:29500 --device cpu

Under torchrun its environment variables say the same. Messages go to and fro between each pair of ranks, then each
collective is timed; rank 0 writes latency and bandwidth of each and names slow pairs. Gloo talks over the interface
that GLOO_SOCKET_IFNAME names.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from crosschip.errors import EXIT_BAD_USAGE, CrosschipError, QualifyError
from crosschip.qualify.exams.links.link_findings import (
    collective_times,
    fits_document,
    largest_times,
    pair_times,
    pooled_visits,
)
from crosschip.qualify.exams.links.notes import Notes, NotesReader
from crosschip.qualify.exams.links.outliers import find_outliers
from crosschip.rundir import write_json

__all__ = ["Node", "links_document", "main", "node_from"]

SCHEMA_VERSION = 1
_SIZES = (1024, 65536, 1 << 20, 8 << 20)
_MEETING_S = 600.0  # nodes of a cluster start minutes apart


@dataclass(frozen=True)
class Node:
    """This process's place: its rank among how many, where rank 0 listens, which chip it has."""

    rank: int
    num_ranks: int
    host: str
    port: int
    device: str


def node_from(options: argparse.Namespace, environment: Mapping[str, str]) -> Node:
    """The place that the command line or, where it is silent, torchrun's environment gives.

    Raises:
        QualifyError: neither says it, or what they say makes no sense.
    """
    rank = _whole(options.rank, environment.get("RANK"), "--rank", "RANK")
    num_ranks = _whole(options.world_size, environment.get("WORLD_SIZE"), "--world-size", "WORLD_SIZE")
    inherited = f"{environment.get('MASTER_ADDR', '')}:{environment.get('MASTER_PORT', '')}"
    host, _, port = (options.master or inherited).rpartition(":")
    if not host or not port.isdigit():
        raise QualifyError(
            f"the address of rank 0 is {options.master or inherited!r}",
            "give --master ADDRESS:PORT, or start with torchrun, which sets MASTER_ADDR and MASTER_PORT",
        )
    if num_ranks < 2 or not 0 <= rank < num_ranks:
        raise QualifyError(
            f"rank {rank} of {num_ranks} ranks", "give --world-size of 2 or more and a --rank from 0 to one less"
        )
    local = environment.get("LOCAL_RANK")
    device = options.device
    if local is not None and ":" not in device and device not in ("cpu", "sim", "auto"):
        device = f"{device}:{local}"
    return Node(rank, num_ranks, host, int(port), device)


def _whole(given: int | None, inherited: str | None, option: str, variable: str) -> int:
    if given is not None:
        return given
    if inherited is None or not inherited.isdigit():
        raise QualifyError(f"{variable} is {inherited!r} and {option} is not given", f"give {option}")
    return int(inherited)


def links_document(notes: Sequence[Mapping[str, Any]], hosts: Sequence[str], backend: str) -> dict[str, Any]:
    """The measurement for JSON, from the notes of all ranks."""
    pairs = pair_times(notes)
    outliers = find_outliers(largest_times(pairs))
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "links",
        "backend": backend,
        "hosts": list(hosts),
        "pairs": fits_document(
            {f"ranks {one} and {other}": pooled_visits(each) for (one, other), each in pairs.items()}
        ),
        "collectives": fits_document(collective_times(notes)),
        "outliers": [
            {"pair": list(each.pair), "ratio": each.ratio, "time_s": each.time_s, "is_alone": each.is_alone}
            for each in outliers
        ],
    }


def _measure(node: Node, sizes: Sequence[int], seconds: float, timeout_s: float) -> dict[str, Any] | None:
    """Take part; the document on rank 0, None on the others."""
    from torch._C._distributed_c10d import PrefixStore, TCPStore

    from crosschip.chips import find_chip
    from crosschip.qualify.exams.links.group import backend_for, join, leave
    from crosschip.qualify.exams.links.timing import time_collectives, time_pairs

    chip = find_chip(node.device)
    limit = timedelta(seconds=max(_MEETING_S, timeout_s))
    store = TCPStore(node.host, node.port, node.num_ranks, is_master=node.rank == 0, timeout=limit)
    group = join(chip, node.rank, node.num_ranks, store, timeout_s)
    with tempfile.TemporaryDirectory(prefix="crosschip-measure-") as directory:
        path = Path(directory) / "notes.jsonl"
        notes = Notes(path)
        visit = {"sizes": list(sizes), "limit_s": seconds / 4}
        time_pairs(visit, group, notes)
        time_collectives({"sizes": list(sizes), "limit_s": seconds / 2}, group, notes)
        time_pairs(visit, group, notes)
        mine = {"host": socket.gethostname(), "notes": NotesReader(path).read()}
    shared = PrefixStore("notes", store)
    shared.set(str(node.rank), json.dumps(mine))
    document = None
    if node.rank == 0:
        all_of_them = [json.loads(shared.get(str(rank))) for rank in range(node.num_ranks)]
        found = [note for each in all_of_them for note in each["notes"]]
        document = links_document(found, [each["host"] for each in all_of_them], backend_for(chip.device))
        shared.set("taken", "1")
        for rank in range(1, node.num_ranks):  # the store is rank 0's and must outlive the others' last question
            shared.get(f"bye-{rank}")
    else:
        shared.get("taken")
        shared.set(f"bye-{node.rank}", "1")
    leave()
    return document


def _lines(document: Mapping[str, Any]) -> list[str]:
    lines = []
    for each in [*document["pairs"], *document["collectives"]]:
        fit = each["fit"]
        if fit is None:
            lines.append(f"{each['between']:>24}  no fit: more bytes took no longer")
            continue
        lines.append(
            f"{each['between']:>24}  latency {fit['latency_s'] * 1e6:9.1f} us ({fit['latency_low_s'] * 1e6:.1f} to "
            f"{fit['latency_high_s'] * 1e6:.1f})  bandwidth {fit['bandwidth_gb_s']:8.4g} GB/s "
            f"({fit['bandwidth_low_gb_s']:.4g} to {fit['bandwidth_high_gb_s']:.4g})"
        )
    slow = (f"slow: ranks {each['pair']}, {each['ratio']:.3g} times the median pair" for each in document["outliers"])
    return [*lines, *slow]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--world-size", type=int)
    parser.add_argument("--master", help="ADDRESS:PORT of rank 0")
    parser.add_argument("--device", default="auto", help="cpu, or a torch device such as cuda or npu:1")
    parser.add_argument("--json", type=Path, help="the file that rank 0 writes")
    parser.add_argument("--sizes", default=",".join(map(str, _SIZES)), help="message sizes in bytes")
    parser.add_argument("--seconds", type=float, default=20.0, help="for all measurements together")
    parser.add_argument("--timeout-s", type=float, default=120.0, help="of each collective")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; the exit code is 0, or 2 when the command line makes no sense."""
    options = _options(arguments)
    try:
        node = node_from(options, os.environ)
        sizes = sorted({int(each) for each in options.sizes.split(",")})
        document = _measure(node, sizes, options.seconds, options.timeout_s)
    except (CrosschipError, ValueError) as error:
        print(error, file=sys.stderr)
        return EXIT_BAD_USAGE
    if document is not None:
        print("\n".join(_lines(document)))
        if options.json is not None:
            write_json(options.json, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
