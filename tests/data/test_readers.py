import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosschip.data import Message, Row, open_source
from crosschip.data.readers import _MAX_PIECE_CHARACTERS, _lines, _read_text
from crosschip.errors import DataError
from crosschip.recipe import DataSettings

WriteJsonl = Callable[..., Path]
QUESTION = {"question": "How many?", "answer": "Half: <<48/2=24>>24.\n#### 24"}


def read_all(path: Path, **settings: object) -> list[Row]:
    """Both splits of a data set."""
    source = open_source(DataSettings(path=str(path), validation_fraction=1e-9, **settings), seed=0)
    return list(source.rows("train"))


def test_questions_and_answers_become_reasoned_conversations(write_jsonl: WriteJsonl) -> None:
    rows = read_all(write_jsonl([QUESTION]), reasoning_separator="####", remove_pattern="<<[^>]*>>")
    assert rows == [Row(messages=(Message("user", "How many?"), Message("assistant", "24", "Half: 24.")))]


def test_what_follows_a_question_is_asked_with_it_and_moves_no_row_to_the_other_split(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl([{"question": f"What is {n}?", "answer": n} for n in range(40)])
    plain = DataSettings(path=str(path), validation_fraction=0.5)
    asked = plain.model_copy(update={"question_suffix": " In a box."})
    sources = [open_source(settings, seed=0) for settings in (plain, asked)]
    for split in ("train", "validation"):
        questions = [[row.as_messages()[0].content for row in source.rows(split)] for source in sources]
        assert questions[1] == [f"{question} In a box." for question in questions[0]]
    assert sources[0].fingerprint != sources[1].fingerprint


def test_messages_and_texts_are_read_by_their_fields(write_jsonl: WriteJsonl) -> None:
    messages = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho", "reasoning_content": "Hm"},
    ]
    path = write_jsonl([{"chat": messages}, {"body": "Long ago"}, {"question": "Six?", "answer": 6}])
    rows = read_all(path, messages_field="chat", text_field="body")
    assert rows[0].as_messages()[1:] == (Message("user", "Hi"), Message("assistant", "Ho", "Hm"))
    assert rows[1] == Row(text="Long ago")
    assert rows[2].as_messages()[1] == Message("assistant", "6")


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}')
    assert read_all(path) == [Row(text="a"), Row(text="b")]


BAD_LINES = {
    b'{"text": "a"': "not JSON",
    b'"just a string"': "object with fields, not a str",
    b'{"txt": "a"}': r"no field 'text'(?s:.)*\['txt'\](?s:.)*data\.text_field",
    b'{"text": 5}': "is a int, not text",
    b'{"question": " ", "answer": "b"}': "the field 'question' is empty",
    b'{"text": "caf\xe9"}': "not UTF-8: byte 0xe9 at position 13(?s:.)*iconv -f LATIN1",
    b'{"text": "\\ud800"}': "surrogate",
    b'{"messages": []}': "no list of messages",
    b'{"messages": [{"role": "user"}]}': "message 1 of 'messages' lacks role or content",
    b'{"messages": [{"role": "robot", "content": "x"}]}': "role 'robot'",
    b'{"question": "a"}': "not both of 'question' and 'answer'",
    b"[" * 100_000: "not JSON",
    b'{"text": ' + b"7" * 5_000 + b"}": "not JSON: Exceeds the limit",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_gives_file_line_and_remedy(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: .*{BAD_LINES[line]}"):
        read_all(path)


def test_an_answer_without_the_separator_is_bad(write_jsonl: WriteJsonl) -> None:
    with pytest.raises(DataError, match=r":1: the field 'answer' has no '####'"):
        read_all(write_jsonl([{"question": "a", "answer": "b"}]), reasoning_separator="####")


@pytest.mark.parametrize(
    "settings", [{"reasoning_separator": "####", "remove_pattern": r"\d+$"}, {"remove_pattern": ".*"}]
)
def test_an_answer_of_which_nothing_is_left_is_bad(write_jsonl: WriteJsonl, settings: dict[str, str]) -> None:
    path = write_jsonl([{"question": "How many?", "answer": "Half. #### 24"}])
    with pytest.raises(DataError, match=r"jsonl:1: nothing is left of the field 'answer'") as caught:
        read_all(path, **settings)
    assert "data.remove_pattern" in str(caught.value)


def test_bad_rows_are_skipped_up_to_the_allowed_number_and_told(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + b"broken\n" * 3 + b'{"text": "b"}\n')
    source = open_source(DataSettings(path=str(path), skip_bad_rows=3, validation_fraction=1e-9), 0)
    for _ in range(2):  # the count is of one pass
        assert len(list(source.rows("train"))) == 2
    assert source.notes == [f"3 bad rows were skipped, the first at {path}:2: {source.notes[0].partition(':2: ')[2]}"]
    with pytest.raises(DataError, match=r":4: not JSON.*bad row number 3, and data\.skip_bad_rows=2"):
        read_all(path, skip_bad_rows=2)


def test_empty_documents_are_left_out_and_told(write_jsonl: WriteJsonl) -> None:
    source = open_source(
        DataSettings(path=str(write_jsonl([{"text": ""}, {"text": " "}, {"text": "a"}])), validation_fraction=1e-9), 0
    )
    assert list(source.rows("train")) == [Row(text="a")]
    assert source.notes == ["2 empty documents were left out"]


def test_a_wrong_pattern_is_refused(write_jsonl: WriteJsonl) -> None:
    with pytest.raises(DataError, match=r"data\.remove_pattern='\(' is not a regular expression"):
        read_all(write_jsonl([QUESTION]), remove_pattern="(")


def test_parquet_holds_what_json_lines_hold(write_jsonl: WriteJsonl, tmp_path: Path) -> None:
    records = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}], "other": i}
        for i in range(3_000)
    ]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(records), path, row_group_size=700)
    assert read_all(path) == read_all(write_jsonl(records))


def test_faults_of_parquet_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["a", None]}), path)
    with pytest.raises(DataError, match=r"rows\.parquet:row 2: no field 'text'"):
        read_all(path)
    with pytest.raises(DataError, match=r"none of the columns .*'body'.*there are \['text'\]"):
        read_all(path, text_field="body")
    path.write_bytes(b"PAR1 is not enough")
    with pytest.raises(DataError, match=r"rows\.parquet cannot be read as Parquet"):
        read_all(path)


def test_a_text_of_parquet_that_is_not_utf_8_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    raw = pa.array([b"good", b"caf\xe9", b"better"], pa.binary())
    texts = pa.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2])
    pq.write_table(pa.table({"text": texts}), path)
    assert [row.text for row in read_all(path, skip_bad_rows=1)] == ["good", "better"]
    with pytest.raises(DataError, match=r"rows\.parquet:row 2: the field 'text' is not UTF-8: byte 0xe9 at position 3"):
        read_all(path)


def text_pieces(raw: bytes) -> list[str]:
    rows = list(_read_text(io.BytesIO(raw), "text.txt"))
    assert all(isinstance(row, Row) for row in rows)
    return [row.as_text() for row in rows if isinstance(row, Row)]


def test_text_is_cut_at_blank_lines_when_there_are_any() -> None:
    speech = "First Citizen:\n" + "We are accounted poor citizens.\n" * 20 + "\n"
    pieces = text_pieces(speech.encode() * 30)
    assert len(pieces) > 3
    assert all(piece.startswith("First Citizen:") and piece.endswith("citizens.") for piece in pieces)
    assert "".join(pieces).replace("\n", "") == (speech * 30).replace("\n", "")


def test_text_without_blank_lines_is_cut_at_line_ends() -> None:
    lines = [f"line {i} of a long poem" for i in range(2_000)]
    pieces = text_pieces("\n".join(lines).encode())
    assert len(pieces) > 5
    assert [line for piece in pieces for line in piece.split("\n")] == lines


@given(
    st.text(st.characters(codec="utf-8", exclude_characters="\n\r"), min_size=1, max_size=9), st.integers(8_000, 40_000)
)
def test_one_endless_line_is_read_in_pieces_without_loss(word: str, count: int) -> None:
    text = "x" + word * count + "x"
    pieces = text_pieces(text.encode())
    assert max(map(len, pieces)) <= _MAX_PIECE_CHARACTERS
    if word.strip():  # pieces of nothing but white space are left out
        assert "".join(pieces) == text


def test_long_lines_keep_their_number() -> None:
    raw = ("\u20ac" * 50_000 + "\n" + "b\n").encode()
    lines = list(_lines(io.BytesIO(raw)))
    assert b"".join(part for _, part in lines) == raw
    assert [number for number, _ in lines[:-1]] == [1] * (len(lines) - 1)
    assert lines[-1] == (2, b"b\n")


def test_wrong_encoding_in_text_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(b"one\ntwo\n" + b"caf\xe9\n")
    with pytest.raises(DataError, match=r"book\.txt:3: not UTF-8: byte 0xe9"):
        read_all(path)
    path.write_bytes("one\ntwo\n".encode("utf-16"))
    with pytest.raises(DataError, match=r"book\.txt:1: not UTF-8(?s:.)*UTF-16"):
        read_all(path)
    path.write_bytes(b"\xe9" * 200_000)
    with pytest.raises(DataError, match=r"book\.txt:1: not UTF-8"):
        read_all(path)


def test_gsm8k_is_read_whole(gsm8k_path: str) -> None:
    settings = DataSettings(path=gsm8k_path, reasoning_separator="####", remove_pattern="<<[^>]*>>")
    source = open_source(settings, 0)
    train, validation = list(source.rows("train")), list(source.rows("validation"))
    assert len(train) + len(validation) == 7_473
    with open(gsm8k_path, encoding="utf-8") as file:
        first = json.loads(file.readline())
    row = next(row for row in [*train, *validation] if row.as_messages()[0].content == first["question"])
    assert row.as_messages()[1] == Message(
        "assistant",
        "72",
        "Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips altogether in April and May.",
    )
    assert not any("<<" in row.as_text() or "####" in row.as_text() for row in train)


def test_shakespeare_is_cut_into_documents(shakespeare_path: str) -> None:
    source = open_source(DataSettings(path=shakespeare_path), 0)
    train, validation = list(source.rows("train")), list(source.rows("validation"))
    assert len(train) > 300
    assert len(validation) > 10
    total = sum(len(row.as_text()) for row in [*train, *validation])
    assert 0.99 * 1_115_394 < total <= 1_115_394
