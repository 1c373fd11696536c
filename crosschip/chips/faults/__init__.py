"""Faults to plant in the simulated chip: what a fault is, the catalogue, honest variants, and counting their effect."""

from crosschip.chips.faults.catalogue import CATALOGUE, FaultRow
from crosschip.chips.faults.counting import CountingFault
from crosschip.chips.faults.fault import Fault, around
from crosschip.chips.faults.model_files import plant_files
from crosschip.chips.faults.spec import faults_from
from crosschip.chips.faults.variants import VARIANTS

__all__ = ["CATALOGUE", "VARIANTS", "CountingFault", "Fault", "FaultRow", "around", "faults_from", "plant_files"]
