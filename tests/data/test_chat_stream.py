from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosschip.data import NOT_TRAINED, ChatStream, ChatTokenizer, Source, open_source, prepare_chat
from crosschip.errors import DataError
from crosschip.recipe import DataSettings

SEQ_LEN = 256


@pytest.fixture(scope="module")
def stream(problems: Source, tokenizer: ChatTokenizer, tmp_path_factory: pytest.TempPathFactory) -> ChatStream:
    return prepare_chat(problems, tokenizer, tmp_path_factory.mktemp("data"), SEQ_LEN, 11, "train")


def example(stream: ChatStream, position: int) -> tuple[list[int], list[int]]:
    batch = stream.batch(position, 1)
    return batch.input_ids_BT[0].tolist(), batch.labels_BT[0].tolist()


def test_an_example_reads_as_its_conversation(stream: ChatStream, tokenizer: ChatTokenizer, problems: Source) -> None:
    rows = {row.as_messages()[0].content: row for row in problems.rows("train")}
    inputs, labels = example(stream, 3)
    question, _, answer = tokenizer.decode(inputs).partition("<think>")
    messages = rows[question].as_messages()
    assert f"<think>{answer}" == f"<think>{messages[1].reasoning_content}</think>{messages[1].content}"
    trained = [label for label in labels if label != NOT_TRAINED]
    assert tokenizer.decode(trained) == f"<think>{answer}"
    assert trained[-1] == tokenizer.eos_id
    first = labels.index(trained[0])
    assert all(label == NOT_TRAINED for label in labels[:first])
    assert [i for i in inputs[first + 1 :] if i != tokenizer.pad_id] == trained[:-1]


def test_padding_is_masked_and_the_width_rounded(stream: ChatStream, tokenizer: ChatTokenizer) -> None:
    batch = stream.batch(0, 32)
    assert batch.input_ids_BT.shape[1] % 16 == 0
    padded = batch.input_ids_BT == tokenizer.pad_id
    assert padded.any()
    assert (batch.labels_BT[padded] == NOT_TRAINED).all()
    assert (~padded).sum(1).max() > batch.input_ids_BT.shape[1] - 16


def test_an_epoch_covers_every_example_once_and_each_epoch_in_another_order(stream: ChatStream) -> None:
    count = stream.num_sequences
    orders = [stream._epoch_order(epoch).tolist() for epoch in range(3)]
    for order in orders:
        assert sorted(order) == list(range(count))
    assert orders[0] != orders[1] != orders[2]
    inputs, labels = [], []
    for position in range(count):
        inputs.append(example(stream, position)[0])
        labels.append(example(stream, position)[1])
    assert sum(label != NOT_TRAINED for row in labels for label in row) == stream.num_trained_tokens


def test_lengths_are_grouped(stream: ChatStream) -> None:
    """Padding within batches of 16 is far below that of an order that knows no lengths."""

    def padded_share(order: list[int]) -> float:
        lengths = [int(stream._ends[i + 1] - stream._ends[i]) for i in order]
        batches = [lengths[i : i + 16] for i in range(0, len(lengths) - 15, 16)]
        return sum(max(b) * 16 for b in batches) / sum(map(sum, batches)) - 1

    assert padded_share(stream._epoch_order(0).tolist()) < 0.1
    assert padded_share(list(range(stream.num_sequences))) > 0.3


@settings(deadline=None)
@given(st.integers(0, 5_000), st.sampled_from([4, 16]), st.sampled_from([1, 2, 4]))
def test_a_batch_is_the_same_in_one_process_and_in_shares(
    stream: ChatStream, first: int, count: int, num_processes: int
) -> None:
    """Up to the padding, which each share rounds for itself."""
    whole = stream.batch(first, count)
    share = count // num_processes
    for rank in range(num_processes):
        part = stream.batch(first + rank * share, share)
        rows = slice(rank * share, (rank + 1) * share)
        width = part.labels_BT.shape[1]
        assert torch.equal(part.input_ids_BT, whole.input_ids_BT[rows, :width])
        assert torch.equal(part.labels_BT, whole.labels_BT[rows, :width])
        assert (whole.labels_BT[rows, width:] == NOT_TRAINED).all()


def test_another_opening_gives_the_same_batches(
    problems: Source, tokenizer: ChatTokenizer, stream: ChatStream, tmp_path: Path
) -> None:
    again = prepare_chat(problems, tokenizer, tmp_path, SEQ_LEN, 11, "train")
    assert again.fingerprint == stream.fingerprint
    assert torch.equal(again.batch(777, 4).labels_BT, stream.batch(777, 4).labels_BT)
    other = prepare_chat(problems, tokenizer, tmp_path, SEQ_LEN, 12, "train")
    assert other.fingerprint != stream.fingerprint


def test_long_examples_are_cut_and_told(
    tokenizer: ChatTokenizer, tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    rows = [
        {"question": "What is 1?", "answer": "1"},
        {"question": "What is 2?", "answer": "two " * 100},
        {"question": "What is 3? " * 100, "answer": "3"},
    ]
    source = open_source(DataSettings(path=str(write_jsonl(rows)), validation_fraction=1e-9), 0)
    stream = prepare_chat(source, tokenizer, tmp_path / "data", 40, 0, "train")
    assert stream.num_sequences == 2
    assert [note.partition(",")[0].partition(" and ")[0] for note in stream.notes] == [
        "1 examples are longer than seq_len=40 tokens",
        "1 examples have nothing to train within seq_len=40 tokens",
    ]
    assert max(stream.batch(i, 1).input_ids_BT.shape[1] for i in range(2)) == 40


def test_max_examples_ends_the_reading_early(problems: Source, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    told: list[int] = []
    stream = prepare_chat(problems, tokenizer, tmp_path, SEQ_LEN, 0, "train", max_examples=7, progress=told.append)
    assert stream.num_sequences == 7
    assert told == [stream.num_tokens + 7]


def test_nothing_to_train_is_refused(
    tokenizer: ChatTokenizer, tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    chat = [{"role": "user", "content": "Hi"}]
    source = open_source(DataSettings(path=str(write_jsonl([{"messages": chat}])), validation_fraction=1e-9), 0)
    with pytest.raises(DataError, match="no conversation of the train split has a word of the assistant"):
        prepare_chat(source, tokenizer, tmp_path / "data", 40, 0, "train")


def test_plain_text_is_refused(tokenizer: ChatTokenizer, tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    source = open_source(DataSettings(path=str(write_jsonl([{"text": "Hi"}])), validation_fraction=1e-9), 0)
    with pytest.raises(DataError, match="is plain text"):
        prepare_chat(source, tokenizer, tmp_path / "data", 40, 0, "train")
