"""Train a recipe in this process; `--signal-at STAGE:STEP:NAME[,NAME]` sends real signals to it after that step.

The name `later` waits until a signal counts as another request.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

import torch

from crosschip.errors import CrosschipError
from crosschip.recipe import load_recipe
from crosschip.rundir import RunDirectory
from crosschip.train.progress import LineProgress, Moment
from crosschip.train.signals import ONE_REQUEST_S
from crosschip.train.stages import train_recipe


class SignallingProgress(LineProgress):
    def __init__(self, signal_at: str | None) -> None:
        super().__init__(None)
        stage, step, names = (signal_at or "none:0:").split(":")
        self._stage, self._step, self._names = stage, int(step), names.split(",")
        self._now = ""

    def start(self, label: str, first_step: int, num_steps: int) -> None:
        self._now = label

    def advance(self, moment: Moment) -> None:
        if (self._now, moment.step) == (self._stage, self._step):
            for name in self._names:
                if name == "later":
                    time.sleep(ONE_REQUEST_S)
                else:
                    os.kill(os.getpid(), getattr(signal, name))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--signal-at")
    parser.add_argument("--set", action="append", default=[])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        recipe = load_recipe(arguments.recipe, arguments.set)
        progress = SignallingProgress(arguments.signal_at)
        return train_recipe(recipe, RunDirectory(arguments.out), arguments.resume, progress).exit_code
    except CrosschipError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
