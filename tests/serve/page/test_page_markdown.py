"""What models write, as elements: right where it is Markdown, and inert whatever it is."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import crosschip.serve.page
from tests.chromium import NEEDS_CHROMIUM
from tests.serve.page.scripted import Script, ScriptedServer
from tests.serve.page.visiting import Visit

pytestmark = NEEDS_CHROMIUM


@pytest.fixture(scope="module")
def page(browser: Any, server: ScriptedServer) -> Iterator[Visit]:
    """One visit for all tests that only render."""
    visited = Visit(browser, server.url)
    yield visited
    visited.context.close()
    assert visited.complaints == []


# Every element that an answer may hold outside its formulas, and every attribute.
ELEMENTS = {
    *("a", "blockquote", "br", "button", "code", "del", "div", "em", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p"),
    *("pre", "span", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul"),
}
ATTRIBUTES = {"class", "dir", "href", "rel", "start", "tabindex", "target", "title", "type"}
IN_FORMULAS = """[...box.querySelectorAll('math, math *')].flatMap((e) =>
  [e.namespaceURI === 'http://www.w3.org/1998/Math/MathML' ? '' : e.localName,
   ...[...e.attributes].map((a) => a.name).filter((name) => /^on|href|src|^id$/i.test(name))]).filter(Boolean)"""
INVENTORY = """[...box.querySelectorAll('*')].filter((e) => !e.closest('math')).map((e) =>
  [e.localName, [...e.attributes].map((a) => [a.name, a.value])])"""

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "a <b onmouseover=alert(1)>b</b> <svg/onload=alert(1)>",
    "<iframe srcdoc='<script>alert(1)</script>'></iframe>\n\n<style>*{display:none}</style>",
    "[a](javascript:alert(1)) [b](JaVaScRiPt:alert(1)) [c](java\tscript:alert(1)) [d](&#106;avascript:alert(1))",
    "[a](data:text/html,<script>alert(1)</script>) [b](vbscript:x) [c](file:///etc/passwd) [d](blob:x)",
    "<javascript:alert(1)> ![x](javascript:alert(1)) ![y](data:image/svg+xml,<svg/onload=alert(1)>)",
    "[a]: javascript:alert(1)\n\n[a] [a][] [x][a]",
    "[a](/v1/models) [b](#settings) [c](//evil.example)",
    '[a](https://e.example "x\\" onclick=\\"alert(1)")',
    '```"><img src=x onerror=alert(1)>\nx\n```',
    "| <script>1</script> | [x](javascript:1) |\n|-|-|\n| <img src=x> | `<b>` |",
    r"$\href{javascript:alert(1)}{x}$ $\url{javascript:alert(1)}$ $\includegraphics{https://e.example/x.png}$",
    r"$\class{composer}{x}$ $\id{question}{x}$ $\data{a=b}{x}$ $\style{position:fixed}{x}$",
    r"$$x \label{question} \tag{1}$$ $\ref{question}$",
]


@pytest.mark.parametrize("text", HOSTILE)
def assert_harmless(inventory: list[tuple[str, list[tuple[str, str]]]]) -> None:
    for name, attributes in inventory:
        assert name in ELEMENTS
        for attribute, value in attributes:
            assert attribute in ATTRIBUTES, f"{name} {attribute}"
            if attribute == "href":
                assert re.match(r"https?://|mailto:", value), value


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_text_makes_nothing_but_harmless_elements(page: Visit, text: str) -> None:
    assert_harmless(page.render(text, INVENTORY))
    assert page.render(text, IN_FORMULAS) == []


HOSTILE_PIECES = [
    *(
        "<script>",
        "</script>",
        "<img src=x onerror=alert(1)>",
        "<",
        ">",
        '"',
        "'",
        "`",
        "```",
        "~~~",
        "\n",
        "\n\n",
        " ",
    ),
    *(
        "[",
        "]",
        "](",
        ")",
        "!",
        "javascript:alert(1)",
        "data:text/html,x",
        "https://e.example",
        "//e.example",
        "&#106;",
    ),
    *(
        "&lt;",
        "*",
        "**",
        "_",
        "|",
        "|-|\n",
        "> ",
        "- ",
        "1. ",
        "# ",
        "$",
        "$$",
        "\\(",
        "\\)",
        "\\[",
        "\\]",
        "\\href{",
        "}",
    ),
    *(
        "{",
        "\\frac",
        "\\text{",
        "\\label{x}",
        "\\class{x}{",
        "\\style{a:b}{",
        "^",
        "&",
        "\u202e",
        "\u0000",
        "\ufffd",
        "\\",
        "<!--",
    ),
]


def test_no_mixture_of_hostile_pieces_makes_more(page: Visit) -> None:
    chance = random.Random(12)
    texts = ["".join(chance.choices(HOSTILE_PIECES, k=chance.randint(1, 40))) for _ in range(1500)]
    script = f"""async ([texts]) => {{
      const {{ render }} = await import('/markdown.js');
      return texts.map((text) => {{
        const box = document.createElement('div');
        box.append(render(text));
        return [{INVENTORY}, {IN_FORMULAS}];
      }});
    }}"""
    shown = page.page.evaluate(script, [texts])
    for inventory, in_formulas in shown:
        assert_harmless(inventory)
        assert in_formulas == []
    seen = {name for inventory, _ in shown for name, _ in inventory}
    assert {"a", "code", "table", "li", "blockquote", "h3", "strong"} <= seen, "the pieces do make Markdown"


def test_the_check_of_hostile_texts_sees_what_it_should(page: Visit) -> None:
    # The negative control, made by hand: with an image and a name in the box, the inventory tells both.
    spoiled = f"(box.append(new Image()), box.firstChild.setAttribute('id', 'question'), {INVENTORY})"
    found = page.render("a", spoiled)
    assert "img" in {name for name, _ in found}
    assert "id" in {attribute for _, attributes in found for attribute, _ in attributes}


def test_markdown_becomes_what_it_means(page: Visit) -> None:
    assert page.render("# A *b*\n\ntext **bold** ~~no~~ `a<b` &amp; 1 &lt; 2") == (
        '<h3 dir="auto">A <em>b</em></h3>'
        '<p dir="auto">text <strong>bold</strong> <del>no</del> <code>a&lt;b</code> &amp; 1 &lt; 2</p>'
    )
    assert page.render("3. a\n4. b\n   - c") == (
        '<ol start="3" dir="auto"><li><span dir="auto">a</span></li><li><span dir="auto">b</span>'
        '<ul dir="auto"><li><span dir="auto">c</span></li></ul></li></ol>'
    )
    link = page.render(
        "[a](https://e.example/x) https://f.example", "[...box.querySelectorAll('a')].map((a) => a.rel + a.href)"
    )
    assert link == ["noopener noreferrer nofollowhttps://e.example/x", "noopener noreferrer nofollowhttps://f.example/"]
    assert page.render("| a | b |\n|-|-:|\n| 1 | x<br>y |", "box.querySelectorAll('td.to-right br').length") == 1
    assert page.render("![a cat](https://e.example/c.png)", "box.querySelector('a').textContent") == "🖼 a cat"


def test_formulas_become_mathml(page: Visit) -> None:
    text = r"$x^2$, \(a_1\), \[\frac12\] and $$\sqrt{2}$$" + "\n\n\\[\na\n- b\n\\]\n\n\\begin{align}a&=b\\end{align}"
    assert page.render(text, "box.querySelectorAll('math').length") == 6
    assert page.render(text, "box.querySelectorAll('.display > math').length") == 4
    assert page.render(text, "box.querySelectorAll('li').length") == 0, "a minus in a formula is no list"
    assert page.render(r"$\frac{a}{b}$", "box.querySelector('annotation, math').textContent.length") > 0


@pytest.mark.parametrize("text", ["from $5 to $10", "$ 5 and 6 $", "`$x$`", "a $x", r"\$x\$", "```\n$x$\n```"])
def test_a_dollar_is_not_always_a_formula(page: Visit, text: str) -> None:
    assert page.render(text, "box.querySelectorAll('math').length") == 0
    assert page.render(text, "box.querySelectorAll('.tex').length") == 0


@pytest.mark.parametrize(
    "tex",
    [
        r"\frac{1}{",
        r"\unknowncommand{x}",
        r"\def\a#1{#1#1#1#1}\a{\a{\a{\a{\a{\a{\a{\a{x}}}}}}}}",
        r"\newcommand{\x}{\x\x}\x",
        "{" * 3000 + "x" + "}" * 3000,
        "x" * 6000,
    ],
)
def test_a_formula_that_cannot_be_read_is_shown_as_it_was_written(page: Visit, tex: str) -> None:
    assert page.render(f"$${tex}$$", "box.textContent").replace("$", "").strip() == tex
    assert page.render(f"$${tex}$$", "box.querySelectorAll('math').length") == 0


def test_an_unclosed_fence_is_code_to_the_end(page: Visit) -> None:
    assert page.render("a\n```python\nx = 1\n\n# not a heading", "box.querySelector('pre').textContent") == (
        "x = 1\n\n# not a heading"
    )


def test_characters_that_turn_the_direction_are_marks(page: Visit) -> None:
    trojan = "if access != \u202e\u2066user\u2069\u2066:"
    assert page.render(f"```\n{trojan}\n```", "box.querySelector('pre').textContent") == (
        "if access != ⟨U+202E⟩⟨U+2066⟩user⟨U+2069⟩⟨U+2066⟩:"
    )
    assert page.render("a \u202etxt.exe", "box.textContent") == "a ⟨U+202E⟩txt.exe"
    assert page.render("\u2067שלום\u2069", "box.textContent") == "\u2067שלום\u2069", "what Hebrew needs is left"


PIECES = [
    *(
        "# a\n",
        "\n",
        "text *x*",
        " and",
        "- i\n",
        "- j\n\n",
        "  k\n",
        "1. n\n",
        "```py\n",
        "c\n",
        "```\n",
        "> q\n",
        "***\n",
    ),
    *("| a | b |\n", "|-|-|\n", "| 1 | 2 |\n", "$$\n", "x^2\n", "$$\n\n", "\\[ y \\]\n"),
    *("\r\n", "    four\n", "<b>\n", "\\", "`", "**", "$z$", "\n\n"),
]
GROWING = """async ([texts]) => {
  const { MarkdownView, render } = await import('/markdown.js');
  return texts.map((pieces) => {
    const grown = document.createElement('div'), whole = document.createElement('div');
    const view = new MarkdownView(grown);
    let text = '';
    for (const piece of pieces) view.write(text += piece);
    whole.append(render(text));
    return [grown.innerHTML, whole.innerHTML, view.finished.length];
  });
}"""


def test_a_text_that_grows_ends_as_the_whole_text(page: Visit) -> None:
    chance = random.Random(11)
    texts = [[chance.choice(PIECES) for _ in range(chance.randint(1, 30))] for _ in range(400)]
    shown = page.page.evaluate(GROWING, [texts])
    for pieces, (grown, whole, _) in zip(texts, shown, strict=True):
        assert grown == whole, "".join(pieces)
    num_in_parts = sum(num_finished > 0 for _, _, num_finished in shown)
    assert num_in_parts > len(texts) / 2, "most were not read again from the beginning"


def test_an_address_at_the_end_makes_links_of_what_stands_before(page: Visit) -> None:
    grow = """async (whole) => {
      const { MarkdownView } = await import('/markdown.js');
      const view = new MarkdownView(document.createElement('div'));
      for (let end = 1; end <= whole.length; end += 1) view.write(whole.slice(0, end));
      const before = view.box.querySelectorAll('a').length;
      view.finish(whole);
      return [before, [...view.box.querySelectorAll('a')].map((link) => link.href)];
    }"""
    text = "[a]\n\nsee [b] and [c]\n\n[a]: https://e.example\n[b]: javascript:1\n[a]: https://f.example\n"
    assert page.page.evaluate(grow, text) == [0, ["https://e.example/"]]


BIG = {
    "quotes": ">" * 20_000 + "x",
    "bullets": "- " * 10_000 + "x",
    "brackets": "[" * 100_000,
    "emphasis": "*a **b _c " * 10_000,
    "one paragraph": "word " * 200_000,
    "backticks": "`a" * 50_000,
    "formulas": "$a" * 50_000,
    "parentheses": "\\(a" * 30_000,
    "many blocks": "para\n\n" * 5_000,
    "an open fence": "```\n" + "line\n" * 100_000,
    "combining": "a" + "\u0301" * 5_000,
}


@pytest.mark.parametrize("name", BIG)
def test_a_huge_or_deep_text_is_shown_whole(page: Visit, name: str) -> None:
    shown = page.render(BIG[name], "box.textContent.replace(/Copy$/, '').replace(/[^\\w]/g, '').length")
    expected = re.sub(r"[^A-Za-z0-9_]", "", BIG[name].replace("_c", "c") if name == "emphasis" else BIG[name])
    assert shown >= len(expected) * 0.99
    assert page.page.evaluate("1 + 1") == 2


def test_a_huge_answer_is_written_to_its_end(visit: Visit, scripted: ScriptedServer) -> None:
    parts = [f"{number} " + "word " * 400 + ("\n\n" if number % 3 else "") for number in range(300)]
    scripted.scripts.append(Script(parts=parts, pause_s=0.002))
    answer = visit.ask_and_wait("Write a book.")
    assert answer.locator(".answer p").count() == 200
    assert "299 word" in answer.locator(".answer p").last.text_content()


def test_an_answer_draws_inside_its_own_turn(visit: Visit, scripted: ScriptedServer) -> None:
    overlay = r"$\smash{\raisebox{4em}{\rule{20em}{20em}}}$"
    scripted.scripts += [Script(parts=["What was said before."]), Script(parts=[overlay])]
    visit.ask_and_wait("First?")
    visit.ask_and_wait("Paint over it.")
    before = visit.page.locator(".answer p").first.bounding_box()
    covered = """([x, y]) => document.elementFromPoint(x, y).closest('math') !== null"""
    point = [before["x"] + 20, before["y"] + before["height"] / 2]
    assert not visit.page.evaluate(covered, point)
    # The negative control: without the clipping it is painted over.
    visit.page.evaluate("for (const turn of document.querySelectorAll('.turn')) turn.style.contain = 'none'")
    assert visit.page.evaluate(covered, point)


def test_no_file_of_the_page_reads_a_string_as_html_or_as_code() -> None:
    directory = Path(crosschip.serve.page.__file__).parent
    files = list(directory.glob("*.js"))
    assert len(files) > 10
    for file in files:
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser",
            file.read_text("utf-8"),
        )
    html = (directory / "index.html").read_text("utf-8")
    assert not re.search(r"https?://|\son\w+=|style=|<script>", html)


def test_the_policy_refuses_strings_as_html(visit: Visit) -> None:
    policy = visit.response.headers["content-security-policy"]
    assert "require-trusted-types-for 'script'" in policy
    tried = visit.page.evaluate(
        "() => { try { document.body.innerHTML = '<b>x</b>'; return 'set'; } catch (e) { return e.name; } }"
    )
    assert tried == "TypeError"
    assert any("TrustedHTML" in complaint or "Trusted" in complaint for complaint in visit.complaints)
    visit.complaints.clear()
