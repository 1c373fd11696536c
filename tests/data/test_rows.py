import pytest

from crosschip.data import Message, Row
from crosschip.data.rows import falls_below
from crosschip.errors import DataError


def test_a_reasoned_number_is_written_as_prose() -> None:
    row = Row(messages=(Message("user", "What is 2 + 3?"), Message("assistant", "5", "2+3=5.")))
    assert row.as_text() == "What is 2 + 3?\n2+3=5.\nThe answer is 5."


def test_an_answer_in_words_stays_as_it_is() -> None:
    row = Row(messages=(Message("user", "Why?"), Message("assistant", "It is blue.", "Light scatters.")))
    assert row.as_text() == "Why?\nLight scatters.\nIt is blue."
    assert Row(messages=(Message("user", "Hi"), Message("assistant", "Ho"))).as_text() == "Hi\nHo"


def test_plain_text_cannot_be_fine_tuned_on() -> None:
    with pytest.raises(DataError, match=r"plain text(?s:.)*data\.question_field"):
        Row(text="Once upon a time").as_messages()


def test_two_answers_to_one_question_share_a_split_key() -> None:
    asked = Message("user", "What is 2 + 3?")
    right, wrong = (Row(messages=(asked, Message("assistant", answer))) for answer in ("5", "6"))
    assert right.split_key() == wrong.split_key()
    assert Row(messages=(Message("user", "What is 2 + 4?"),)).split_key() != right.split_key()


@pytest.mark.parametrize("opening", [(), (Message("system", "Be brief."),)])
def test_conversations_that_an_assistant_opens_are_told_apart(opening: tuple[Message, ...]) -> None:
    greeting = (*opening, Message("assistant", "How can I help?"))

    def key(*turns: Message) -> str:
        return Row(messages=(*greeting, *turns)).split_key()

    asked, other = Message("user", "What is 2 + 3?"), Message("user", "What is 2 + 4?")
    assert key(asked, Message("assistant", "5")) == key(asked, Message("assistant", "6"))
    assert key(asked, Message("assistant", "5")) != key(other, Message("assistant", "6"))
    unasked = [Row(messages=(*opening, Message("assistant", text))).split_key() for text in ("One.", "Two.")]
    assert unasked[0] != unasked[1]


def test_the_share_of_a_split_is_what_was_asked() -> None:
    share = sum(falls_below(f"row {i}", 0.1) for i in range(20_000)) / 20_000
    assert abs(share - 0.1) < 5 * (0.1 * 0.9 / 20_000) ** 0.5  # five standard deviations of a binomial share
