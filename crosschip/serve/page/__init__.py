"""The chat page: plain files, served as they are. Nothing is built, and nothing is fetched from elsewhere."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse

__all__ = ["PAGE_PATHS", "add_page"]

_DIRECTORY = Path(__file__).parent
_MEDIA_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
}
# Beside what the policy of every response forbids: a script that would have a string read as HTML or as code fails.
_POLICY = "require-trusted-types-for 'script'; trusted-types 'none'"
# The name of a file in vendor/ holds its version (or, of a font, that of the style sheet which names it).
_CACHE_CONTROL = {"vendor": "public, max-age=31536000, immutable"}


def _page_files() -> dict[str, Path]:
    """Where each file is served: the page at `/`, the others by their names in this directory."""
    files = sorted(file for file in _DIRECTORY.rglob("*") if file.suffix in _MEDIA_TYPES)
    names = {file: file.relative_to(_DIRECTORY).as_posix() for file in files}
    return {"/" if name == "index.html" else f"/{name}": file for file, name in names.items()}


_FILES = _page_files()
PAGE_PATHS = frozenset(_FILES)  # they hold no secret: what the page shows comes over the API


def add_page(app: FastAPI) -> None:
    """Serve the page at `/` and its files beside it."""
    for path, file in _FILES.items():
        _add_file(app, path, file)


def _add_file(app: FastAPI, path: str, file: Path) -> None:
    headers = {
        "Cache-Control": _CACHE_CONTROL.get(file.parent.name, "no-cache"),
        "Content-Security-Policy": _POLICY,
    }

    @app.get(path, include_in_schema=False)
    async def page_file() -> FileResponse:
        return FileResponse(file, media_type=_MEDIA_TYPES[file.suffix], headers=headers)
