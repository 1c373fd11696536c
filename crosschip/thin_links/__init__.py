"""Thin links between replica groups: what the recipe says of them, and how groups best train together over them.

Pure: the trainer does what is chosen here, and a plan counts with it.
"""

from crosschip.thin_links.choice import (
    BYTES_PER_ELEMENT,
    COMPUTING_S_PER_ELEMENT,
    TARGET_UTILISATION,
    Choice,
    Link,
    choose,
    exchange,
)
from crosschip.thin_links.report import link_from

__all__ = [
    "BYTES_PER_ELEMENT",
    "COMPUTING_S_PER_ELEMENT",
    "TARGET_UTILISATION",
    "Choice",
    "Link",
    "choose",
    "exchange",
    "link_from",
]
