"""The dry voyage: the planned architecture with random weights, exported and loaded by the target engine."""

from crosschip.dry_voyage.voyage import DryVoyageRequest, dry_voyage

__all__ = ["DryVoyageRequest", "dry_voyage"]
