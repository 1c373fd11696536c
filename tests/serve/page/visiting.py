"""A visit of the page in a real browser."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import pytest

sync_api = pytest.importorskip("playwright.sync_api")

RENDER = """async (text) => {
  const { render } = await import('/markdown.js');
  const box = document.createElement('div');
  box.append(render(text));
  return %s;
}"""


class Visit:
    """A page with what it asked for and what it complained about."""

    def __init__(self, browser: Any, url: str, context: Any = None, wait: bool = True, **options: Any) -> None:
        self.context = context or browser.new_context(**options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(30_000)
        self.hosts: set[str | None] = set()
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.hosts.add(urlsplit(request.url).hostname))
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.response = self.page.goto(url)
        # Waiting by a script of one's own would need eval, which the page's policy forbids.
        if wait:
            sync_api.expect(self.page.locator("#model-name")).not_to_have_text("…")

    def ask(self, text: str) -> None:
        self.page.fill("#question", text)
        self.page.press("#question", "Enter")

    def wait_for_answer(self) -> Any:
        self.page.wait_for_selector(".assistant:last-child:not(.working)")
        return self.page.locator(".assistant").last

    def ask_and_wait(self, text: str) -> Any:
        """Ask, and the answer when it has ended."""
        self.ask(text)
        return self.wait_for_answer()

    def texts(self) -> list[str]:
        """Questions and answers as they are shown, without what stands around them."""
        return [part.strip() for part in self.page.locator(".question-text, .answer").all_text_contents()]

    def render(self, text: str, what: str = "box.innerHTML") -> Any:
        """What becomes of a Markdown text."""
        return self.page.evaluate(RENDER % what, text)
