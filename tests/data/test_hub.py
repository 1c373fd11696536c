"""Names on the hub: without a network the error helps, and with one the files are streamed.

There is no network in the tests; an in-memory file system of the same interface (fsspec) stands in for the hub's.
"""

import io
from collections.abc import Iterator

import fsspec
import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crosschip.data import files as files_module
from crosschip.data import open_source
from crosschip.data.files import is_reading_fault
from crosschip.errors import DataError
from crosschip.recipe import DataSettings


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[fsspec.AbstractFileSystem]:
    filesystem = fsspec.filesystem("dir", path="/hub", fs=fsspec.filesystem("memory"))
    monkeypatch.setattr(files_module, "hub_filesystem", lambda: filesystem)
    yield filesystem
    fsspec.filesystem("memory").store.clear()


def texts(path: str) -> list[str]:
    source = open_source(DataSettings(path=path, validation_fraction=1e-9), 0)
    return sorted(row.as_text() for row in source.rows("train"))


def test_files_of_a_data_set_are_read(hub: fsspec.AbstractFileSystem) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": ["a", "b"]}), buffer)
    hub.pipe("datasets/owner/name/data/train-0.parquet", buffer.getvalue())
    hub.pipe("datasets/owner/name/data/train-1.jsonl", b'{"text": "c"}\n')
    hub.pipe("datasets/owner/name/README.md", b"about")
    hub.pipe("datasets/owner/name/.gitattributes", b"")
    assert texts("hf://datasets/owner/name") == ["a", "b", "c"]
    assert texts("hf://datasets/owner/name/data/*.jsonl") == ["c"]
    assert texts("hf://datasets/owner/name/data/train-0.parquet") == ["a", "b"]


def test_a_bad_line_is_named(hub: fsspec.AbstractFileSystem) -> None:
    hub.pipe("datasets/owner/name/rows.jsonl", b'{"text": "c"}\nbroken\n')
    with pytest.raises(DataError, match=r"hf://datasets/owner/name/rows\.jsonl:2: not JSON"):
        texts("hf://datasets/owner/name")


class Breaking(io.BytesIO):
    """A connection that ends after the first line."""

    def __next__(self) -> bytes:
        if self.tell():
            raise httpx.ReadError("connection reset")
        return super().__next__()


def test_our_own_defects_are_not_taken_for_the_network() -> None:
    assert not is_reading_fault(AssertionError())
    assert not is_reading_fault(KeyError("x"))
    assert is_reading_fault(httpx.ConnectError("no network"))


def test_a_network_that_ends_in_the_middle_is_told(
    hub: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b'{"text": "a"}\n{"text": "b"}\n'
    hub.pipe("datasets/owner/name/rows.jsonl", content)
    monkeypatch.setattr(hub, "open", lambda *_: Breaking(content))
    with pytest.raises(DataError, match=r"rows\.jsonl cannot be read from the hub.*ReadError: connection reset"):
        texts("hf://datasets/owner/name")


def test_nothing_found_is_told(hub: fsspec.AbstractFileSystem) -> None:
    with pytest.raises(DataError, match="matches no file on the hub"):
        open_source(DataSettings(path="hf://datasets/owner/name/*.jsonl"), 0)


def test_a_name_of_another_form_is_refused() -> None:
    with pytest.raises(DataError, match=r"write hf://datasets/OWNER/NAME"):
        open_source(DataSettings(path="hf://owner/name"), 0)


@pytest.mark.parametrize("name", ["-bad/name", "a b/name", "bad-/name"])
def test_a_name_that_cannot_be_is_told(name: str) -> None:
    with pytest.raises(DataError, match="hf://datasets/"):
        open_source(DataSettings(path=f"hf://datasets/{name}"), 0)


def test_without_a_network_the_way_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real client, sent to a port where nobody listens."""
    from huggingface_hub import HfFileSystem

    dead = "http://127.0.0.1:9"
    monkeypatch.setattr(files_module, "hub_filesystem", lambda: HfFileSystem(endpoint=dead, skip_instance_cache=True))
    with pytest.raises(DataError, match=r"is there a network\?(?s:.)*hf download(?s:.)*data\.path"):
        open_source(DataSettings(path="hf://datasets/owner/name"), 0)
