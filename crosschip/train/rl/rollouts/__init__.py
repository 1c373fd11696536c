"""Rollouts over HTTP: problems go to any number of engines, judged groups of answers come back. No torch.

`pool` is what the trainer uses. Below it: `driver` keeps requests in flight, `ledger` decides what comes next and what
is too old, `fleet` and `upkeep` know the engines, `engine` is one of them behind HTTP, `answers` says what may be
believed, `publishing` brings weights out, `local` is an engine started here.
"""

from crosschip.train.rl.rollouts.errors import RolloutError
from crosschip.train.rl.rollouts.local import LocalEngine, LocalSettings
from crosschip.train.rl.rollouts.member import RemoteEngine
from crosschip.train.rl.rollouts.pool import Rollouts, engines_of
from crosschip.train.rl.rollouts.taken import TakenBatch, WorkShares

__all__ = [
    "LocalEngine",
    "LocalSettings",
    "RemoteEngine",
    "RolloutError",
    "Rollouts",
    "TakenBatch",
    "WorkShares",
    "engines_of",
]
