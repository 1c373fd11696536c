"""Routing, canary, prefixes and events as policy: no network."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosschip.certificate import Status
from crosschip.serve.gateway import events as events_of_streams
from crosschip.serve.gateway.canary import Split
from crosschip.serve.gateway.events import EventSplitter, StreamReader
from crosschip.serve.gateway.fleet import Ask, Fleet
from crosschip.serve.gateway.prefixes import PrefixMemory, prefix_digests, prompt_text
from crosschip.serve.gateway.settings import GatewaySettings

UNCERTIFIED, CERTIFIED = Status("UNCERTIFIED", "no"), Status("CERTIFIED")


def fleet_of(*tables: dict[str, Any], certified: tuple[str, ...] = (), required: bool = False, **more: Any) -> Fleet:
    engines = [{"url": "http://x", "model": "m"} | each for each in tables]
    settings = GatewaySettings.model_validate({"engines": engines} | more)
    known = {e.name: CERTIFIED if e.name in certified else UNCERTIFIED for e in settings.engines}
    fleet = Fleet(settings, known, required)
    for engine in fleet.engines:
        fleet.mark_healthy(engine)
    return fleet


def ask_for(text: str, model: str = "m") -> Ask:
    return Ask.of(model, {"prompt": text})


def names(fleet: Fleet, asks: list[Ask]) -> list[str | None]:
    chosen = [fleet.choose(each) for each in asks]
    return [engine.name if engine else None for engine in chosen]


def test_the_least_loaded_takes_it_by_weight() -> None:
    fleet = fleet_of({"name": "a"}, {"name": "b", "weight": 3.0})
    counts = Counter(names(fleet, [ask_for(f"question {number}") for number in range(40)]))
    assert counts == {"a": 10, "b": 30}


def test_the_engine_that_knows_the_beginning_takes_it_until_it_is_too_full() -> None:
    fleet = fleet_of({"name": "a"}, {"name": "b"}, forwarding={"affinity_slack": 2})
    beginning = "You are kind. " * 40
    first = fleet.choose(ask_for(beginning + "one"))
    assert first is not None
    other = next(engine for engine in fleet.engines if engine is not first)
    assert names(fleet, [ask_for(beginning + "two"), ask_for(beginning + "three")]) == [first.name] * 2
    assert names(fleet, [ask_for(beginning + "four")]) == [other.name], "3 more than the least loaded is too many"
    for engine in fleet.engines:
        engine.in_flight = 0
    assert names(fleet, [ask_for("a different beginning " * 30)]) == ["a"], "nobody knows it: the least loaded"


def test_an_engine_that_is_down_drained_full_or_tried_gets_nothing() -> None:
    fleet = fleet_of({"name": "a", "max_in_flight": 1}, {"name": "b"}, {"name": "c"}, {"name": "d"}, {"name": "e"})
    fleet.engines[0].in_flight = 1
    fleet.mark_failed(fleet.engines[1], "dead", allowed=1)
    fleet.engines[2].draining = True
    ask = ask_for("x")
    ask.tried.add("d")
    assert names(fleet, [ask] * 3) == ["e"] * 3
    fleet.mark_failed(fleet.engines[4], "once", allowed=2)
    assert names(fleet, [ask]) == ["e"], "one failure of two allowed"
    fleet.mark_failed(fleet.engines[4], "twice", allowed=2)
    assert names(fleet, [ask]) == [None]


def test_a_required_certificate_keeps_others_out() -> None:
    fleet = fleet_of({"name": "a"}, {"name": "b"}, certified=("b",), required=True)
    assert names(fleet, [ask_for(str(number)) for number in range(5)]) == ["b"] * 5
    assert set(names(fleet_of({"name": "a"}, {"name": "b"}), [ask_for("1"), ask_for("2")])) == {"a", "b"}


def test_a_canary_gets_its_share_exactly_and_keeps_its_conversations() -> None:
    fleet = fleet_of(
        {"name": "a", "max_in_flight": 1000},
        {"name": "b", "group": "canary", "max_in_flight": 1000},
        splits=[{"model": "m", "shares": {"main": 95, "canary": 5}}],
    )

    def turn(number: int, later: bool) -> Ask:
        messages = [{"role": "user", "content": f"question {number}"}]
        if later:
            messages += [{"role": "assistant", "content": "answer"}, {"role": "user", "content": "and?"}]
        return Ask.of("m", {"messages": messages})

    first = names(fleet, [turn(number, later=False) for number in range(200)])
    assert Counter(first) == {"a": 190, "b": 10}
    assert names(fleet, [turn(number, later=True) for number in range(200)]) == first


def test_a_canary_that_is_down_leaves_its_share_to_the_others() -> None:
    split = Split({"main": 1, "canary": 1, "off": 0})
    assert {split.choose(b"", False, {"main"}) for _ in range(10)} == {"main"}
    counts = Counter(split.choose(b"", False, {"main", "canary", "off"}) for _ in range(10))
    assert counts == {"main": 5, "canary": 5}
    assert split.choose(b"", False, {"off"}) is None


def test_a_group_without_a_share_is_nobody_to_wait_for() -> None:
    tables = {"name": "a"}, {"name": "b", "group": "off"}
    fleet = fleet_of(*tables, splits=[{"model": "m", "shares": {"main": 1, "off": 0}}])
    ask = ask_for("x")
    assert [engine.name for engine in fleet.usable(ask)] == ["a"]
    ask.tried.add("a")
    assert fleet.usable(ask) == []
    assert fleet.is_usable(fleet.engines[1]), "it is up all the same"
    assert len(fleet_of(*tables).usable(ask)) == 1, "without a split all groups are one"


@given(st.lists(st.integers(0, 20), min_size=1, max_size=3).filter(any), st.integers(1, 300))
def test_shares_are_off_by_less_than_the_number_of_groups(shares: list[int], requests: int) -> None:
    split = Split({str(group): share for group, share in enumerate(shares)})
    counts = Counter(split.choose(b"", False, set(map(str, range(len(shares))))) for _ in range(requests))
    for group, share in enumerate(shares):
        assert abs(counts[str(group)] - requests * share / sum(shares)) < len(shares)


def test_prompts_of_every_form_have_a_beginning() -> None:
    bodies: list[dict[str, Any]] = [
        {"prompt": "x"},
        {"prompt": [1, 2]},
        {"prompt": [[1, 2], [3]]},
        {"prompt": ["x", "y"]},
        {"prompt": []},
        {"prompt": {"a": 1}},
        {"prompt": None},
        {"messages": [7, None, {"role": "user"}]},
        {"messages": "x"},
        {},
    ]
    for body in bodies:
        assert prefix_digests(prompt_text(body))
    assert prompt_text({"prompt": [1, 2]}) != prompt_text({"prompt": [1, 3]})


@given(st.text(max_size=2000), st.text(max_size=2000))
def test_digests_agree_as_far_as_the_texts_do(first: str, second: str) -> None:
    if len(first) < 256 or len(second) < 256:
        return
    same = sum(a == b for a, b in zip(prefix_digests(first), prefix_digests(second), strict=False))
    common = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
    assert same == common // 256


def test_the_memory_of_prefixes_is_bounded_and_forgets_the_dead() -> None:
    memory = PrefixMemory(most=10)
    for number in range(50):
        memory.remember(prefix_digests(f"{number}"), "a" if number % 2 else "b")
    assert len(memory) == 10
    memory.forget_engine("a")
    assert len(memory) == 5
    assert memory.longest(prefix_digests("49")) is None
    assert memory.longest(prefix_digests("48")) == "b"


@given(st.lists(st.sampled_from(["a", "äöü", "x\ny", "{}"]), max_size=8), st.lists(st.integers(1, 7), min_size=1))
def test_events_are_cut_at_their_ends_however_bytes_arrive(texts: list[str], sizes: list[int]) -> None:
    events = [
        f"data: {json.dumps({'text': text})}{end}".encode()
        for text, end in zip(texts, ["\n\n", "\r\n\r\n"] * 4, strict=False)
    ]
    stream, splitter, found, place = b"".join(events), EventSplitter(), [], 0
    while place < len(stream):
        size = sizes[place % len(sizes)]
        found += splitter.push(stream[place : place + size])
        place += size
    # A CRLF may be cut within, which leaves its last byte to the next event: joined they are the same.
    assert b"".join(found) == stream[: len(stream) - splitter.held]
    assert splitter.held <= 1
    assert len(found) == len(events)


class Searching:
    """A pattern that counts the bytes it is asked to look at."""

    def __init__(self, pattern: re.Pattern[bytes]) -> None:
        self.pattern, self.num_bytes = pattern, 0

    def finditer(self, held: bytes | bytearray, begin: int = 0) -> Iterator[re.Match[bytes]]:
        self.num_bytes += len(held) - begin
        return self.pattern.finditer(held, begin)


def test_a_long_event_is_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    searching = Searching(events_of_streams._END)
    monkeypatch.setattr(events_of_streams, "_END", searching)
    event, splitter = b"data: " + b"x" * 100_000 + b"\r\n\r\n", EventSplitter()
    parts = [event[place : place + 100] for place in range(0, len(event), 100)]
    assert [found for part in parts for found in splitter.push(part)] == [event]
    assert searching.num_bytes <= len(event) + 3 * len(parts)


def test_a_stream_tells_tokens_ends_and_errors() -> None:
    reader = StreamReader()
    reader.read(b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n\n')
    assert (reader.parts, reader.finished) == (0, False)
    reader.read(b": ping\n\n")
    reader.read(b'data: {"choices": [{"delta": {"reasoning_content": "hm"}}], "crosschip": {"weights_version": 3}}\n\n')
    assert (reader.parts, reader.weights_version) == (1, "3")
    reader.read(b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": {"completion_tokens": 7}}\n\n')
    assert (reader.finished, reader.usage) == (True, {"completion_tokens": 7})
    reader.read(b"data: [DONE]\n\n")
    assert reader.done
    for hostile in (b"data: {\n\n", b"data: 7\n\n", b'data: {"choices": 7}\n\n', b"data: " + b"[" * 100_000 + b"\n\n"):
        assert StreamReader().read(hostile) is None or hostile.endswith(b"7}\n\n")
    broken = StreamReader()
    broken.read(b'data: {"error": {"message": "dead"}}\n\n')
    assert broken.error == {"message": "dead"}


def test_an_event_without_an_end_is_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crosschip.serve.gateway.events.LONGEST_EVENT", 100)
    splitter = EventSplitter()
    splitter.push(b"x" * 100)
    with pytest.raises(ValueError, match="100 bytes"):
        splitter.push(b"x")
