import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosschip.data import ChatTokenizer, PackedStream, Row, Source, open_source, prepare_packed
from crosschip.errors import DataError, RunDirectoryError
from crosschip.recipe import DataSettings

SEQ_LEN = 48


@pytest.fixture(scope="module")
def stream(problems: Source, tokenizer: ChatTokenizer, tmp_path_factory: pytest.TempPathFactory) -> PackedStream:
    return prepare_packed(problems, tokenizer, tmp_path_factory.mktemp("data"), SEQ_LEN, 11, "train")


def test_labels_are_the_inputs_one_later(stream: PackedStream) -> None:
    batch = stream.batch(5, 3)
    assert batch.input_ids_BT.shape == batch.labels_BT.shape == (3, SEQ_LEN)
    assert batch.input_ids_BT.dtype == torch.int64
    assert torch.equal(batch.input_ids_BT[:, 1:], batch.labels_BT[:, :-1])


def test_an_epoch_covers_every_window_once_and_each_epoch_in_another_order(stream: PackedStream) -> None:
    count = stream.num_sequences
    tokens = np.asarray(stream._store.tokens, dtype=np.int64)
    windows = sorted(tuple(tokens[i * SEQ_LEN : (i + 1) * SEQ_LEN + 1]) for i in range(count))
    orders = []
    for epoch in range(3):
        batch = stream.batch(epoch * count, count)
        rows = torch.cat([batch.input_ids_BT, batch.labels_BT[:, -1:]], 1).tolist()
        assert sorted(map(tuple, rows)) == windows
        orders.append(rows)
    assert orders[0] != orders[1] != orders[2]
    assert stream.num_tokens == count * SEQ_LEN


def test_every_document_is_there_whole_in_another_order(
    problems: Source, tokenizer: ChatTokenizer, stream: PackedStream
) -> None:
    """The store, cut at its ends, is the data set; and not in the order it was read."""
    ends = [0, *stream._store.ends.tolist()]
    documents = [stream._store.tokens[a:b].tolist() for a, b in itertools.pairwise(ends)]
    assert all((d[0], d[-1]) == (tokenizer.bos_id, tokenizer.eos_id) for d in documents)
    texts = [tokenizer.decode(document) for document in documents]
    expected = [row.as_text() for row in problems.rows("train")]
    assert sorted(texts) == sorted(expected)
    assert texts != expected


@settings(deadline=None)
@given(st.integers(0, 5_000), st.sampled_from([4, 8, 16]), st.sampled_from([1, 2, 4]))
def test_a_batch_is_the_same_in_one_process_and_in_shares(
    stream: PackedStream, first: int, count: int, num_processes: int
) -> None:
    whole = stream.batch(first, count)
    share = count // num_processes
    parts = [stream.batch(first + rank * share, share) for rank in range(num_processes)]
    assert torch.equal(torch.cat([part.input_ids_BT for part in parts]), whole.input_ids_BT)
    assert torch.equal(torch.cat([part.labels_BT for part in parts]), whole.labels_BT)


def test_another_opening_gives_the_same_batches_and_another_seed_others(
    problems: Source, tokenizer: ChatTokenizer, stream: PackedStream, tmp_path: Path
) -> None:
    again = prepare_packed(problems, tokenizer, tmp_path, SEQ_LEN, 11, "train")
    assert again.fingerprint == stream.fingerprint
    assert torch.equal(again.batch(777, 4).input_ids_BT, stream.batch(777, 4).input_ids_BT)
    other = prepare_packed(problems, tokenizer, tmp_path, SEQ_LEN, 12, "train")
    assert other.fingerprint != stream.fingerprint
    assert not torch.equal(other.batch(777, 4).input_ids_BT, stream.batch(777, 4).input_ids_BT)


def test_a_store_is_reused_until_something_changes(
    problems: Source, tokenizer: ChatTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_packed(problems, tokenizer, tmp_path, SEQ_LEN, 11, "train", max_tokens=5_000)
    made = (tmp_path / "packed-train" / "tokens.bin").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(ChatTokenizer, "encode_texts", lambda *_: pytest.fail("tokenised again"))
        shorter = prepare_packed(problems, tokenizer, tmp_path, SEQ_LEN // 2, 11, "train", max_tokens=5_000)
        assert shorter.num_sequences == 4_999 // (SEQ_LEN // 2)
        assert (tmp_path / "packed-train" / "tokens.bin").stat().st_mtime_ns == made
        with pytest.raises(pytest.fail.Exception, match="tokenised again"):
            prepare_packed(problems, tokenizer, tmp_path, SEQ_LEN, 11, "train", max_tokens=6_000)
    assert prepare_packed(problems, tokenizer, tmp_path, SEQ_LEN, 11, "train", max_tokens=6_000).num_tokens <= 6_000


def test_a_damaged_store_is_refused(problems: Source, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    prepare_packed(problems, tokenizer, tmp_path, SEQ_LEN, 11, "train", max_tokens=5_000)
    with (tmp_path / "packed-train" / "tokens.bin").open("ab") as file:
        file.write(b"xx")
    with pytest.raises(RunDirectoryError, match=r"has 10002 bytes where its facts say 10000(?s:.)*delete"):
        prepare_packed(problems, tokenizer, tmp_path, SEQ_LEN, 11, "train", max_tokens=5_000)


@pytest.mark.parametrize("name", ["tokens.bin", "ends.bin"])
def test_a_changed_byte_of_a_store_is_named(
    problems: Source, tokenizer: ChatTokenizer, tmp_path: Path, name: str
) -> None:
    stream = prepare_packed(problems, tokenizer, tmp_path, SEQ_LEN, 11, "train", max_tokens=5_000)
    beats: list[None] = []
    stream.check(lambda: beats.append(None))
    assert len(beats) == 2
    with (tmp_path / "packed-train" / name).open("r+b") as file:
        first = file.read(1)
        file.seek(0)
        file.write(bytes([first[0] ^ 1]))
    stream = prepare_packed(problems, tokenizer, tmp_path, SEQ_LEN, 11, "train", max_tokens=5_000)
    with pytest.raises(RunDirectoryError, match=rf"packed-train/{name} is not what was written(?s:.)*delete"):
        stream.check(lambda: None)


@pytest.mark.parametrize("facts", ["", '{"version": 2', "[]", "{}", '{"version": 2, "fingerprint": "x"}'])
def test_a_store_whose_facts_cannot_be_read_is_made_again(
    problems: Source, tokenizer: ChatTokenizer, tmp_path: Path, facts: str
) -> None:
    before = prepare_packed(problems, tokenizer, tmp_path, SEQ_LEN, 11, "train", max_tokens=5_000)
    (tmp_path / "packed-train" / "facts.json").write_text(facts)
    again = prepare_packed(problems, tokenizer, tmp_path, SEQ_LEN, 11, "train", max_tokens=5_000)
    assert torch.equal(again.batch(7, 4).input_ids_BT, before.batch(7, 4).input_ids_BT)


def test_a_store_of_an_older_crosschip_is_taken_as_it_is(
    problems: Source, tokenizer: ChatTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_packed(problems, tokenizer, tmp_path, SEQ_LEN, 11, "train", max_tokens=5_000)
    path = tmp_path / "packed-train" / "facts.json"
    facts = json.loads(path.read_text())
    del facts["sha256"]
    path.write_text(json.dumps(facts))
    monkeypatch.setattr(ChatTokenizer, "encode_texts", lambda *_: pytest.fail("tokenised again"))
    prepare_packed(problems, tokenizer, tmp_path, SEQ_LEN, 11, "train", max_tokens=5_000).check(lambda: None)


def test_a_file_that_a_store_lacks_is_named(problems: Source, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    prepare_packed(problems, tokenizer, tmp_path, SEQ_LEN, 11, "train", max_tokens=5_000)
    (tmp_path / "packed-train" / "ends.bin").unlink()
    with pytest.raises(RunDirectoryError, match=r"ends\.bin has 0 bytes where its facts say"):
        prepare_packed(problems, tokenizer, tmp_path, SEQ_LEN, 11, "train", max_tokens=5_000)


def test_max_tokens_ends_the_reading_early(problems: Source, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    stream = prepare_packed(problems, tokenizer, tmp_path, SEQ_LEN, 11, "train", max_tokens=2_000)
    assert stream._store.facts.num_tokens == 2_000
    assert stream.num_sequences == 1_999 // SEQ_LEN


def test_progress_is_told(problems: Source, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    told: list[int] = []
    stream = prepare_packed(problems, tokenizer, tmp_path, SEQ_LEN, 11, "train", progress=told.append)
    assert told[-1] == stream._store.facts.num_tokens


def test_too_little_for_one_window_is_refused(problems: Source, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the train split has 40 tokens, and one sequence takes 49"):
        prepare_packed(problems, tokenizer, tmp_path, SEQ_LEN, 11, "train", max_tokens=40)


def test_wide_vocabularies_take_wide_integers(problems: Source, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    from crosschip.data.token_store import StoreWriter, TokenStore

    writer = StoreWriter(tmp_path, vocab_size=2**16 + 1, with_trained_mask=False)
    writer.append([2**16, 3], num_bytes=2)
    writer.close("print", [])
    assert TokenStore(tmp_path).tokens.tolist() == [2**16, 3]
    assert StoreWriter(tmp_path, vocab_size=2**16, with_trained_mask=False).dtype == np.uint16


def test_notes_of_the_source_come_with_a_reused_store(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("broken\n" + '{"text": "What is 5 + 6?"}\n' * 20)
    data = DataSettings(path=str(path), skip_bad_rows=1, validation_fraction=1e-9)
    for _ in range(2):
        stream = prepare_packed(open_source(data, 0), tokenizer, tmp_path / "data", 8, 0, "train")
        assert len(stream.notes) == 1
        assert "1 bad rows were skipped" in stream.notes[0]


def test_memory_does_not_grow_with_the_data(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    """Rows are taken from the source as they are needed, a block at a time."""
    taken = 0

    class Endless:
        fingerprint = "endless"
        notes: list[str] = []  # noqa: RUF012

        def rows(self, split: str) -> "object":
            nonlocal taken
            while True:
                taken += 1
                yield Row(text=f"What is {taken}? " * 20)

    prepare_packed(Endless(), tokenizer, tmp_path, SEQ_LEN, 0, "train", max_tokens=1_000)  # type: ignore[arg-type]
    assert taken <= 16_384
