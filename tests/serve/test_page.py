"""The chat page in a real headless Chromium, over a real server and a tiny model that learned its lines."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.chromium import NEEDS_CHROMIUM
from tests.serve.conftest import CONVERSATIONS, REASONING, RunningServer
from tests.serve.page.visiting import Visit

sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = NEEDS_CHROMIUM


@pytest.fixture
def visit(browser: Any, taught_server: RunningServer) -> Iterator[Visit]:
    visited = Visit(browser, taught_server.url, viewport={"width": 1100, "height": 720}, device_scale_factor=2)
    yield visited
    assert visited.hosts == {"127.0.0.1"}, "no request leaves this machine"
    assert visited.complaints == []
    visited.context.close()


def test_a_question_is_answered_with_the_reasoning_folded_away(visit: Visit) -> None:
    page = visit.page
    assert "taught-tiny" in page.title()
    assert page.text_content("#model-name") == "taught-tiny"
    assert (page.text_content("#certificate") or "").startswith("UNCERTIFIED")
    visit.ask(CONVERSATIONS[0][0])
    answer = visit.wait_for_answer()
    assert answer.locator(".answer strong").text_content() == "42"
    assert answer.locator(".answer code").text_content() == "42 - 30 = 12"
    thought = answer.locator(".thought")
    assert not thought.is_visible()
    assert answer.locator(".reasoning summary").text_content().startswith("Reasoning · ")
    assert "tokens" in answer.locator(".reasoning summary").text_content()
    assert "tokens/s" in answer.locator(".figures").text_content()
    if target := os.environ.get("CROSSCHIP_SCREENSHOT"):
        answer.locator(".reasoning summary").click()
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=target)
        answer.locator(".reasoning summary").click()
    answer.locator(".reasoning summary").click()
    assert thought.is_visible()
    assert thought.text_content() == REASONING


def test_a_conversation_goes_on_and_begins_anew(visit: Visit) -> None:
    page, bodies = visit.page, []
    page.on("request", lambda request: bodies.append(request.post_data_json) if request.method == "POST" else None)
    visit.ask(CONVERSATIONS[1][0])
    assert visit.wait_for_answer().locator(".answer").text_content() == CONVERSATIONS[1][2]
    page.click("#settings-button")
    page.fill("#system", "Be kind.")
    page.fill("#temperature", "0")
    page.fill("#max-tokens", "3")
    visit.ask("And now?")
    assert "longest answer" in visit.wait_for_answer().locator(".figures").text_content()
    assert [message["role"] for message in bodies[1]["messages"]] == ["system", "user", "assistant", "user"]
    assert bodies[1]["messages"][2]["content"] == CONVERSATIONS[1][2], "without its reasoning"
    assert (bodies[1]["temperature"], bodies[1]["max_tokens"]) == (0, 3)
    page.click("#new-chat")
    assert page.locator(".turn").count() == 0
    visit.ask(CONVERSATIONS[1][0])
    visit.wait_for_answer()
    assert [message["role"] for message in bodies[2]["messages"]] == ["system", "user"]


def test_what_is_written_is_never_read_as_html(visit: Visit) -> None:
    visit.ask("<img src=x onerror=alert(1)>")
    visit.wait_for_answer()
    assert visit.page.locator("main img").count() == 0
    assert visit.page.locator(".question-text").text_content() == "<img src=x onerror=alert(1)>"


def test_shift_enter_makes_a_line_and_an_empty_question_is_not_sent(visit: Visit) -> None:
    page = visit.page
    assert page.is_disabled("#send")
    page.press("#question", "Enter")
    page.type("#question", "a")
    page.press("#question", "Shift+Enter")
    page.type("#question", "b")
    assert page.input_value("#question") == "a\nb"
    assert page.locator(".turn").count() == 0
    assert page.is_enabled("#send")


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_an_answer_can_be_stopped(browser: Any, random_server: RunningServer, way: str) -> None:
    visit = Visit(browser, random_server.url)
    page = visit.page
    page.click("#settings-button")
    page.fill("#temperature", "0")
    visit.ask("Never stop.")
    sync_api.expect(page.locator(".assistant .figures")).to_contain_text("tokens/s")
    if way == "button":
        page.click("#stop")
    else:
        page.keyboard.press("Escape")
    answer = visit.wait_for_answer()
    assert "stopped" in answer.locator(".figures").text_content()
    assert page.is_visible("#send")
    assert page.is_hidden("#stop")
    for _ in range(200):
        if httpx.get(f"{random_server.url}/health").json()["free_slots"] == 8:
            break
        page.wait_for_timeout(50)
    assert httpx.get(f"{random_server.url}/health").json()["running"] == 0
    assert visit.complaints == []
    visit.context.close()


def test_the_policy_forbids_everything_that_is_not_ours(visit: Visit) -> None:
    policy = visit.response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    outside = visit.page.evaluate("fetch('https://example.org/').then(() => 'went out', () => 'refused')")
    assert outside == "refused"
    assert any("Content Security Policy" in complaint for complaint in visit.complaints)
    visit.complaints.clear()


def test_a_model_without_a_tokenizer_says_that_it_cannot_chat(browser: Any, bare_server: RunningServer) -> None:
    visit = Visit(browser, bare_server.url)
    assert "no tokenizer" in (visit.page.text_content("#welcome") or "")
    assert visit.page.is_disabled("#question")
    visit.context.close()


@pytest.mark.parametrize("width", [340, 390, 1400])
def test_nothing_is_wider_than_the_window(browser: Any, taught_server: RunningServer, width: int) -> None:
    visit = Visit(browser, taught_server.url, viewport={"width": width, "height": 700}, color_scheme="dark")
    visit.ask("x" * 300)
    visit.wait_for_answer()
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    assert visit.page.evaluate("document.querySelector('main').scrollWidth") <= width
    visit.context.close()


def test_an_error_of_the_server_is_shown(visit: Visit) -> None:
    visit.page.click("#settings-button")
    visit.page.fill("#max-tokens", "99999")
    visit.ask("Hi")
    answer = visit.wait_for_answer()
    assert "maximum context length is 2048" in answer.locator(".problem").text_content()
    assert all("400" in complaint for complaint in visit.complaints), "the browser notes the status"
    visit.complaints.clear()
