"""The simulated chip: a torch device `sim` on the host's memory, in which faults can be planted."""

from crosschip.chips.simulated.activate import activate, active_spec, plant

__all__ = ["activate", "active_spec", "plant"]
