"""A thousand requests, 64 at a time, some cancelled, some malformed: all good ones right, and memory stays flat."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.serve.conftest import RunningServer
from tests.serve.gateway.conftest import running_gateway
from tests.serve.gateway.test_gateway_engines import before, mixed_load


def resident_bytes(pid: int) -> int:
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return int(fields["VmRSS"].split()[0]) * 1024


@pytest.mark.slow
def test_a_thousand_requests_with_64_in_flight(
    random_server: RunningServer, second_random_server: RunningServer
) -> None:
    servers = (random_server, second_random_server)
    with running_gateway(before(*servers)) as gateway:
        mixed_load(gateway, random.Random(1), num_requests=300, num_in_flight=64)  # arenas and caches grow once
        first = [resident_bytes(server.process.pid) for server in servers]
        counts = mixed_load(gateway, random.Random(2), num_requests=1000, num_in_flight=64)
        grown = [resident_bytes(server.process.pid) - bytes_ for server, bytes_ in zip(servers, first, strict=True)]
        assert counts["good"] == 800
        # A leak of a request's tokens, text and events alone (some 20 kB) would be 10 MB for each engine's 500.
        assert max(grown) < 8 * 2**20, grown
        assert all(server.process.poll() is None for server in servers)
        assert all(engine.problem is None for engine in gateway.gateway.fleet.engines)
