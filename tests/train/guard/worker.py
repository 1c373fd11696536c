"""A training without torch, which starts in a moment: it beats, saves, resumes, and does what `--fault` says.

`--fault NAME@STEP` happens on `--rank` at that step of the first attempt only; `NAME@STEP:always` in each one, and
`NAME@+N:always` N steps after the one that was resumed.
"""

import argparse
import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

from crosschip.train.guard.heartbeat import Heartbeat, open_heartbeat

STEP_S = 0.02
SAVE_EVERY = 5


def hold_the_lock() -> None:
    """A C call that keeps the interpreter's lock: no other thread runs, no Python signal handler either."""
    while True:
        ctypes.PyDLL(None).sleep(3600)  # a signal ends it early


FAULTS = {
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "segfault": lambda: ctypes.string_at(0),
    "lock": hold_the_lock,
    "sleep": lambda: time.sleep(3600),
    "raise": lambda: sys.exit(4),
    "refuse": lambda: sys.exit(2),
    "lost": lambda: sys.exit(1),
    "pause": lambda: time.sleep(3.0),
}


def die_of(number: int) -> int:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    return 0


# How a rank ends that was asked to, from the exit code of an orderly end.
SAVES = {
    "well": lambda code: code,
    "refused": lambda code: 2,
    "broken": lambda code: 4,
    "killed": lambda code: die_of(signal.SIGKILL),
    "missing": lambda code: die_of(signal.SIGTERM),
}


class Interrupted(Exception):
    pass


def interrupted(number: int, frame: object) -> None:
    raise Interrupted(number)


def train(arguments: argparse.Namespace, rank: int, heartbeat: Heartbeat) -> int:
    name, _, rest = arguments.fault.partition("@")
    when, _, always = rest.partition(":")
    heartbeat.stage("pretrain")
    if arguments.thread:
        threading.Thread(target=beat_for_ever, args=(heartbeat,), daemon=True).start()
    state: Path = arguments.state
    committed = state / f"committed-{rank}"
    first = int(committed.read_text()) if committed.exists() else 0
    with (state / f"attempts-{rank}").open("a") as file:
        file.write(f"{first} {os.environ['CROSSCHIP_TRACED_STEPS']}\n")
    with (state / f"first-{rank}").open("a") as file:
        file.write(os.environ["CROSSCHIP_FIRST_S"] + "\n")
    is_here = rank == arguments.rank and (bool(always) or len((state / f"attempts-{rank}").read_text().split()) == 2)
    at = first + int(when[1:]) if when.startswith("+") else int(when or 0)
    for step in range(first + 1, arguments.steps + 1):
        for phase in ("data", "forward-backward", "update", "validation", "save"):
            is_due = {"validation": step % 8 == 0, "save": step % SAVE_EVERY == 0}.get(phase, True)
            if not is_due:
                continue
            heartbeat.beat(phase, step)
            if is_here and name and step == at and phase == arguments.phase:
                if name == "verdict":
                    heartbeat.leave(1)
                    return 1
                FAULTS[name]()
            time.sleep(STEP_S / 2)
            if phase == "save":
                committed.write_text(str(step))
        (state / f"rank-{rank}").write_text(str(step))
        others = [each for each in range(arguments.num_ranks) if each != rank]
        heartbeat.beat("averaging", step)
        while any(step > int_in(state / f"rank-{other}") for other in others):  # the collective
            time.sleep(0.01)
    heartbeat.leave(0)
    return 0


def int_in(path: Path) -> int:
    try:
        return int(path.read_text() or "0")
    except OSError:
        return 0


def beat_for_ever(heartbeat: object) -> None:
    """What a heartbeat must not be."""
    while True:
        heartbeat.beat("data", 1)  # type: ignore[attr-defined]
        time.sleep(0.05)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--fault", default="")
    parser.add_argument("--phase", default="forward-backward")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--num-ranks", type=int, default=1)
    parser.add_argument("--slack", type=float, default=1.5)
    parser.add_argument("--thread", action="store_true")
    parser.add_argument("--deaf", action="store_true", help="go on at the first SIGTERM")
    parser.add_argument("--save", choices=SAVES, default="well", help="how the save that a signal asks for ends")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.SIG_IGN if arguments.deaf else interrupted)
    signal.signal(signal.SIGINT, interrupted)
    rank = int(os.environ.get("RANK", "0"))
    heartbeat = open_heartbeat(start_allowance_s=20.0, slack_s=arguments.slack)
    try:
        return train(arguments, rank, heartbeat)
    except Interrupted as number:
        (arguments.state / f"interrupted-{rank}").write_text(str(number))
        code = SAVES[arguments.save](128 + int(str(number)))
        if arguments.save == "well":
            heartbeat.leave(code)
        return code


if __name__ == "__main__":
    sys.exit(main())
