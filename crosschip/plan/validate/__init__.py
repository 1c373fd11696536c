"""`plan validate`: the step-time model against published runs, two parameters fitted a kind of chip."""

from crosschip.plan.validate.report import validate_rows
from crosschip.plan.validate.rows import Row, read_rows

__all__ = ["Row", "read_rows", "validate_rows"]
