"""A lighthouse that cannot listen where it is told says so, with what to do."""

from __future__ import annotations

import socket
import subprocess
import sys

from crosschip.errors import EXIT_BAD_USAGE


def test_a_port_that_is_taken_is_told_without_a_traceback() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        command = [sys.executable, "-m", "crosschip.train.outer.lighthouse", "--bind", address]
        found = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert found.returncode == EXIT_BAD_USAGE
    assert f"no lighthouse on {address}: Address already in use" in found.stderr
    assert "--bind HOST:PORT" in found.stderr
    assert "Traceback" not in found.stderr
