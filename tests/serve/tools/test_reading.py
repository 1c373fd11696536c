"""Calls are read from text however it is cut; what only looks like one stays text, to the letter."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosschip.serve.tools import FORMATS, ReadText, call_reader

NAMES = frozenset({"get_weather", "get_time"})
ARGUMENTS = '{"city": "Köln", "n": [1, {"a": null}]}'
MARKED = ["hermes", "deepseek-v3", "deepseek-v3.1"]


def written(name: str, calls: list[tuple[str, str]]) -> str:
    form = FORMATS[name]
    each = [
        form.open + form.before_name + tool + form.before_arguments + arguments + form.after_arguments + form.close
        for tool, arguments in calls
    ]
    return form.begin + form.between.join(each) + form.end


def read(name: str, pieces: list[str], only_one: bool = False) -> ReadText:
    reader = call_reader(FORMATS[name], NAMES, only_one)
    whole = ReadText()
    for part in [*(reader.push(piece) for piece in pieces), reader.finish()]:
        whole.content += part.content
        whole.calls += part.calls
    return whole


def cut(text: str, places: list[int]) -> list[str]:
    marks = sorted({place % (len(text) + 1) for place in places} | {0, len(text)})
    return [text[a:b] for a, b in itertools.pairwise(marks)]


places = st.lists(st.integers(0, 400), max_size=12)


@pytest.mark.parametrize("name", FORMATS)
@given(places=places, number=st.integers(1, 3))
def test_calls_come_out_whole_however_they_are_cut(name: str, places: list[int], number: int) -> None:
    calls = [("get_weather", ARGUMENTS), ("get_time", "{}"), ("get_weather", '{"city": "x"}')][:number]
    found = read(name, cut(written(name, calls), places))
    assert [(call.name, call.arguments) for call in found.calls] == calls
    assert found.content == ""


@pytest.mark.parametrize("name", MARKED)
@given(places=places)
def test_text_beside_calls_is_kept(name: str, places: list[int]) -> None:
    text = f"I look.\n\n{written(name, [('get_time', '{}')])}\n\nThere. "
    found = read(name, cut(text, places))
    assert len(found.calls) == 1
    assert found.content == "I look.There. "


# Parts that marks, calls and JSON are made of, in any order: most are no call.
def parts(name: str) -> list[str]:
    form = FORMATS[name]
    made = [form.open, form.close, form.begin, form.end, *form.marks, form.before_name, form.before_arguments]
    return [each for each in made if each] + ["{", "}", '"', "\n", " ", "x", '{"name": "a"', form.after_arguments]


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data(), places=places)
def test_nothing_is_lost_and_nothing_depends_on_the_cuts(name: str, data: st.DataObject, places: list[int]) -> None:
    text = "".join(data.draw(st.lists(st.sampled_from(parts(name)), max_size=10)))
    whole, pieces = read(name, [text]), read(name, cut(text, places))
    assert (whole.content, whole.calls) == (pieces.content, pieces.calls)
    if not whole.calls:
        assert whole.content == text


@pytest.mark.parametrize(
    "body",
    [
        '{"name": "get_weather", "arguments": {"city": }',
        '{"name": "get_weather", "arguments": {"city": NaN}}',
        '{"name": "get_weather", "arguments": {"city": 1e999}}',
        '{"name": "get_weather", "arguments": "Paris"}',
        '{"name": "get_weather", "arguments": [1]}',
        '{"name": 7, "arguments": {}}',
        '{"name": "two words", "arguments": {}}',
        '["get_weather"]',
        '{"name": "get_weather", "arguments": {}} and more',
        "[" * 100_000,
        "1" * 5000,
        "",
    ],
)
def test_what_is_no_valid_call_stays_text(body: str) -> None:
    text = f"a <tool_call>\n{body}\n</tool_call> b"
    assert read("hermes", [text]) == ReadText(text)


def test_after_a_broken_call_the_next_one_is_found() -> None:
    good = written("hermes", [("get_time", "{}")])
    for broken in ("<tool_call>{bad</tool_call>\n", "<tool_call>{bad\n", "<tool_call>{} "):
        found = read("hermes", [broken + good])
        assert [call.name for call in found.calls] == ["get_time"]
        assert found.content == broken.rstrip()


def test_marks_inside_of_an_argument_are_the_arguments() -> None:
    for inner in ("</tool_call>", "<tool_call>", "</tool_call><tool_call>"):
        arguments = json.dumps({"text": f"a {inner} b"})
        found = read("hermes", [written("hermes", [("get_time", arguments)])])
        assert [call.arguments for call in found.calls] == [arguments]


def test_a_call_without_its_last_mark_counts_when_its_json_is_whole() -> None:
    whole = written("hermes", [("get_time", "{}")]).removesuffix("</tool_call>")
    assert len(read("hermes", [whole]).calls) == 1
    cut_off = whole[:-4]
    assert read("hermes", [cut_off]) == ReadText(cut_off)


@pytest.mark.parametrize("name", FORMATS)
def test_one_call_is_enough_where_one_is_wanted(name: str) -> None:
    reader = call_reader(FORMATS[name], NAMES, only_one=True)
    text = written(name, [("get_time", "{}"), ("get_weather", ARGUMENTS)])
    calls = [call for character in text for call in reader.push(character).calls]
    assert [call.name for call in calls] == ["get_time"]
    assert reader.is_done
    assert reader.push("more") == reader.finish() == ReadText()


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "Ada", "parameters": {"age": 36}}',
        '{"answer": 42}',
        '{"name": "get_time", "parameters": {}',
        'So: {"name": "get_time", "parameters": {}}',
        "<|python_tag|>print(1)",
        " {",
        "[1]",
        "",
    ],
)
def test_json_that_calls_no_tool_is_an_answer(text: str) -> None:
    """Llama's calls have no marks: only the name tells."""
    assert read("llama-3.1", [text]) == ReadText(text)
    assert read("llama-3.1", list(text)) == ReadText(text)


def test_llamas_variants_are_calls() -> None:
    for text in (
        '<|python_tag|>{"name": "get_time", "parameters": {}}',
        '{"type": "function", "name": "get_time", "parameters": {}}',
        '\n{"name": "get_time", "arguments": {}} ; ',
    ):
        for pieces in ([text], list(text)):
            found = read("llama-3.1", pieces)
            assert [(call.name, call.arguments) for call in found.calls] == [("get_time", "{}")]
            assert found.content == ""


def test_half_a_surrogate_pair_stays_an_escape() -> None:
    found = read("hermes", [written("hermes", [("get_time", '{"a": "\\ud800"}')])])
    assert json.loads(found.calls[0].arguments) == {"a": "\ud800"}
    found.calls[0].arguments.encode()
