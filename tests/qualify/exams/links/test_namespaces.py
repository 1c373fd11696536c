"""The measurement between two machines: what is configured is what the fit finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.qualify.exams.links.namespaces import ADDRESS_A, FIRST, MASTER_PORT, shaped_link, why_not
from tests.qualify.exams.links.relay import SENT_AGAIN_S

ROOT = Path(__file__).parents[4]
# Of a frame that tbf counts, 1514 bytes with its Ethernet header, TCP carries 1448 bytes.
PAYLOAD_SHARE = 1448 / 1514


def measured(rate_mbit: int, delay_ms: float, path: Path, loss_every: int = 0, seconds: float = 4.0) -> dict[str, Any]:
    """The document that rank 0 writes."""
    with shaped_link(rate_mbit, delay_ms, loss_every) as nodes:
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen(
                [*FIRST, "ip", "netns", "exec", node, sys.executable, "-m", "crosschip.qualify.exams.links.measure",
                 "--rank", str(rank), "--world-size", "2", "--master", f"{ADDRESS_A}:{MASTER_PORT}", "--device", "cpu",
                 "--sizes", "1024,65536,524288", "--seconds", str(seconds), "--json", str(path)],
                cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for rank, node in enumerate(nodes)
        ]  # fmt: skip
        try:
            for rank, process in enumerate(ranks):
                output, _ = process.communicate(timeout=120)
                assert process.returncode == 0, f"rank {rank}: {output}"
        finally:
            for process in ranks:
                process.kill()
                process.wait()
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.mark.parametrize(("rate_mbit", "delay_ms"), [(100, 25.0), pytest.param(40, 40.0, marks=pytest.mark.slow)])
def test_latency_and_bandwidth_are_recovered(rate_mbit: int, delay_ms: float, tmp_path: Path) -> None:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    document = measured(rate_mbit, delay_ms, tmp_path / "links.json")
    fit = document["pairs"][0]["fit"]
    assert fit["latency_s"] == pytest.approx(delay_ms / 1e3, rel=0.1)
    assert fit["bandwidth_gb_s"] == pytest.approx(rate_mbit / 8e3 * PAYLOAD_SHARE, rel=0.1)
    assert {each["between"] for each in document["collectives"]} >= {"all_reduce", "all_to_all"}


@pytest.mark.slow
def test_loss_shows_in_the_slowest_messages_and_leaves_the_fit(tmp_path: Path) -> None:
    """Once in 5 MB: far fewer than half of the half-megabyte messages, there and back, wait for what is sent again."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    document = measured(100, 25.0, tmp_path / "links.json", loss_every=5 << 20, seconds=16.0)
    (pair,) = document["pairs"]
    largest = "524288"
    assert pair["fit"]["bandwidth_gb_s"] == pytest.approx(100 / 8e3 * PAYLOAD_SHARE, rel=0.1)
    assert pair["fit"]["latency_s"] == pytest.approx(25e-3, rel=0.1)
    one_way_s = 25e-3 + int(largest) * 8 / 100e6
    assert pair["slowest_s"][largest] > one_way_s + 0.9 * SENT_AGAIN_S / 2  # on one way of there and back
