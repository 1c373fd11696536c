"""`crosschip run`: the whole voyage of a recipe on one machine, step by step, each recorded when it is done."""

from crosschip.voyage.running import run_voyage
from crosschip.voyage.state import Step, Voyage
from crosschip.voyage.steps import STEPS

__all__ = ["STEPS", "Step", "Voyage", "run_voyage"]
