"""The page of a plan, and the parts of its document that the page shows."""

from crosschip.plan.page.document import (
    dates_document,
    fall_back_document,
    money_document,
    sensitivity_document,
    serving_document,
)
from crosschip.plan.page.page import plan_page

__all__ = [
    "dates_document",
    "fall_back_document",
    "money_document",
    "plan_page",
    "sensitivity_document",
    "serving_document",
]
