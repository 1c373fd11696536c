"""What goes wrong is said in words, with a way to try again; nothing that came is lost."""

from __future__ import annotations

from typing import Any

import pytest

from crosschip.serve.api.errors import error_body
from tests.chromium import NEEDS_CHROMIUM
from tests.serve.page.scripted import Script, ScriptedServer, scripted_server
from tests.serve.page.visiting import Visit, sync_api

pytestmark = NEEDS_CHROMIUM

PARTS = ["What ", "came ", "so far"]
NOT_SSE = 'data: {"choices": [{"delta": {"content": "x"}}]}\n\ndata: not json\n\n'
FAULTS = {
    "the stream ends without a word": (Script(PARTS, ending="quiet", pause_s=0.05), "stopped in the middle", True),
    "the connection breaks": (Script(PARTS, ending="cut", pause_s=0.05), "connection to the server was lost", True),
    "an error event": (Script(PARTS, ending="error", pause_s=0.05), "the engine was killed", True),
    "no part of an answer": (Script(body=NOT_SSE), "what is no part of an answer", True),
    "429": (
        Script(status=429, headers={"Retry-After": "7"}, body=error_body(429, "64 requests wait")),
        "too much to do: 64 requests wait. It asks to wait 7 seconds.",
        False,
    ),
    "503": (Script(status=503, body=error_body(503, "the engine is loading")), "cannot answer now: the engine", False),
    "a proxy's page": (Script(status=502, body="<html><h1>Bad Gateway</h1>"), "cannot answer now: status 502", False),
    "400": (Script(status=400, body=error_body(400, "min_p is not supported")), "refused: min_p is not", False),
    "an empty body": (Script(body=""), "stopped in the middle", False),
    "a hostile Retry-After": (Script(status=429, headers={"Retry-After": "-1e99"}, body={}), "status 429", False),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_said_and_can_be_tried_again(visit: Visit, scripted: ScriptedServer, name: str) -> None:
    script, words, keeps = FAULTS[name]
    scripted.scripts += [script, Script(parts=["Now it works."])]
    answer = visit.ask_and_wait("Well?")
    assert words in answer.locator(".problem").text_content()
    came = answer.locator(".answer").text_content()
    assert ("What came is kept." in answer.locator(".problem").text_content()) is keeps
    assert bool(came) is keeps
    visit.page.reload()
    assert words in visit.page.locator(".problem").text_content()
    assert visit.page.locator(".answer").text_content() == came
    visit.page.locator(".problem .retry").click()
    sync_api.expect(visit.page.locator(".answer")).to_have_text("Now it works.")
    assert visit.page.locator(".problem").count() == 0
    assert [body["messages"] for body in scripted.bodies] == [[{"role": "user", "content": "Well?"}]] * 2
    visit.page.click("[aria-label='The version before']")
    assert visit.page.locator(".answer").text_content() == came, "the broken answer is a version, too"
    visit.complaints.clear()  # the browser notes each failed request itself


def test_a_question_without_an_answer_is_left_out(visit: Visit, scripted: ScriptedServer) -> None:
    scripted.scripts += [Script(["one"]), Script(status=503, body={}), Script(["three"])]
    for question in ("First?", "Second?", "Third?"):
        visit.ask_and_wait(question)
    assert [message["content"] for message in scripted.bodies[-1]["messages"]] == ["First?", "one", "Third?"]
    assert "not told of it" in visit.page.locator(".user").nth(1).text_content()
    visit.complaints.clear()


def test_a_server_that_is_gone_is_told_and_the_question_kept(browser: Any) -> None:
    with scripted_server() as server:
        visit = Visit(browser, server.url)
        visit.ask_and_wait("First?")
    answer = visit.ask_and_wait("Still there?")
    assert "does not answer. Is it still running?" in answer.locator(".problem").text_content()
    assert visit.texts() == ["First?", "Yes.", "Still there?", ""]
    visit.context.close()


def test_a_server_that_hangs_is_waited_for_aloud_and_can_be_stopped(visit: Visit, scripted: ScriptedServer) -> None:
    scripted.scripts.append(Script(parts=[], ending="hang"))
    visit.ask("Well?")
    sync_api.expect(visit.page.locator(".figures")).to_contain_text("waiting for the server · 2 s")
    visit.page.keyboard.press("Escape")
    answer = visit.wait_for_answer()
    assert "stopped" in answer.locator(".figures").text_content()
    for _ in range(100):
        if scripted.num_ended == 1:
            break
        visit.page.wait_for_timeout(50)
    assert scripted.num_ended == 1, "the server is told to stop"


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_is_asked_for_sent_and_not_written_down(visit: Visit, scripted: ScriptedServer, status: int) -> None:
    visit.ask_and_wait("First?")
    scripted.api_key, scripted.key_status = "a secret", status
    answer = visit.ask_and_wait("Second?")
    assert "wants an API key" in answer.locator(".problem").text_content()
    assert visit.page.locator("#api-key").is_visible()
    visit.page.keyboard.type("a secret")
    visit.page.keyboard.press("Tab")
    answer.locator(".problem .retry").click()
    sync_api.expect(visit.page.locator(".answer").last).to_have_text("Yes.")
    assert scripted.keys[-1] == "Bearer a secret"
    assert "a secret" not in visit.page.evaluate(
        "JSON.stringify({ ...localStorage }) + location.href + document.cookie"
    )
    visit.complaints.clear()


def test_a_page_that_opens_without_a_server_that_knows_it_says_so(browser: Any, scripted: ScriptedServer) -> None:
    scripted.api_key = "a secret"
    visit = Visit(browser, scripted.url, wait=False)
    sync_api.expect(visit.page.locator("#notice")).to_contain_text("wants an API key")
    visit.page.fill("#api-key", "a secret")
    visit.page.keyboard.press("Tab")
    sync_api.expect(visit.page.locator("#model-name")).to_have_text("scripted")
    assert visit.page.is_hidden("#notice")
    visit.ask_and_wait("Now?")
    assert visit.texts() == ["Now?", "Yes."]
    visit.context.close()


def test_an_answer_of_another_engine_is_read_too(visit: Visit, scripted: ScriptedServer) -> None:
    # vLLM says `reasoning`, llama.cpp ends lines with CR LF, proxies send comments; usage may be missing.
    scripted.scripts.append(
        Script(
            body=': a comment\r\n\r\nevent: message\r\ndata: {"model": "m",\r\n'
            'data: "choices": [{"delta": {"reasoning": "hm"}}]}\r\n\r\n'
            'data:{"choices": [{"delta": {"content": "ja"}, "finish_reason": "stop"}]}\r\n\r\n'
        )
    )
    answer = visit.ask_and_wait("Na?")
    assert answer.locator(".answer").text_content() == "ja"
    assert answer.locator(".reasoning summary").text_content() == "Reasoning · 2 characters"
    assert answer.locator(".figures").text_content() == "m · UNCERTIFIED", "who does not show a certificate has none"
