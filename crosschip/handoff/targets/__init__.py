"""The forms that models are handed off in, by name."""

from crosschip.handoff.targets.fp8 import FP8
from crosschip.handoff.targets.gguf import GGUF, GGUF_Q8_0
from crosschip.handoff.targets.hf import HF
from crosschip.handoff.targets.target import Target
from crosschip.handoff.targets.w8a8 import W8A8

__all__ = ["TARGETS", "Target"]

TARGETS: dict[str, Target] = {target.name: target for target in (HF, FP8, W8A8, GGUF, GGUF_Q8_0)}
