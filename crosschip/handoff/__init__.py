"""Handing a trained model off: the files a serving engine wants."""

from crosschip.handoff.export import export_hf

__all__ = ["export_hf"]
