"""Decode steps of small models on a CPU, in compiled code."""

from crosschip.model.rows.row_step import RowStep

__all__ = ["RowStep"]
