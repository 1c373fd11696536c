"""The process in which checkers run that may hang or die: `python -m crosschip.rewards.worker SOCKET_FD`.

One JSON object a line, both ways. First the names to load, answered by `ready` or by why they are refused; then one
attempt and the name of one checker at a time, answered by `reward` or by `raised`. Each answer repeats the `id` of what
it answers.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from crosschip.errors import CrosschipError
from crosschip.rewards.attempt import Attempt, Checker, as_reward, what_was_raised
from crosschip.rewards.checkers import CHECKERS, find_checker
from crosschip.rewards.code_tests import check_code
from crosschip.rewards.mathematics import load_math_verify
from crosschip.rewards.sandbox import Limits, find_isolation

__all__ = ["main"]

_CODE_SHARE = 0.6  # of the time limit is the candidate's: one that hangs has failed its tests and is no error
_MATH_MEMORY_BYTES = 4 << 30
_LATE_S = 10


def main() -> None:
    """Load the checkers, then judge until the other side is closed."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.set_inheritable(False)
    own_pid = os.getpid()
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # rather this process than the training
    with channel.makefile("rwb") as stream:
        task = json.loads(stream.readline())
        try:
            checkers = {name: _loaded(name, task["timeout_s"]) for name in task["names"]}
        except CrosschipError as error:
            _say(stream, {"id": task["id"], "refused": {"problem": error.problem, "remedy": error.remedy}})
            return
        _limit_memory(task["names"])
        gaps = find_isolation().gaps if "code" in checkers else ()
        _say(stream, {"id": task["id"], "ready": True, "gaps": gaps})
        for line in stream:
            task = json.loads(line)
            found = _judge(checkers[task["name"]], Attempt(**task["attempt"]), task["timeout_s"])
            if os.getpid() != own_pid:
                os._exit(0)  # a child that the checker forked came back from it, too: it shares our socket
            _say(stream, {"id": task["id"], **found})


def _loaded(name: str, timeout_s: float) -> Checker:
    """A checker with all that takes time before its first attempt already done."""
    if name == "math":
        load_math_verify()
    if name == "code":
        share_s = _CODE_SHARE * timeout_s
        return partial(check_code, limits=Limits(wall_s=share_s, cpu_s=math.ceil(share_s)))
    return find_checker(name)


def _limit_memory(names: Sequence[str]) -> None:
    """Sympy would compute 9^9^9 digit by digit; a function from outside may need memory that we cannot guess."""
    if all(name in CHECKERS for name in names):
        resource.setrlimit(resource.RLIMIT_AS, (_MATH_MEMORY_BYTES, _MATH_MEMORY_BYTES))


def _judge(checker: Checker, attempt: Attempt, timeout_s: float) -> dict[str, Any]:
    # A backstop that also ends a loop in C, for when the process that would kill us is gone.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(math.ceil(timeout_s) + _LATE_S)
    try:
        return {"reward": as_reward(checker(attempt))}
    except (Exception, SystemExit) as error:
        return {"raised": what_was_raised(error)}
    finally:
        signal.alarm(0)


def _say(stream: Any, message: dict[str, Any]) -> None:
    stream.write(json.dumps(message).encode() + b"\n")
    stream.flush()


if __name__ == "__main__":
    main()
    os._exit(0)  # threads that a checker has left do not keep it
