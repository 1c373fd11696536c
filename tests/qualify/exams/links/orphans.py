"""Starts ranks that wait for ever, says their process numbers, and waits to be killed. Not a test itself."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from crosschip.qualify.exams.links.ranks import Ranks

if __name__ == "__main__":
    with Ranks(Path(sys.argv[1]), ["cpu", "cpu"], 120.0) as ranks:
        if not ranks.wait(lambda: ranks.all_have("ready"), 60.0):
            sys.exit("not ready")
        ranks.go([{"do": "loop", "num_bytes": 1024, "announce_after": 2}], 60.0)
        if not ranks.wait(lambda: ranks.all_have("looping"), 60.0):
            sys.exit("not looping")
        print(*(process.pid for process in ranks.processes), flush=True)
        time.sleep(120.0)
