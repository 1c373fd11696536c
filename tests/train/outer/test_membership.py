"""Groups that die between coming and being connected to: real managers, a real lighthouse, a real SIGKILL."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from crosschip.train.outer.exchange import gather_numbers
from crosschip.train.outer.lighthouse import Lighthouse
from crosschip.train.outer.membership import Membership
from crosschip.train.outer.messages import Member
from crosschip.train.outer.time_limits import TimeLimits
from tests.train.outer.conftest import ROOT, wait_until

LIMITS = TimeLimits(connecting_s=5.0)  # 30 s else, and the test has to wait for it once

# Takes part in one quorum, and comes to the next one.
OTHER = """
import sys
from crosschip.train.outer.membership import Membership
from crosschip.train.outer.messages import Member
from crosschip.train.outer.time_limits import TimeLimits
group, lighthouse = int(sys.argv[1]), sys.argv[2]
membership = Membership(Member(group, 2, 1, lighthouse, 0, 1), TimeLimits(), lambda text: None)
while membership.quorum(1, dict).group.size < 2:
    membership.finish(committed=True)
membership.finish(committed=False)
print("met", flush=True)
sys.stdin.readline()
membership.quorum(1, dict)
"""


@pytest.fixture
def lighthouse() -> Iterator[str]:
    beacon = Lighthouse(min_groups=1)
    yield beacon.address
    beacon.close()


@pytest.mark.parametrize("dying", [0, 1], ids=["whose-store-it-is", "whose-store-it-is-not"])
def test_a_group_that_came_and_died_does_not_hold_up_the_one_that_comes_next(lighthouse: str, dying: int) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER, str(dying), lighthouse],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    said: list[str] = []
    membership = Membership(Member(1 - dying, 2, 1, lighthouse, 0, 1), LIMITS, said.append)
    try:
        assert other.stdin is not None
        assert other.stdout is not None
        while membership.quorum(1, dict).group.size < 2:
            membership.finish(committed=True)
        membership.finish(committed=False)
        assert other.stdout.readline() == "met\n"
        other.stdin.write("come\n")
        other.stdin.flush()
        time.sleep(0.5)  # its question is at the lighthouse, which waits for us
        other.send_signal(signal.SIGKILL)
        other.wait()
        sizes: list[int] = []
        asking = threading.Thread(target=lambda: sizes.append(membership.quorum(1, dict).group.size), daemon=True)
        asking.start()
        wait_until(lambda: sizes, "a quorum without the dead group")
        assert sizes == [1]
        assert any(line.startswith("quorum of 2 fell apart") for line in said), said
    finally:
        other.kill()
        other.wait()


def test_connections_of_a_meeting_are_as_patient_as_an_exchange(lighthouse: str) -> None:
    """The time to connect must not become that of an exchange: another group may compute much longer than that."""
    limits = replace(LIMITS, connecting_s=3.0)
    memberships = [Membership(Member(group, 2, 1, lighthouse, 0, 1), limits, lambda text: None) for group in (0, 1)]
    gathered: dict[int, list[list[float]]] = {}

    def take_part(number: int) -> None:
        while (quorum := memberships[number].quorum(1, dict)).group.size < 2:
            memberships[number].finish(committed=True)
        time.sleep(6.0 * number)
        gathered[number] = gather_numbers(quorum.group, [float(number)])[0]

    threads = [threading.Thread(target=take_part, args=(number,), daemon=True) for number in (0, 1)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(gathered) == 2, "both groups to exchange")
    assert gathered[0] == gathered[1] == [[0.0], [1.0]]
