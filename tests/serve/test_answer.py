"""Text comes out whole and in time: characters, stop strings and reasoning, however the tokens cut them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crosschip.data import ChatTokenizer, split_reasoning
from crosschip.serve.answer import AnswerWriter, Detokenizer, ReasoningSplitter, StopStrings, starts_in_reasoning
from crosschip.serve.tokenizer import ServingTokenizer, load_serving_tokenizer


@pytest.fixture(scope="session")
def serving_tokenizer(tmp_path_factory: pytest.TempPathFactory, tokenizer: ChatTokenizer) -> ServingTokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(directory)
    loaded = load_serving_tokenizer(directory)
    assert loaded is not None
    return loaded


def cut(text: str, places: list[int]) -> list[str]:
    """The text in pieces, cut at the places (modulo its length)."""
    marks = sorted({place % (len(text) + 1) for place in places} | {0, len(text)})
    return [text[a:b] for a, b in itertools.pairwise(marks)]


@settings(deadline=None)
@given(text=st.text(max_size=60))
def test_streamed_text_is_the_decoded_text_and_never_a_part_of_a_character(
    serving_tokenizer: ServingTokenizer, text: str
) -> None:
    detokenizer = Detokenizer(serving_tokenizer)
    pieces = [detokenizer.push(id_) for id_ in serving_tokenizer.encode(text).ids]
    assert "".join(pieces) == text
    assert "�" in text or not any("�" in piece for piece in pieces)


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 399), max_size=40))
def test_any_ids_decode_as_the_tokenizer_decodes_them(serving_tokenizer: ServingTokenizer, ids: list[int]) -> None:
    detokenizer = Detokenizer(serving_tokenizer)
    streamed = "".join(detokenizer.push(id_) for id_ in ids)
    # Only bytes of a last character that did not come to its end are missing.
    whole = serving_tokenizer.decode(ids)
    assert whole.startswith(streamed)
    assert set(whole[len(streamed) :]) <= {"�"}


@settings(deadline=None)
@given(text=st.text(alphabet="aß 好🙂x", max_size=30))
def test_a_vocabulary_that_is_not_byte_level_streams_the_same_text(text: str) -> None:
    from tokenizers import Tokenizer, decoders, models, normalizers

    pieces = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁": 256, "a": 257, "▁a": 258, "x": 259}
    backend = Tokenizer(models.BPE(vocab=pieces, merges=[("▁", "a")], byte_fallback=True, unk_token=None))
    backend.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps)
    tokenizer = ServingTokenizer(backend, None, None)
    assert not tokenizer.byte_level
    detokenizer = Detokenizer(tokenizer)
    streamed = [detokenizer.push(id_) for id_ in tokenizer.encode(text).ids]
    assert "".join(streamed) == text
    assert not any("�" in piece for piece in streamed)


@given(
    text=st.text(alphabet="abc", max_size=40),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
    places=st.lists(st.integers(0, 100), max_size=10),
)
def test_stop_strings_end_the_text_where_they_first_come(text: str, stops: list[str], places: list[int]) -> None:
    stages = StopStrings(stops)
    given_out = ""
    for piece in cut(text, places):
        given_out += stages.push(piece)
        assert not any(stop in given_out for stop in stops), "no stop string leaks, not even later"
    given_out += stages.flush()
    # The string that is complete first ends the text; pieces may complete two, then the one that begins first does.
    if any(stop in text for stop in stops):
        assert stages.hit is not None
        assert text.startswith(given_out + stages.hit)
        assert not any(stop in given_out for stop in stops)
    else:
        assert given_out == text


def test_a_beginning_of_a_stop_string_is_kept_back() -> None:
    stages = StopStrings(["END"])
    assert [stages.push("the E"), stages.push("N"), stages.push("T. E"), stages.push("ND more"), stages.flush()] == [
        "the ",
        "",
        "ENT. ",
        "",
        "",
    ]


@given(
    reasoning=st.one_of(st.none(), st.text(alphabet="ab <>/\n", max_size=20)),
    answer=st.text(alphabet="ab <>/\n", max_size=20),
    places=st.lists(st.integers(0, 100), max_size=10),
    opened_by_prompt=st.booleans(),
)
def test_reasoning_is_parted_however_it_is_cut(
    reasoning: str | None, answer: str, places: list[int], opened_by_prompt: bool
) -> None:
    opened_by_prompt = opened_by_prompt and reasoning is not None
    text = answer if reasoning is None else f"{'' if opened_by_prompt else '<think>'}{reasoning}</think>{answer}"
    splitter = ReasoningSplitter(opened_by_prompt)
    deltas = [splitter.push(piece) for piece in cut(text, places)] + [splitter.flush()]
    thought = "".join(delta.reasoning for delta in deltas)
    said = "".join(delta.content for delta in deltas)
    if reasoning is None:
        assert (thought, said) == ("", text)
    else:
        assert (thought, said) == (reasoning.strip("\n"), answer.lstrip("\n"))


def test_the_split_agrees_with_the_one_used_in_training() -> None:
    for text in ("<think>a b</think>c", "no reasoning", "<think>never closed", "a < b"):
        splitter = ReasoningSplitter(in_reasoning=False)
        deltas = [splitter.push(character) for character in text] + [splitter.flush()]
        reasoning, answer, _ = split_reasoning(text)
        assert "".join(delta.content for delta in deltas) == answer, text
        assert "".join(delta.reasoning for delta in deltas) == (reasoning or ""), text


def test_a_writer_counts_the_tokens_of_the_reasoning(serving_tokenizer: ServingTokenizer) -> None:
    thought = serving_tokenizer.encode("<think>one two</think>").ids
    said = serving_tokenizer.encode("three").ids
    writer = AnswerWriter(serving_tokenizer, [], splits_reasoning=True)
    content = "".join(writer.push(id_).content for id_ in thought + said) + writer.finish().content
    assert content == "three"
    assert writer.num_reasoning_tokens == len(thought)


def test_a_prompt_that_opens_the_reasoning_is_recognised() -> None:
    assert starts_in_reasoning("<|assistant|><think>\n")
    assert not starts_in_reasoning("<|assistant|>")
    assert not starts_in_reasoning("<|assistant|><think></think>")
