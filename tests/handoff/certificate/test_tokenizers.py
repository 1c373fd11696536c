"""The tokenizer's gate: a byte shows, and so does what it does."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from crosschip.certificate.document import seal_of, write_certificate
from crosschip.data import Message, load_tokenizer
from crosschip.handoff.certificate.tokenizers import CHATS, CONTROLS, TEXTS, certified_tokenizer_gate, tokenizer_gate
from crosschip.handoff.source import open_source


def test_the_same_bytes_pass_and_work(exported: Callable[[str], Path], model_dir: Path) -> None:
    gate = tokenizer_gate(open_source(model_dir).tokenizer_files, exported("hf"))
    assert gate.verdict == "PASS"
    assert [measure.value for measure in gate.measures] == [0, 0], "every text comes back as it was"


def _edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda d: _edit(d / "chat_template.jinja", "<|assistant|>", "<|user|>"), "a chat becomes"),
        (lambda d: _swap_tokens(d / "tokenizer.json"), "becomes the tokens"),
        (lambda d: (d / "tokenizer_config.json").open("a").write(" "), "both do the same"),
        (lambda d: (d / "tokenizer.json").write_text("{"), "cannot be read as a tokenizer"),
    ],
)
def test_a_changed_tokenizer_fails_and_says_what_it_does(
    copied: Callable[[str], Path], model_dir: Path, how: Callable[[Path], object], words: str
) -> None:
    directory = copied("hf")
    how(directory)
    gate = tokenizer_gate(open_source(model_dir).tokenizer_files, directory)
    assert gate.verdict == "FAIL"
    assert words in gate.message


def _swap_tokens(file: Path) -> None:
    document = json.loads(file.read_text())
    vocabulary = document["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    file.write_text(json.dumps(document))


class _Other:
    """A reader of another format, honest or not; `around` is what it adds to a chat by itself."""

    def __init__(self, directory: Path, offset: int = 0, around: tuple[str, str] = ("", "")) -> None:
        self._tokenizer, self._offset, self.around = load_tokenizer(directory), offset, around

    def encode(self, text: str) -> list[int]:
        return [each + self._offset for each in self._tokenizer.encode_with_controls(text)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([each - self._offset for each in ids])

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        begin, end = self.around
        return self._tokenizer.render(messages, add_generation_prompt).removeprefix(begin).removesuffix(end)

    def added(self) -> tuple[str, str]:
        return self.around


def test_another_format_is_compared_by_what_it_does(model_dir: Path, tmp_path: Path) -> None:
    files = open_source(model_dir).tokenizer_files
    gate = tokenizer_gate(files, tmp_path, _Other(model_dir))
    assert gate.verdict == "PASS"
    assert f"{len(TEXTS) + len(CONTROLS) + len(CHATS)} texts and chats" in gate.message
    assert "bytes" in gate.not_covered[0]
    wrong = tokenizer_gate(files, tmp_path, _Other(model_dir, offset=1))
    assert wrong.verdict == "FAIL"
    assert "the source's" in wrong.message


def test_a_reader_that_does_not_normalise_passes_on_texts_that_are_in_the_form(model_dir: Path, tmp_path: Path) -> None:
    """As llama.cpp reads Qwen3's tokenizer: there is no place for NFC in a GGUF file."""
    source = tmp_path / "source"
    source.mkdir()
    for file in open_source(model_dir).tokenizer_files:
        shutil.copyfile(file, source / file.name)
    document = json.loads((source / "tokenizer.json").read_text())
    (source / "tokenizer.json").write_text(json.dumps({**document, "normalizer": {"type": "NFC"}}))
    gate = tokenizer_gate([source / "tokenizer.json"], tmp_path, _Other(model_dir))
    assert (gate.verdict, any("not in NFC" in words for words in gate.not_covered)) == ("PASS", True), gate.message
    assert tokenizer_gate([source / "tokenizer.json"], tmp_path, _Other(model_dir, offset=1)).verdict == "FAIL"


def test_a_begin_that_the_reader_adds_by_itself_is_no_difference(model_dir: Path, tmp_path: Path) -> None:
    """llama.cpp cuts the template's begin token off where the tokenizer adds one."""
    files = open_source(model_dir).tokenizer_files
    gate = tokenizer_gate(files, tmp_path, _Other(model_dir, around=("<|bos|>", "")))
    assert (gate.verdict, any("<|bos|> around" in words for words in gate.not_covered)) == ("PASS", True), gate.message
    unsaid = _Other(model_dir, around=("<|bos|>", ""))
    unsaid.added = lambda: ("", "")  # type: ignore[method-assign]
    assert "a chat becomes" in tokenizer_gate(files, tmp_path, unsaid).message


def test_without_a_tokenizer_it_is_not_covered(tmp_path: Path) -> None:
    assert tokenizer_gate([], tmp_path).verdict == "NOT COVERED"


@pytest.mark.parametrize("change", ["none", "changed", "added", "removed"])
def test_a_tokenizer_changed_since_the_certificate_is_seen_without_the_source(tmp_path: Path, change: str) -> None:
    names = ["tokenizer.json", "tokenizer_config.json"]
    for name in names:
        (tmp_path / name).write_text("{}")
    files = [{"name": n, "bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()} for n in names]
    lists = {"files": files, "gates": [], "replays": [], "not_covered": []}
    target = {"name": "hf", "dtype": "float32", "computed_in": "float32"}
    tables: dict[str, Any] = {"target": target, "source": {}, "golden": {}}
    document = {"schema_version": 1, "made_at": "", "verdict": "INCONCLUSIVE", **lists, **tables}
    write_certificate(tmp_path, {**document, "seal": seal_of(document)})
    if change == "removed":
        (tmp_path / "tokenizer_config.json").unlink()
    elif change != "none":
        name = "tokenizer.json" if change == "changed" else "chat_template.jinja"
        (tmp_path / name).write_text("{ }")
    gate = certified_tokenizer_gate(tmp_path)
    assert gate.verdict == ("NOT COVERED" if change == "none" else "FAIL")
    expected = {"none": None, "changed": "tokenizer.json", "added": "chat_template.jinja"}
    assert gate.subject == expected.get(change, "tokenizer_config.json")
    if change != "none":
        assert "changed after the certificate" in gate.message
        assert (
            "hand the model off again from its source or, if the change is meant, remove certificate." in gate.message
        )
