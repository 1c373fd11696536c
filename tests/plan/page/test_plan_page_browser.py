"""The plan's page in a real browser: quiet, fitting a phone, printable."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from crosschip.plan.page import plan_page
from tests.chromium import NEEDS_CHROMIUM
from tests.plan.page.plans import plan_document
from tests.plan.page.test_plan_page import HOSTILE

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = NEEDS_CHROMIUM


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    document = copy.deepcopy(plan_document())
    document["notes"].append("x" * 300 + HOSTILE)
    document["dates"]["stages"][0]["name"] += "x" * 100
    path = tmp_path_factory.mktemp("plan") / "plan.html"
    path.write_text(plan_page(document), encoding="utf-8")
    return path


@pytest.mark.parametrize(("width", "scheme"), [(320, "dark"), (390, "light"), (1280, "light")])
def test_the_page_fits_and_is_quiet(browser: Browser, written: Path, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)  # type: ignore[arg-type]
    page = context.new_page()
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(written.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert complaints == []
    assert [url for url in requests if not url.startswith("data:")] == [written.as_uri()]
    assert page.title() != "taken"
    for box in [each.bounding_box() for each in page.locator("svg").all()]:
        assert box is not None
        assert box["width"] > 200
        assert box["height"] > 60
    context.close()


def test_paper_is_light_and_no_chart_is_cut(browser: Browser, written: Path) -> None:
    page = browser.new_page(color_scheme="dark")
    page.goto(written.as_uri())
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(29, 34, 38)"
    assert page.evaluate("getComputedStyle(document.querySelector('figure')).breakInside") == "avoid"
    assert page.pdf()[:4] == b"%PDF"
    page.close()
