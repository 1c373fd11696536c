"""The pages of a qualification and of a comparison in a real browser: quiet, fitting a phone, printable."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from crosschip.report.compare import compare
from crosschip.report.compare_page import compare_page
from crosschip.report.qualify_page import qualification_page
from tests.chromium import NEEDS_CHROMIUM
from tests.report.qualifications import MEASURED, NUM_DRAWN, finding, qualification
from tests.report.test_run_page import HOSTILE

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = NEEDS_CHROMIUM

LONG = "x" * 300 + HOSTILE


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    measured = {**MEASURED, "software": [{"never": LONG, "seen": 1.0}]}
    report = qualification(finding("FAIL", LONG, reproducer=LONG, details={LONG: LONG}), measured=measured)
    other = qualification(chip="cuda:0", model_name="NVIDIA H20")
    directory = tmp_path_factory.mktemp("pages")
    found = {
        "qualification": qualification_page(report),
        "comparison": compare_page(compare({"a": report, "b": other})),
    }
    for name, text in found.items():
        (directory / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: directory / f"{name}.html" for name in found}


@pytest.mark.parametrize("name", ["qualification", "comparison"])
@pytest.mark.parametrize(("width", "scheme"), [(320, "dark"), (390, "light"), (1280, "light")])
def test_the_page_fits_and_is_quiet(
    browser: Browser, pages: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)  # type: ignore[arg-type]
    page = context.new_page()
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(pages[name].as_uri())
    page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert complaints == []
    assert [url for url in requests if not url.startswith("data:")] == [pages[name].as_uri()]
    assert page.title() != "taken"
    assert page.locator("svg").count() == (NUM_DRAWN if name == "qualification" else 0)
    for box in [each.bounding_box() for each in page.locator("svg").all()]:
        assert box is not None
        assert box["width"] > 200
        assert box["height"] > 40  # a heat map of two rows on the narrowest phone
    context.close()


def test_paper_is_light_and_shows_what_is_folded(browser: Browser, pages: dict[str, Path]) -> None:
    page = browser.new_page(color_scheme="dark")
    page.goto(pages["qualification"].as_uri())
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(29, 34, 38)"
    assert page.locator("details td").first.is_visible()
    page.close()
