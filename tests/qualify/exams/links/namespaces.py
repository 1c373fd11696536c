"""Two network namespaces with a link of known bandwidth and delay between them. Not a test itself."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PORTS = range(30000, 30032)
MASTER_PORT = 29500
ADDRESS_A, ADDRESS_B = "10.77.0.1", "10.77.0.2"
FIRST = ("chrt", "--rr", "1")  # what a link takes is measured, not how long other work on this machine keeps the cores


def run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")


def why_not() -> str | None:
    """Why this machine cannot have namespaces with a shaped link; None when it can."""
    if any(shutil.which(program) is None for program in ("ip", "tc", "chrt")):
        return "there is no `ip`, no `tc` or no `chrt` here"
    name = f"cc-try-{os.getpid()}"
    try:
        run(*FIRST, "true")
        run("ip", "netns", "add", name)
    except OSError as error:
        return f"no network namespaces or no priority over other work here: {error}"
    try:
        inside = ("ip", "netns", "exec", name)
        run(*inside, "ip", "link", "add", "t0", "type", "veth", "peer", "name", "t1")
        run(
            *inside, "tc", "qdisc", "add", "dev", "t0", "root", "tbf", "rate", "100mbit", "burst", "8kb", "limit", "4mb"
        )
    except OSError as error:
        return f"no veth or no tbf here: {error}"
    finally:
        run("ip", "netns", "del", name)
    return None


@contextlib.contextmanager
def shaped_link(rate_mbit: int, delay_ms: float, loss_every: int = 0) -> Iterator[tuple[str, str]]:
    """Two namespaces; each sends at `rate_mbit`, and what it sends arrives `delay_ms` later.

    Once in `loss_every` bytes something is lost and sent again.

    Each is joined by veth to a namespace of its own in which the relay has the other's address.
    """
    stem = f"cc{os.getpid()}"
    names = [f"{stem}{each}" for each in ("a", "b", "x", "y")]
    node_a, node_b, at_a, at_b = names
    relay: subprocess.Popen[str] | None = None
    try:
        for name in names:
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        _join(node_a, at_a, ADDRESS_A, ADDRESS_B, rate_mbit)
        _join(node_b, at_b, ADDRESS_B, ADDRESS_A, rate_mbit)
        script = str(Path(__file__).with_name("relay.py"))
        ports = [str(port) for port in (MASTER_PORT, *PORTS)]
        relay = subprocess.Popen(
            [*FIRST, sys.executable, script, at_a, at_b, ADDRESS_A, ADDRESS_B, str(delay_ms), str(loss_every), *ports],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert relay.stdout is not None
        assert relay.stdout.readline().strip() == "ready"
        yield node_a, node_b
    finally:
        if relay is not None:
            relay.kill()
            relay.wait()
        for name in names:
            with contextlib.suppress(OSError):
                run("ip", "netns", "del", name)


def _join(node: str, relay: str, own: str, other: str, rate_mbit: int) -> None:
    run("ip", "-n", node, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", relay)
    for name, address in ((node, own), (relay, other)):
        run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
        run("ip", "-n", name, "link", "set", "eth0", "up")
    inside = ("ip", "netns", "exec", node)
    run(*inside, "tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", f"{rate_mbit}mbit", "burst", "10kb",
        "limit", "8mb")  # fmt: skip
    run(*inside, "sysctl", "-qw", f"net.ipv4.ip_local_port_range={PORTS.start} {PORTS.stop - 1}")
    run(*inside, "sysctl", "-qw", "net.ipv4.tcp_congestion_control=reno")
