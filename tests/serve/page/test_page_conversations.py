"""Conversations: kept in the browser, edited, tried again, deleted and taken back, in one tab and in two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.chromium import NEEDS_CHROMIUM
from tests.serve.page.scripted import Script, ScriptedServer
from tests.serve.page.visiting import Visit, sync_api

pytestmark = NEEDS_CHROMIUM


def say(scripted: ScriptedServer, *answers: str) -> None:
    scripted.scripts += [Script(parts=[answer]) for answer in answers]


def contents(body: dict[str, Any]) -> list[str]:
    return [message["content"] for message in body["messages"]]


def test_conversations_are_there_when_the_page_is_loaded_again(visit: Visit, scripted: ScriptedServer) -> None:
    say(scripted, "**one**", "two", "three")
    visit.ask_and_wait("First?")
    visit.ask_and_wait("Second?")
    visit.page.click("#new-chat")
    visit.ask_and_wait("Other?")
    assert visit.texts() == ["Other?", "three"]
    visit.page.reload()
    sync_api.expect(visit.page.locator(".answer")).to_have_text("three")
    visit.page.click("#conversations .open >> nth=1")
    assert visit.texts() == ["First?", "one", "Second?", "two"]
    assert visit.page.locator(".answer strong").text_content() == "one"
    visit.page.go_back()
    sync_api.expect(visit.page.locator(".answer")).to_have_text("three")


def test_an_edited_question_stands_beside_the_first(visit: Visit, scripted: ScriptedServer) -> None:
    say(scripted, "first answer", "its sequel", "second answer")
    visit.ask_and_wait("First?")
    visit.ask_and_wait("And?")
    visit.page.locator(".user").first.hover()
    visit.page.locator(".edit").first.click()
    visit.page.fill(".editor textarea", "Better?")
    visit.page.press(".editor textarea", "Enter")
    visit.wait_for_answer()
    assert visit.texts() == ["Better?", "second answer"]
    assert contents(scripted.bodies[-1]) == ["Better?"]
    visit.page.locator(".user").first.hover()
    visit.page.click("[aria-label='The version before']")
    assert visit.texts() == ["First?", "first answer", "And?", "its sequel"]
    visit.page.reload()
    sync_api.expect(visit.page.locator(".answer").last).to_have_text("its sequel")


def test_an_edit_can_be_given_up(visit: Visit) -> None:
    visit.ask_and_wait("First?")
    visit.page.press("#question", "ArrowUp")
    assert visit.page.input_value(".editor textarea") == "First?"
    visit.page.keyboard.press("Escape")
    assert visit.page.locator(".editor").count() == 0
    assert visit.texts() == ["First?", "Yes."]


def test_a_second_answer_stands_beside_the_first(visit: Visit, scripted: ScriptedServer) -> None:
    say(scripted, "one", "another")
    visit.ask_and_wait("First?").locator(".retry").click()
    sync_api.expect(visit.page.locator(".answer")).to_have_text("another")
    visit.wait_for_answer()
    assert [contents(body) for body in scripted.bodies] == [["First?"], ["First?"]]
    assert visit.page.locator(".versions").text_content() == "‹2 / 2›"
    visit.page.click("[aria-label='The version before']")
    assert visit.texts() == ["First?", "one"]
    visit.ask_and_wait("On?")
    assert contents(scripted.bodies[-1]) == ["First?", "one", "On?"], "the branch that is shown is the one that goes on"


def test_a_deleted_conversation_can_be_taken_back(visit: Visit, scripted: ScriptedServer) -> None:
    say(scripted, "one")
    visit.ask_and_wait("First?")
    visit.page.hover("#conversations li")
    visit.page.click("#conversations .remove")
    assert visit.texts() == []
    assert visit.page.locator("#conversations .open").count() == 0
    visit.page.click("#conversations .deleted button")
    visit.page.click("#conversations .open")
    assert visit.texts() == ["First?", "one"]
    visit.page.hover("#conversations li")
    visit.page.click("#conversations .remove")
    visit.page.reload()
    sync_api.expect(visit.page.locator("#model-name")).to_have_text("scripted")
    assert visit.page.locator("#conversations li").count() == 0


def test_an_answer_goes_on_while_another_conversation_is_read(visit: Visit, scripted: ScriptedServer) -> None:
    scripted.scripts.append(Script(parts=["word "] * 20, pause_s=0.05))
    visit.ask("Long?")
    sync_api.expect(visit.page.locator(".answer")).to_contain_text("word")
    visit.page.click("#new-chat")
    assert visit.page.locator("#conversations li.writing").count() == 1
    visit.ask_and_wait("Short?")
    assert visit.texts() == ["Short?", "Yes."]
    sync_api.expect(visit.page.locator("#conversations li.writing")).to_have_count(0)
    visit.page.click("#conversations .open >> text=Long?")
    assert visit.texts() == ["Long?", ("word " * 20).strip()]


def test_what_is_unfolded_or_edited_stays_while_an_answer_ends(visit: Visit, scripted: ScriptedServer) -> None:
    visit.ask_and_wait("First?")
    scripted.scripts.append(Script(reasoning=["hm "] * 3, parts=["word "] * 25, pause_s=0.05))
    visit.ask("Long?")
    visit.page.locator(".reasoning summary").last.click()
    visit.page.locator(".user").first.hover()
    visit.page.locator(".edit").first.click()
    visit.page.fill(".editor textarea", "Half an edit")
    visit.wait_for_answer()
    sync_api.expect(visit.page.locator("#send")).to_be_visible()
    assert visit.page.locator(".thought").last.is_visible()
    assert visit.page.input_value(".editor textarea") == "Half an edit"


def test_a_conversation_deleted_while_it_is_answered_stays_deleted(visit: Visit, scripted: ScriptedServer) -> None:
    scripted.scripts.append(Script(parts=["word "] * 100, pause_s=0.05))
    visit.ask("Long?")
    sync_api.expect(visit.page.locator(".answer")).to_contain_text("word")
    visit.page.hover("#conversations li")
    visit.page.click("#conversations .remove")
    sync_api.expect(visit.page.locator("#conversations .deleted")).to_have_count(1)
    visit.page.wait_for_timeout(300)
    visit.page.reload()
    sync_api.expect(visit.page.locator("#model-name")).to_have_text("scripted")
    assert visit.page.locator("#conversations li").count() == 0


def test_what_came_before_the_page_was_closed_is_kept(visit: Visit, scripted: ScriptedServer) -> None:
    scripted.scripts.append(Script(parts=["word "] * 40, pause_s=0.06, ending="hang"))
    visit.ask("Long?")
    sync_api.expect(visit.page.locator(".answer")).to_contain_text("word " * 30)
    visit.page.reload()
    sync_api.expect(visit.page.locator(".answer")).to_contain_text("word word word")
    assert "not written to its end" in visit.page.locator(".figures").text_content()
    assert visit.page.locator(".retry").count() == 1


def test_a_conversation_is_saved_as_a_file(visit: Visit, scripted: ScriptedServer) -> None:
    say(scripted, "**one**")
    visit.ask_and_wait("First / question?")
    with visit.page.expect_download() as download:
        visit.page.click("#save-file")
    assert download.value.suggested_filename == "First-question-.md"
    assert Path(download.value.path()).read_text("utf-8") == (
        "# First / question?\n\n## You\n\nFirst / question?\n\n## Model\n\n**one**\n"
    )


def test_a_draft_outlives_a_reload(visit: Visit) -> None:
    visit.page.fill("#question", "half a thou")
    visit.page.reload()
    sync_api.expect(visit.page.locator("#question")).to_have_value("half a thou")


def test_two_tabs_lose_nothing(browser: Any, visit: Visit, scripted: ScriptedServer) -> None:
    say(scripted, "one")
    visit.ask_and_wait("First?")
    other = Visit(browser, visit.page.url, context=visit.context)
    sync_api.expect(other.page.locator(".answer")).to_have_text("one")
    say(scripted, "two")
    other.ask_and_wait("In the other tab?")
    sync_api.expect(visit.page.locator(".answer").last).to_have_text("two")
    # Both write into the one conversation at the same time: each branch is kept, in a conversation of its own.
    scripted.scripts += [Script(parts=["slow "] * 30, pause_s=0.05), Script(parts=["quick"])]
    visit.ask("Here?")
    sync_api.expect(visit.page.locator(".answer").last).to_contain_text("slow")
    other.ask_and_wait("There?")
    visit.wait_for_answer()
    visit.page.reload()
    sync_api.expect(visit.page.locator("#conversations .open")).to_have_count(2)
    shown = []
    for number in range(2):
        visit.page.click(f"#conversations .open >> nth={number}")
        shown += visit.texts()
    assert {"Here?", "There?", ("slow " * 30).strip(), "quick"} <= set(shown)
    assert other.complaints == []


def test_a_browser_that_keeps_nothing_is_told_and_still_chats(browser: Any, scripted: ScriptedServer) -> None:
    context = browser.new_context()
    context.add_init_script("indexedDB.open = () => { throw new DOMException('no room', 'QuotaExceededError'); };")
    visit = Visit(browser, scripted.url, context=context)
    assert "not being kept" in visit.page.text_content("#notice")
    visit.ask_and_wait("Still there?")
    assert visit.texts() == ["Still there?", "Yes."]
    assert visit.complaints == []
    context.close()


TREE = """async () => {
  const c = await import('/conversation.js');
  const talk = c.newConversation();
  const question = c.addTurn(talk, null, 'user', 'a');
  const first = c.addTurn(talk, question.id, 'assistant', 'b');
  const second = c.addTurn(talk, question.id, 'assistant', '');
  const next = c.addTurn(talk, second.id, 'user', 'c');
  const told = c.messagesFor(talk, next.id, 'be kind').map((m) => m.role + ':' + m.content);
  c.showBranchOf(talk, first);
  const shown = c.shownTurns(talk).map((t) => t.content);
  question.parent = next.id; // a stored file that holds a circle
  return [told, shown, c.shownTurns(talk, next.id).length, c.versionsOf(talk, first).length];
}"""


def test_the_tree_of_turns(visit: Visit) -> None:
    told, shown, num_in_circle, num_versions = visit.page.evaluate(TREE)
    assert told == ["system:be kind", "user:c"], "a question without an answer is not told"
    assert shown == ["a", "b"]
    assert num_in_circle == 3
    assert num_versions == 2


@pytest.mark.parametrize("title", ["<img src=x onerror=alert(1)>", "\u202egnp.exe", "x" * 5000])
def test_a_title_is_text(visit: Visit, title: str) -> None:
    visit.ask_and_wait(title)
    assert visit.page.locator("#conversations img").count() == 0
    assert "\u202e" not in visit.page.text_content("#conversations")
    assert len(visit.page.text_content("#conversations .open")) <= 90
