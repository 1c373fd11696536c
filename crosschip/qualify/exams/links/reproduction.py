"""A collective's failure as a check that starts its own ranks, for a reproducer."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.exams.links.conformance_findings import Defect
from crosschip.qualify.exams.links.one_collective import compare, contribution, digest, expected, run_collective
from crosschip.qualify.exams.links.own_ranks import join_ranks, need_devices
from crosschip.qualify.reproducing.reproducers import Check, write_reproducer

__all__ = ["collective_is_wrong", "write_collective_reproducer"]

SAME_ON_ALL = ("all_reduce", "all_gather", "broadcast")
TIMEOUT_S = 60.0


def collective_is_wrong(
    device: str, case: dict[str, Any], rows: list[int], num_ranks: int, seed: int
) -> tuple[bool, str, str]:
    """Make a collective between ranks of its own, on one device each (several ranks on the CPU).

    Wrong: an element is beyond its bound, ranks that have to agree do not, or the first row's bits depend on how many
    `rows` there are.
    """
    need_devices(device, num_ranks)
    with tempfile.TemporaryDirectory() as directory:
        arguments = (device, case, rows, num_ranks, seed, directory)
        spawn(one_rank, arguments, num_ranks)
        noted = [json.loads(Path(directory, f"{rank}.json").read_text()) for rank in range(num_ranks)]
    if "refused" in noted[0]:
        return False, "a collective that the CPU's back end has not got is not compared", noted[0]["refused"]
    for rank, notes in enumerate(noted):
        for each in notes["results"]:
            if each["wrong"]:
                got = f"{each['got']}; {each['wrong']} of {each['total']} elements are wrong"
                return True, f"rank {rank}, element {each['first']}: {each['expected']}", got
        if len({each["row"] for each in notes["results"]}) > 1 and len(rows) > 1:
            return True, f"the same bits in the first row with {rows} rows", "other bits"
    if case["collective"] in SAME_ON_ALL and len({notes["results"][0]["bits"] for notes in noted}) > 1:
        return True, "the same bits on every rank", "other bits"
    return False, "what the exact result allows", "what the exact result allows"


def one_rank(
    rank: int, device: str, case: dict[str, Any], rows: list[int], num_ranks: int, seed: int, directory: str
) -> None:
    """One rank of it, in a process of its own; its outcome is written to the directory."""
    own = join_ranks(rank, device, num_ranks, TIMEOUT_S, directory)
    found: dict[str, Any] = {"results": []}
    try:
        for number in rows:
            sized = {**case, "rows": number}
            mine = contribution(sized, rank, num_ranks, seed).to(own)
            got = run_collective(sized, mine, rank, num_ranks).cpu()
            result = compare(got, *expected(sized, rank, num_ranks, seed))
            found["results"].append({**result, "bits": digest(got), "row": digest(got[:1])})
    except RuntimeError as error:
        if own.type != "cpu" or "cannot use" not in str(error).lower():
            raise
        found = {"refused": str(error).strip().partition("\n")[0]}  # gloo has no factor
    Path(directory, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def write_collective_reproducer(context: ExamContext, defect: Defect, num_ranks: int) -> str | None:
    """Write the file, when the failure shows again in ranks of its own and not on the CPU; its name."""
    case = defect.case.document()
    ranks = 2 if defect.case.pair else num_ranks
    rows = list(defect.rows) or [defect.case.rows]
    parameters = {"case": {**case, "pair": False}, "rows": rows, "num_ranks": ranks, "seed": context.seed}
    with _simulated_in_children(context):
        return write_reproducer(
            context,
            f"{defect.check} {defect.call}",
            defect.message.partition(";")[0],
            Check(collective_is_wrong, parameters),
        )


@contextmanager
def _simulated_in_children(context: ExamContext) -> Iterator[None]:
    """Let processes that are started inside find the simulated chip with the faults of this one."""
    before = os.environ.get("CROSSCHIP_SIM")
    if context.chip.device.type == "sim":
        os.environ["CROSSCHIP_SIM"] = context.chip_spec
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("CROSSCHIP_SIM", None)
        else:
            os.environ["CROSSCHIP_SIM"] = before
