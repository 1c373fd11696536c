import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosschip.data import ChatTokenizer, Message, Source, load_tokenizer, train_tokenizer
from crosschip.errors import DataError

CONVERSATION = [
    Message("system", "Be brief."),
    Message("user", "What is 12 + 30?"),
    Message("assistant", "42", "2+0=2, 1+3=4, so 42."),
    Message("user", "  Thanks \u2603\n"),
    Message("assistant", "You are welcome."),
]
CONTROLS = ["<|bos|>", "<|eos|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<think>", "</think>"]


def as_documents(messages: list[Message]) -> list[dict[str, str]]:
    return [{k: v for k, v in vars(message).items() if v is not None} for message in messages]


@pytest.fixture(scope="module")
def directory(tokenizer: ChatTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(directory)
    return directory


def test_any_text_comes_back(tokenizer: ChatTokenizer) -> None:
    @given(st.text(st.characters(codec="utf-8")))
    def check(text: str) -> None:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode_texts([text, "x"])[0] == tokenizer.encode(text)

    check()


def test_text_with_control_tokens_in_it_stays_text(tokenizer: ChatTokenizer) -> None:
    control_ids = {tokenizer.encode_with_controls(token)[0] for token in CONTROLS}
    assert len(control_ids) == 8

    @given(st.lists(st.sampled_from([*CONTROLS, "a", " ", "7", "<|", "|>", "<|e", "os|>"]), max_size=8))
    def check(parts: list[str]) -> None:
        text = "".join(parts)
        assert not control_ids & set(tokenizer.encode(text))
        assert tokenizer.decode(tokenizer.encode(text)) == text

    check()


def test_digits_are_split_one_by_one(tokenizer: ChatTokenizer) -> None:
    ids = tokenizer.encode("1200345")
    assert [tokenizer.decode([i]) for i in ids] == list("1200345")
    lengths = [tokenizer.token_byte_lengths()[i] for i in tokenizer.encode("so 12")]
    assert sum(lengths) == 5


def test_byte_lengths_add_up(tokenizer: ChatTokenizer) -> None:
    text = "Ana has 7 caf\u00e9s \u2603. What is <think>?"
    lengths = tokenizer.token_byte_lengths()
    assert lengths.shape == (tokenizer.vocab_size,)
    assert lengths[tokenizer.encode(text)].sum() == len(text.encode())
    assert lengths[tokenizer.eos_id] == 0


def test_training_is_deterministic_and_bounded(problems: Source, tokenizer: ChatTokenizer) -> None:
    again = train_tokenizer((row.as_text() for row in problems.rows("train")), vocab_size=400)
    assert again.fingerprint == tokenizer.fingerprint
    assert tokenizer.vocab_size == 400
    other = train_tokenizer((row.as_text() for row in problems.rows("train")), vocab_size=399)
    assert other.fingerprint != tokenizer.fingerprint


def test_faults_in_training_are_told() -> None:
    with pytest.raises(DataError, match=r"vocab_size=200(?s:.)*at least 264"):
        train_tokenizer(["text"], vocab_size=200)
    with pytest.raises(DataError, match="no text to train"):
        train_tokenizer([], vocab_size=300)


def test_a_saved_tokenizer_is_the_same(tokenizer: ChatTokenizer, directory: Path) -> None:
    assert sorted(path.name for path in directory.iterdir()) == [
        "chat_template.jinja",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    loaded = load_tokenizer(directory)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.stop_ids == {tokenizer.eos_id}
    assert loaded.encode_chat(CONVERSATION, True) == tokenizer.encode_chat(CONVERSATION, True)


def test_transformers_reads_it_alike(tokenizer: ChatTokenizer, directory: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(directory)
    ids = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ids == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    assert len(theirs) == tokenizer.vocab_size
    inline = [Message("user", "2+2?"), Message("assistant", "<think>hm</think>4")]
    both = [Message("user", "2+2?"), Message("assistant", "<think>hm</think>4", "hm")]
    for messages in (CONVERSATION, CONVERSATION[:2], inline, both):
        for prompt in (True, False):
            documents = as_documents(messages)
            text = theirs.apply_chat_template(documents, tokenize=False, add_generation_prompt=prompt)
            assert text == tokenizer.render(messages, prompt)
            encoded = theirs.apply_chat_template(documents, add_generation_prompt=prompt)["input_ids"]
            assert encoded == tokenizer.encode_chat(messages, prompt)
    assert theirs(CONVERSATION[0].content)["input_ids"] == tokenizer.encode(CONVERSATION[0].content)
    chat_ids = tokenizer.encode_chat(CONVERSATION, False)
    assert theirs.decode(chat_ids, skip_special_tokens=True) == tokenizer.decode(chat_ids)


def test_decoding_keeps_the_reasoning_tags_alone(tokenizer: ChatTokenizer) -> None:
    ids = tokenizer.encode_chat([Message("user", "x"), Message("assistant", "4", "hm")], False)
    assert tokenizer.decode(ids) == "x<think>hm</think>4"


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("tokenizer.json", "{broken", "cannot be read as a tokenizer"),
        ("tokenizer_config.json", "{broken", r"tokenizer_config\.json is not JSON"),
        ("tokenizer_config.json", "[]", "holds a list"),
        ("tokenizer_config.json", '{"eos_token": "<nothing>"}', "names no eos_token that it knows .*'<nothing>'"),
    ],
)
def test_damaged_files_are_named(
    tokenizer: ChatTokenizer, tmp_path: Path, name: str, content: str, problem: str
) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "special_tokens_map.json").unlink()
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=problem):
        load_tokenizer(tmp_path)


def test_a_directory_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no tokenizer\.json in"):
        load_tokenizer(tmp_path)


def test_a_base_model_has_no_conversations(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode("so 12") == tokenizer.encode("so 12")
    with pytest.raises(DataError, match="has no chat template"):
        loaded.encode_chat([Message("user", "x")], True)


def test_another_models_tokenizer_is_read_with_its_own_names(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "special_tokens_map.json").unlink()
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ messages[0].content }}!"}]
    config = {"eos_token": {"content": "<|eos|>", "special": True}, "pad_token": None, "chat_template": named}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 4]}')
    loaded = load_tokenizer(tmp_path)
    assert (loaded.bos_id, loaded.pad_id, loaded.stop_ids) == (1, 1, {1, 4})  # eos stands in where none is named
    assert loaded.render([Message("user", "hey")], True) == "hey!"
    loaded.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").render([Message("user", "hey")], True) == "hey!"
