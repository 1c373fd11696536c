"""The lighthouse, where groups meet: `python -m crosschip.train.outer.lighthouse --bind 0.0.0.0:29510 --min-groups 1`.

One a run, anywhere that all groups reach. It holds nothing that is lost with it: when it dies, start it again under the
same address, and the groups go on; until then they wait at their next exchange.
"""

from __future__ import annotations

import argparse
import os
import select
import socket
import subprocess
import sys
import threading

from crosschip.errors import EXIT_BAD_USAGE
from crosschip.train.outer.errors import GroupsError
from crosschip.train.outer.time_limits import TimeLimits

__all__ = ["Lighthouse", "main"]

_START_S = 60.0
_TICK_MS = 50  # how often it looks whether a quorum is there


class Lighthouse:
    """A lighthouse in a process of its own on this machine, ended by `close` or with this process."""

    def __init__(
        self,
        bind: str = "127.0.0.1:0",
        min_groups: int = 1,
        late_group_s: float = TimeLimits.late_group_s,
    ) -> None:
        """Start it and wait until it answers. See `TimeLimits` for `late_group_s`.

        Raises:
            GroupsError: it could not start; the port may be taken.
        """
        environment = {name: value for name, value in os.environ.items() if name != "CROSSCHIP_SIM"}
        command = [sys.executable, "-m", "crosschip.train.outer.lighthouse", "--bind", bind, "--stdin"]
        self._process = subprocess.Popen(
            [*command, "--min-groups", str(min_groups), "--late-group-s", str(late_group_s)],
            stdin=subprocess.PIPE,  # it ends when this closes, that is with us
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "CUDA_VISIBLE_DEVICES": ""},
            start_new_session=True,
        )
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], _START_S)
        self.address = self._process.stdout.readline().strip() if ready else ""
        if not self.address:
            self.close()
            raise GroupsError(
                f"no lighthouse could be started on {bind}", "choose a free port, and see what it said above"
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def _outside_address(bind: str, port: int) -> str:
    host = bind.rpartition(":")[0]
    return f"http://{socket.gethostname() if host in ('', '0.0.0.0', '[::]') else host}:{port}"


def main() -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(description="the lighthouse, where replica groups meet")
    parser.add_argument("--bind", default="0.0.0.0:29510", help="HOST:PORT to listen on; port 0 takes a free one")
    parser.add_argument("--min-groups", type=int, default=1, help="a step needs so many groups")
    parser.add_argument(
        "--late-group-s",
        type=float,
        default=TimeLimits.late_group_s,
        help="how long most groups wait for one that lives and is late; with DiLoCo, longer than the slowest group "
        "takes more for its steps than the fastest",
    )
    parser.add_argument("--stdin", action="store_true", help="end when the standard input is closed")
    options = parser.parse_args()
    os.environ.setdefault("RUST_LOG", "warn")  # otherwise it tells of each quorum, several times a step
    from torchft.coordination import LighthouseServer

    limits = TimeLimits()
    try:
        server = LighthouseServer(
            bind=options.bind,
            min_replicas=options.min_groups,
            join_timeout_ms=int(options.late_group_s * 1e3),
            quorum_tick_ms=_TICK_MS,
            heartbeat_timeout_ms=int(limits.heartbeat_lost_s * 1e3),
        )
    except RuntimeError as error:  # the port is taken, or the address is none of this machine's
        print(
            f"crosschip: no lighthouse on {options.bind}: {error}\n  what to do: choose a free port and an address of "
            "this machine: --bind HOST:PORT",
            file=sys.stderr,
        )
        sys.exit(EXIT_BAD_USAGE)
    port = int(server.address().rpartition(":")[2].rstrip("/"))
    print(_outside_address(options.bind, port), flush=True)
    if options.stdin:
        sys.stdin.read()
        os._exit(0)  # the server's threads would wait for connections to close
    threading.Event().wait()


if __name__ == "__main__":
    main()
