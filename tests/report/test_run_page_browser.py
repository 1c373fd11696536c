"""The page in a real browser: no error, nothing fetched, readable on a phone, hostile text inert."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from crosschip.report import write_run_page
from crosschip.rundir import RunDirectory
from tests.chromium import NEEDS_CHROMIUM

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = NEEDS_CHROMIUM


@pytest.mark.parametrize(("width", "scheme"), [(320, "dark"), (390, "light"), (850, "dark"), (1280, "light")])
def test_page_fits_and_is_quiet(browser: Browser, whole_run: RunDirectory, width: int, scheme: str) -> None:
    long_word = {"step": 600, "prompt": "x" * 400, "text": "<script>document.title='taken'</script>" + "y" * 400}
    (whole_run.stage("pretrain") / "samples.jsonl").write_text(json.dumps(long_word) + "\n")
    address = write_run_page(whole_run).resolve().as_uri()
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)  # type: ignore[arg-type]
    page = context.new_page()
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(address)
    assert complaints == []
    assert [url for url in requests if not url.startswith("data:")] == [address]
    assert page.title() == "first: a crosschip run"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    line = page.locator("svg path[style*='--line']").first
    assert line.evaluate("element => getComputedStyle(element).stroke") == (
        "rgb(31, 111, 139)" if scheme == "light" else "rgb(107, 187, 214)"
    )
    context.close()


def test_paper_is_light_and_shows_what_is_folded(browser: Browser, whole_run: RunDirectory) -> None:
    page = browser.new_page(color_scheme="dark")
    page.goto(write_run_page(whole_run).resolve().as_uri())
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(29, 34, 38)"
    assert page.locator(".answer details p").first.is_visible()
    page.close()


def test_reasoning_is_folded_and_opens(browser: Browser, whole_run: RunDirectory) -> None:
    page = browser.new_page()
    page.goto(write_run_page(whole_run).resolve().as_uri())
    folded = page.locator(".answer details").first
    assert not folded.locator("p").is_visible()
    folded.locator("summary").click()
    assert folded.locator("p").is_visible()
    page.close()
