from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from crosschip.errors import QualifyError
from crosschip.qualify.exams.links.measure import Node, links_document, node_from

ROOT = Path(__file__).parents[4]


def options(**given: object) -> argparse.Namespace:
    return argparse.Namespace(**{"rank": None, "world_size": None, "master": None, "device": "cuda", **given})


def test_the_command_line_and_torchrun_say_the_same() -> None:
    torchrun = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "LOCAL_RANK": "1"}
    assert node_from(options(), torchrun) == Node(1, 4, "10.0.0.1", 29500, "cuda:1")
    assert node_from(options(rank=1, world_size=4, master="10.0.0.1:29500"), {}) == Node(
        1, 4, "10.0.0.1", 29500, "cuda"
    )
    assert node_from(options(rank=0, device="cpu"), torchrun).device == "cpu"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "RANK is None"),
        ({"rank": 0, "world_size": 2}, "address of rank 0"),
        ({"rank": 2, "world_size": 2, "master": "a:1"}, "rank 2 of 2"),
        ({"rank": 0, "world_size": 2, "master": "a"}, "'a'"),
    ],
)
def test_what_is_missing_is_named(given: dict[str, object], words: str) -> None:
    with pytest.raises(QualifyError, match=words):
        node_from(options(**given), {})


def test_slow_pairs_are_in_the_document() -> None:
    notes = [
        {"pair": list(pair), "num_bytes": size, "times_s": [slowness * (1e-4 + size / 1e9)] * 5}
        for pair, slowness in (((0, 1), 1.0), ((0, 2), 1.0), ((1, 2), 4.0))
        for size in (1024, 1 << 20)
    ]
    document = links_document(notes, ["a", "b", "c"], "gloo")
    assert [each["pair"] for each in document["outliers"]] == [[1, 2]]
    assert document["pairs"][0]["fit"]["bandwidth_gb_s"] == pytest.approx(1.0)


def test_two_processes_under_torchruns_variables(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    path = tmp_path / "links.json"
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "crosschip.qualify.exams.links.measure", "--device", "cpu", "--seconds", "1",
               "--json", str(path)]  # fmt: skip
    nodes = [
        subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **common, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [node.communicate(timeout=120)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
            node.wait()
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert "ranks 0 and 1" in outputs[0]
    document = json.loads(path.read_text())
    assert (document["schema_version"], document["kind"], document["backend"]) == (1, "links", "gloo")
    assert len(document["hosts"]) == 2
