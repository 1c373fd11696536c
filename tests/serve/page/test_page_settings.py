"""What is set, what answered, and how the page is used: by keys, on a phone, in the light and in the dark."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

import crosschip.serve.page
from tests.chromium import NEEDS_CHROMIUM
from tests.serve.page.scripted import STATUS, Script, ScriptedServer
from tests.serve.page.visiting import Visit, sync_api

pytestmark = NEEDS_CHROMIUM

FIELDS = {
    "temperature": ("temperature", "0.7", 0.7),
    "top-p": ("top_p", "0.9", 0.9),
    "top-k": ("top_k", "40", 40),
    "min-p": ("min_p", "0.05", 0.05),
    "presence-penalty": ("presence_penalty", "-0.5", -0.5),
    "frequency-penalty": ("frequency_penalty", "1", 1),
    "repetition-penalty": ("repetition_penalty", "1.1", 1.1),
    "seed": ("seed", "7", 7),
    "max-tokens": ("max_tokens", "99", 99),
}


def test_settings_are_sent_kept_and_taken_back(visit: Visit, scripted: ScriptedServer) -> None:
    visit.page.click("#settings-button")
    for field, (_, text, _) in FIELDS.items():
        visit.page.fill(f"#{field}", text)
    visit.page.fill("#stop-strings", "END\n\n###")
    visit.page.fill("#system", "Be brief.")
    visit.page.reload()
    sync_api.expect(visit.page.locator("#model-name")).to_have_text("scripted")
    visit.ask_and_wait("Well?")
    body = scripted.bodies[-1]
    assert {name: body[name] for name, _, _ in FIELDS.values()} == {name: value for name, _, value in FIELDS.values()}
    assert body["stop"] == ["END", "###"]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    visit.page.click(".about summary")
    assert '"Be brief."' in visit.page.text_content(".origin"), "an answer tells what it was asked with"
    visit.page.click("#settings-button")
    visit.page.click("#settings-end button")
    visit.ask_and_wait("And now?")
    assert set(scripted.bodies[-1]) == {"model", "messages", "stream", "stream_options"}


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", "5"), ("top-k", "-3"), ("max-tokens", "0"), ("seed", "1.5")]
)
def test_a_setting_out_of_range_is_shown_and_nothing_is_lost(
    visit: Visit, scripted: ScriptedServer, field: str, value: str
) -> None:
    visit.page.click("#settings-button")
    visit.page.fill(f"#{field}", value)
    visit.page.click("#settings-button")
    visit.ask("Well?")
    assert visit.page.locator(f"#{field}").is_visible()
    assert visit.page.evaluate("document.activeElement.id") == field
    assert visit.page.input_value("#question") == "Well?"
    assert scripted.bodies == []


def test_each_answer_says_what_answered(visit: Visit, scripted: ScriptedServer) -> None:
    certified = {"certificate": "CERTIFIED", "chip": "Ascend 910B", "weights_version": "4f2a"}
    reasoned = Script(reasoning=["hm "] * 3, parts=["so"] * 7, fields={"crosschip": certified})
    scripted.scripts += [Script(), reasoned]
    visit.ask_and_wait("First?")
    answer = visit.ask_and_wait("Second?")
    first, second = visit.page.locator(".assistant").nth(0), visit.page.locator(".assistant").nth(1)
    assert first.locator(".figures").text_content() == "scripted · UNCERTIFIED · 1 token"
    assert second.locator(".figures").text_content() == "scripted · 10 tokens · 50 tokens/s"
    assert answer.locator(".reasoning summary").text_content() == "Reasoning · 3 tokens"
    assert not answer.locator(".thought").is_visible()
    second.locator(".about summary").click()
    about = second.locator(".origin").inner_text()
    for word in ("CERTIFIED", "Ascend 910B", "4f2a", "9 tokens", "3 of them reasoning", "the model's own"):
        assert word in about
    assert "no certificate.json" not in about
    first.locator(".about summary").click()
    assert "UNCERTIFIED: no certificate.json" in first.locator(".origin").inner_text()


def test_a_gateways_headers_say_which_engine_answered(visit: Visit, scripted: ScriptedServer) -> None:
    headers = {"X-Crosschip-Engine": "left", "X-Crosschip-Chip": "H200", "X-Crosschip-Certificate": "CERTIFIED"}
    scripted.scripts.append(Script(stream_headers=headers, fields={"crosschip": {"weights_version": 9}}))
    answer = visit.ask_and_wait("Who?")
    assert answer.locator(".figures").text_content() == "scripted · 1 token"
    answer.locator(".about summary").click()
    rows = answer.locator(".origin dd").all_text_contents()
    assert rows[:5] == ["scripted", "H200", "left", "9", "CERTIFIED"]


def test_the_certificate_is_what_the_answer_itself_says_last(visit: Visit, scripted: ScriptedServer) -> None:
    for head, chunks in (("CERTIFIED", "UNCERTIFIED"), ("PENDING", "CERTIFIED")):
        fields = {"crosschip": {"certificate": chunks, "weights_version": 9}}
        scripted.scripts.append(Script(stream_headers={"X-Crosschip-Certificate": head}, fields=fields))
        figures = visit.ask_and_wait("Which?").locator(".figures").text_content() or ""
        assert ("UNCERTIFIED" in figures) == (chunks == "UNCERTIFIED")


def test_the_head_tells_certificate_alarms_and_weights(visit: Visit, scripted: ScriptedServer) -> None:
    assert "UNCERTIFIED" in visit.page.text_content("#certificate")
    assert "no certificate.json" in visit.page.text_content("#certificate")
    assert visit.page.is_hidden("#alarm")
    scripted.status = {"certificate": "CERTIFIED", "weights_version": 4, "chip": "cpu", "alarms": ["drift <b>0.3</b>"]}
    scripted.scripts.append(Script(fields={"crosschip": STATUS | {"weights_version": 4}}))
    visit.ask_and_wait("Well?")  # an answer of other weights makes the page look again
    sync_api.expect(visit.page.locator("#model-facts")).to_contain_text("weights version 4")
    assert visit.page.is_hidden("#certificate")
    assert visit.page.text_content("#alarm") == "drift <b>0.3</b>"


def test_a_model_can_be_chosen(browser: Any, scripted: ScriptedServer) -> None:
    scripted.models = ["one", "two"]
    visit = Visit(browser, scripted.url)
    assert visit.page.is_visible("#model-choice")
    visit.page.select_option("#model-choice", "two")
    visit.ask_and_wait("Who?")
    assert scripted.bodies[-1]["model"] == "two"
    visit.context.close()


def test_a_chosen_model_leaves_nothing_of_the_one_before(browser: Any, scripted: ScriptedServer) -> None:
    told = {"has_tokenizer": True, "has_chat_template": False, "default_sampling": {"temperature": 0.6, "top_k": 20}}
    scripted.models = ["bare", "chat"]
    scripted.cards = {"bare": {"crosschip": told}, "chat": {"max_model_len": None}}
    visit = Visit(browser, scripted.url)

    def shown() -> list[str | None]:
        placeholders = [visit.page.get_attribute(f"#{id_}", "placeholder") for id_ in ("temperature", "top-k", "seed")]
        texts = [visit.page.text_content("#welcome h1"), visit.page.text_content("#welcome-text")]
        return [*texts, *placeholders, visit.page.get_attribute("#max-tokens", "placeholder")]

    lacking = "Its directory has no chat template. The API at /v1/completions continues text."
    bare = ["This model cannot chat", lacking, "0.6", "20", "by chance", "up to 2048"]
    assert shown() == bare
    visit.page.select_option("#model-choice", "chat")
    sends = "This page sends what you write to its own server and nowhere else."
    assert [each or "" for each in shown()] == ["Ask something", sends, "the model's", "the model's", "by chance", ""]
    assert visit.page.is_enabled("#question")
    visit.page.select_option("#model-choice", "bare")
    assert shown() == bare
    visit.context.close()


def test_the_page_is_used_by_keys(visit: Visit, scripted: ScriptedServer) -> None:
    scripted.scripts.append(Script(parts=["word "] * 200, pause_s=0.05))
    assert visit.page.evaluate("document.activeElement.id") == "question"
    visit.page.keyboard.type("Well?")
    visit.page.keyboard.press("Enter")
    sync_api.expect(visit.page.locator(".answer")).to_contain_text("word")
    visit.page.keyboard.press("Escape")
    assert "stopped" in visit.wait_for_answer().locator(".figures").text_content()
    visit.page.keyboard.press("Control+Shift+O")
    assert visit.texts() == []
    visit.page.locator("#settings-button").focus()
    visit.page.keyboard.press("/")
    assert visit.page.evaluate("document.activeElement.id") == "question"
    assert visit.page.input_value("#question") == ""
    reached = []
    for _ in range(12):
        visit.page.keyboard.press("Tab")
        reached.append(visit.page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert {"new-chat", "open", "sidebar-button", "settings-button"} <= set(reached)


def test_an_ending_is_announced_once(visit: Visit) -> None:
    visit.ask_and_wait("Well?")
    sync_api.expect(visit.page.locator("#announcement")).to_contain_text("The answer has ended. scripted")
    assert visit.page.locator("#conversation[aria-live]").count() == 0, "an answer is not read out at each token"


def test_on_a_phone_enter_makes_a_line_and_the_list_is_a_drawer(browser: Any, scripted: ScriptedServer) -> None:
    phone = {"width": 390, "height": 760}
    visit = Visit(browser, scripted.url, viewport=phone, has_touch=True, is_mobile=True, device_scale_factor=2)
    page = visit.page
    page.fill("#question", "a")
    page.press("#question", "Enter")
    assert page.input_value("#question") == "a\n"
    wide = "| " + " | ".join("column" * 3 for _ in range(8)) + " |"
    rows = f"{wide}\n|{'-|' * 8}\n{wide}\n\n$$" + "x+" * 200 + "x$$\n\n```\n" + "y" * 500 + "\n```\n" + "z" * 500
    scripted.scripts.append(Script(parts=[rows]))
    page.tap("#send")
    visit.wait_for_answer()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("document.querySelector('main').scrollWidth") <= 390
    assert page.is_hidden("#sidebar")
    page.tap("#sidebar-button")
    assert page.is_visible("#conversations .open")
    page.tap("#new-chat")
    assert page.is_hidden("#sidebar")
    assert visit.complaints == []
    visit.context.close()


@pytest.mark.parametrize(
    ("system", "chosen", "paper"), [("light", "", 251), ("dark", "", 22), ("light", "dark", 22), ("dark", "light", 251)]
)
def test_light_and_dark(browser: Any, scripted: ScriptedServer, system: Any, chosen: str, paper: int) -> None:
    visit = Visit(browser, scripted.url, color_scheme=system)
    visit.page.click("#settings-button")
    visit.page.select_option("#theme", chosen)
    visit.page.reload()
    background = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background.startswith(f"rgb({paper},")
    visit.context.close()


# Relative luminance and contrast as WCAG 2.2 defines them.
CONTRAST = """(names) => {
  const linear = (part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  const luminance = (color) => {
    const [r, g, b] = color.match(/[\\d.]+/g).map((part) => linear(Number(part) / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    const color = getComputedStyle(element).backgroundColor;
    return /rgba\\(.*, 0\\)/.test(color) ? behind(element.parentElement) : color;
  };
  return names.map((name) => {
    const element = document.querySelector(name);
    const both = [luminance(getComputedStyle(element).color), luminance(behind(element))].sort((a, b) => b - a);
    return [name, (both[0] + 0.05) / (both[1] + 0.05)];
  });
}"""
READ = [
    *(".question-text", ".answer p", ".figures", ".problem p", ".reasoning summary", "#certificate", ".facts", ".hint"),
    *(".kept", ".answer a", ".code-head span", ".problem button", ".conversations .open"),
]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_is_written_can_be_read(browser: Any, scripted: ScriptedServer, scheme: Any) -> None:
    visit = Visit(browser, scripted.url, color_scheme=scheme)
    scripted.scripts.append(
        Script(reasoning=["hm"], parts=["text [a](https://e.example)\n```py\nx\n```"], ending="error")
    )
    visit.ask_and_wait("Well?")
    for name, ratio in visit.page.evaluate(CONTRAST, READ):
        assert ratio >= 4.5, f"{name}: WCAG 2.2 asks for a contrast of 4.5"
    visit.context.close()


# The libraries as their authors published them on npm: marked 18.2.1, temml 0.13.5, @fontsource/noto-sans-math 5.3.0.
VENDORED = {
    "Temml.woff2": "fc70501355ae6d38ff0b80f825af153557d5f2f474198d6b9b7dd2d3a291a0cc",
    "marked-18.2.1.js": "5371fea86fd0656b4fc7bea7c94c663109d82789b69433eeee78d42895aa44de",
    "marked.LICENSE": "8e3a3f82f59a60958f56ca08f445647c32a4733dc7ca6c2c46f6eb898471ab9c",
    "noto-sans-math-5.3.0.woff2": "c39a9444f95747345dcbde1032ec0ea2af1db63dccf53a31b38a957bdcf4a01f",
    "noto-sans-math.LICENSE": "14526a1947ee905c1d4e9d8f4bbd1356d2c19362e62e1387ae35a8c797efe5e0",
    "temml-0.13.5.css": "544f4e3fee4c36f4568e4f145fa626dc9573c5f4c96c523aadcc433c3989a239",
    "temml-0.13.5.min.js": "1ab19148afe0dbc836b7a74f344071b3f3a70a7a8259ae4049e76894fcdf8d95",
    "temml.LICENSE": "12b4e5592a12baaf50637881f2cb9d66667b26b8d51a73cd8f0d6bcefe176ab6",
}


def test_vendored_files_are_as_they_were_published() -> None:
    vendor = Path(crosschip.serve.page.__file__).parent / "vendor"
    found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(vendor.iterdir())}
    assert found == VENDORED
