"""Pages from templates: every text is escaped, every page is one file with its style inside."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from crosschip import __version__

__all__ = ["render"]

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, view: dict[str, Any], *, styles: tuple[str, ...] = ("style.css",)) -> str:
    """The page of `template`, which finds `version`, `written` and `style` beside what `view` holds."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    common = {
        "version": __version__,
        "written": time.strftime("%Y-%m-%d %H:%M %Z"),
        "style": "\n".join((TEMPLATES / name).read_text(encoding="utf-8") for name in styles),
    }
    return environment.get_template(template).render(common | view)
