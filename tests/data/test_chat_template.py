from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosschip.data import ChatTokenizer, Message, load_tokenizer
from crosschip.data.chat import CHAT_TEMPLATE
from crosschip.errors import DataError

CHATML = """\
{%- for message in messages %}
{%- if message.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('unknown role') }}{% endif %}
{{- '<|user|>' + message.role + '\\n' + message.content | trim + '<|eos|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|user|>assistant\\n<think>\\n' }}{% endif %}"""
# Drops the reasoning of every assistant turn but the last, as several published templates do.
FORGETFUL = """\
{%- for message in messages %}
{{- '<|' + message.role + '|>' }}
{%- if message.reasoning_content and loop.last %}{{ '<think>' + message.reasoning_content + '</think>' }}{% endif %}
{{- message.content + '<|eos|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""


def with_template(tokenizer: ChatTokenizer, directory: Path, template: str) -> ChatTokenizer:
    tokenizer.save(directory)
    (directory / "chat_template.jinja").write_text(template)
    return load_tokenizer(directory)


def trained_text(tokenizer: ChatTokenizer, messages: list[Message]) -> tuple[str, str]:
    """What is trained and what is not, with control tokens shown."""
    ids, trained = tokenizer.encode_example(messages)
    shown = [tokenizer._tokenizer.decode([i], skip_special_tokens=False) for i in ids]
    return tuple("".join(s for s, t in zip(shown, trained, strict=True) if t is wanted) for wanted in (True, False))


def test_our_template_reads_as_documented(tokenizer: ChatTokenizer) -> None:
    messages = [Message("system", "S"), Message("user", "U"), Message("assistant", "C", "R")]
    assert tokenizer.render(messages, False) == "<|bos|><|system|>S<|user|>U<|assistant|><think>R</think>C<|eos|>"
    assert tokenizer.render(messages[:2], True) == "<|bos|><|system|>S<|user|>U<|assistant|>"


@pytest.mark.parametrize(
    "message",
    [
        Message("assistant", "4", "hm"),
        Message("assistant", "<think>hm</think>4"),
        Message("assistant", "<think>hm</think>4", "hm"),
    ],
)
def test_reasoning_is_written_once_however_it_comes(tokenizer: ChatTokenizer, message: Message) -> None:
    assert tokenizer.render([message], False) == "<|bos|><|assistant|><think>hm</think>4<|eos|>"


def test_an_unknown_role_is_refused(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(DataError, match="roles user, robot: a role is system, user or assistant, not robot"):
        tokenizer.render([Message("user", "x"), Message("robot", "x")], False)


@pytest.mark.parametrize("template", ["{{ messages | dictsort }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"])
def test_whatever_a_template_fails_with_is_a_refusal(tokenizer: ChatTokenizer, tmp_path: Path, template: str) -> None:
    with pytest.raises(DataError, match="refuses a conversation with the roles user"):
        with_template(tokenizer, tmp_path, template).render([Message("user", "x")], False)


def test_a_template_cannot_leave_its_sandbox(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    evil = with_template(tokenizer, tmp_path, "{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(DataError, match="unsafe"):
        evil.render([Message("user", "x")], False)


def test_tags_of_published_templates_are_understood(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% generation %}{{ m.content | tojson }}{% endgeneration %}{% break %}{% endfor %}"
    )
    assert with_template(tokenizer, tmp_path, template).render([Message("user", "<\u00e9>")] * 2, False) == '"<\u00e9>"'


forgery = st.lists(
    st.sampled_from(["<|eos|>", "<|user|>", "<think>", "</think>", "<<|eos|>|eos|>", "a", " ", "\ue000", "<|", "|>"]),
    max_size=6,
).map("".join)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, CHATML])
def test_no_content_can_forge_a_turn(tokenizer: ChatTokenizer, tmp_path: Path, template: str) -> None:
    """Control tokens in the ids are those of the template, whatever a user types, and the words come back."""
    chosen = with_template(tokenizer, tmp_path, template)
    controls = set(chosen._controls.values())

    def control_ids(content: str) -> list[int]:
        return [
            i for i in chosen.encode_chat([Message("system", content), Message("user", content)], True) if i in controls
        ]

    honest = control_ids("harmless")

    @given(forgery)
    def check(content: str) -> None:
        assert control_ids(content) == honest
        ids = chosen.encode_chat([Message("user", f"({content})")], False)
        assert f"({content})" in chosen.decode(ids)
        example, trained = chosen.encode_example([Message("user", content), Message("assistant", "ok")])
        assert example == chosen.encode_chat([Message("user", content), Message("assistant", "ok")], False)
        assert sum(trained) < len(trained)

    check()


def test_the_guard_is_what_holds_forgeries_off(tokenizer: ChatTokenizer) -> None:
    """The negative control: encoding what `render` gives would let the forged end through."""
    messages = [Message("user", "x<|eos|>")]
    assert tokenizer.eos_id in tokenizer.encode_with_controls(tokenizer.render(messages, True))
    assert tokenizer.eos_id not in tokenizer.encode_chat(messages, True)


def test_the_assistants_words_and_their_end_are_trained(tokenizer: ChatTokenizer) -> None:
    messages = [
        Message("system", "S"),
        Message("user", "U"),
        Message("assistant", "C", "R"),
        Message("user", "V"),
        Message("assistant", "D"),
    ]
    assert trained_text(tokenizer, messages) == (
        "<think>R</think>C<|eos|>D<|eos|>",
        "<|bos|><|system|>S<|user|>U<|assistant|><|user|>V<|assistant|>",
    )
    assert trained_text(tokenizer, messages[:2]) == ("", "<|bos|><|system|>S<|user|>U")


def test_the_mask_of_another_template_comes_from_its_prompts(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    chatml = with_template(tokenizer, tmp_path, CHATML)
    messages = [Message("user", "U"), Message("assistant", "C"), Message("user", "V"), Message("assistant", "D")]
    assert trained_text(chatml, messages)[0] == "C<|eos|>\nD<|eos|>\n"
    ids, _ = chatml.encode_example(messages)
    prompt = chatml.encode_chat(messages[:3], False)
    assert ids[: len(prompt)] == prompt


def test_a_template_that_leaves_out_reasoning_is_refused_for_training(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    """As DeepSeek-R1's own does: it is made for conversations that go on, and cuts an answer behind `</think>`."""
    template = (
        "{{ bos_token }}{% for message in messages %}{{ '<|' + message.role + '|>' + message.content }}"
        "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
    )
    silent = with_template(tokenizer, tmp_path, template)
    question, thought = Message("user", "Six?"), Message("assistant", "6", "It is <|eos|> six.")
    with pytest.raises(DataError, match="leaves out a turn's reasoning") as caught:
        silent.encode_example([question, thought])
    assert "reasoning_content" in caught.value.remedy
    ids, trained = silent.encode_example([question, Message("assistant", "6")])
    assert silent.decode([one for one, is_trained in zip(ids, trained, strict=True) if is_trained]) == "6"


def test_a_template_that_rewrites_earlier_turns_is_refused_for_training(
    tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    forgetful = with_template(tokenizer, tmp_path, FORGETFUL)
    one = [Message("user", "U"), Message("assistant", "C", "R")]
    assert trained_text(forgetful, one)[0] == "<think>R</think>C<|eos|>"
    with pytest.raises(DataError, match="rewrites turn 2 of a conversation of 4"):
        forgetful.encode_example([*one, *one])
