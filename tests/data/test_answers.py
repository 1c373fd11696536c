import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosschip.data import check_answer, split_reasoning

RIGHT = [
    ("72", "72"),
    ("72.0", "72"),
    ("$72", "72"),
    ("It costs $72.", "72"),
    ("72%", "72"),
    ("**72**", "72"),
    (r"\(72\)", "72"),
    ("1,000", "1000"),
    ("1000 dollars", "1,000"),
    ("1,000.50", "1000.5"),
    ("-7", "-7"),
    ("\u22127", "-7"),
    ("x = -3", "-3"),
    ("$-5$", "-5"),
    ("-$5", "-5"),
    ("10-3=7", "7"),
    ("3/4", "0.75"),
    ("3 / 4", "0.75"),
    (".5", "1/2"),
    (r"\boxed{\frac{3}{4}}", "3/4"),
    (r"$\frac12$", "0.5"),
    (r"-\dfrac{1}{2}", "-0.5"),
    (r"\boxed{72}, not 73", "72"),
    ("first 5, then 9\n#### 72\n", "72"),
    ("<think>5 or 6</think>The answer is 72.", "72"),
    ("so it was 5</think>72", "72"),
    ("72 apples", "72 apples"),
    ("There are 72.", "72 apples"),
    ("Blue.", "blue"),
    ("The answer is blue.", "blue"),
    (r"\boxed{\text{Blue}}", "blue"),
    ("18:30", "18:30"),
    ("72", r"72 \text{ apples}"),
    ("72 %", "72 % of them"),
    ("20", "20 °C"),
    (r"\boxed{\sqrt{2}}", r"\sqrt{2}"),
    ("The answer is **x - 1**.", "x-1"),
    (r"\(x-1\)", "x - 1"),
    ("$x^{2}$", "x^2"),
    ("x \u2212 1", "x-1"),
    (r"\left(0, 1\right]", "(0,1]"),
    (r"\boxed{2\pi}", r"2 \pi"),
    ("twenty one", "twenty-one"),
    ("- blue", "blue"),
    ("(B)", "B"),
    ("B)", r"\text{(B)}"),
    (r"\boxed{3\frac{1}{2}}", "3.5"),
    ("3 1/2 cups", "7/2"),
    ("*72* apples", "72"),
    ("**Total:** 72", "72"),
    ("The answer is 72!", "72"),
    (r"\boxed{x = 72\text{ km}}", "72"),
    (r"\boxed{\approx 72}", "72"),
    ("5km", "5"),
    ("3 * 4 = 12", "12"),
]
WRONG = [
    ("73", "72"),
    ("", "72"),
    ("no idea", "72"),
    ("<think>72", "72"),
    ("<think>72</think>", "72"),
    ("72 or 73", "72"),
    ("-72", "72"),
    ("10-3", "-3"),
    ("1,2,3", "123"),
    ("5/0", "5"),
    ("7.2", "72"),
    ("0.72", "72"),
    ("7" * 5_000, "7"),
    ("red", "blue"),
    ("not blue", "blue"),
    ("", ""),
    ("7", "18:30"),
    (r"\boxed{\sqrt{2}}", r"-\sqrt{2}"),
    (r"\boxed{x-1}", "x+1"),
    (r"\boxed{3x}", "-3x"),
    (r"\boxed{-3x}", "3x"),
    (r"\boxed{-x}", "x"),
    (r"\boxed{5+x}", "5 - x"),
    (r"\boxed{5}", "5 - x"),
    (r"\boxed{2}", r"2 \pi"),
    ("x < 3", "x > 3"),
    ("[0,1)", "[0,1]"),
    (r"\sqrt{2x}", r"\sqrt{2}x"),
    ("ab+cd", "ab-cd"),
    (r"\boxed{\sqrt{2}}", "2"),
    (r"\boxed{\sqrt[3]{2}}", "2"),
    (r"\boxed{\frac{1}{\sqrt{2}}}", "2"),
    (r"\boxed{\frac{\pi}{2}}", "2"),
    (r"\boxed{\frac{x}{2}}", "2"),
    (r"\boxed{2\pi}", "2"),
    (r"\boxed{2x}", "2"),
    (r"\boxed{2i}", "2"),
    (r"\boxed{2 + x}", "2"),
    (r"\boxed{x^2}", "2"),
    (r"\boxed{x^{2}}", "2"),
    (r"\boxed{2^x}", "2"),
    (r"\boxed{5+2}", "2"),
    (r"\boxed{3 \cdot 2}", "2"),
    (r"\boxed{\log(2)}", "2"),
    ("√2", "2"),
    ("3 1/2", "1/2"),
]


@pytest.mark.parametrize(("answer", "expected"), RIGHT)
def test_right_answers(answer: str, expected: str) -> None:
    assert check_answer(answer, expected)


@pytest.mark.parametrize(("answer", "expected"), WRONG)
def test_wrong_answers(answer: str, expected: str) -> None:
    assert not check_answer(answer, expected)


@given(st.text(), st.text())
def test_any_text_can_be_checked(answer: str, expected: str) -> None:
    assert check_answer(answer, expected) in (True, False)


@given(st.integers(), st.integers())
def test_an_integer_equals_itself_alone(a: int, b: int) -> None:
    assert check_answer(f"The answer is {a:,}.", str(b)) == (a == b)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<think>a</think>b", ("a", "b", True)),
        ("\n<think>\na\n</think>\nb", ("\na\n", "\nb", True)),
        ("<think></think>b", ("", "b", True)),
        ("<think>a", ("a", "", False)),
        ("a</think>b", ("a", "b", True)),
        ("b", (None, "b", True)),
        ("", (None, "", True)),
        ("b with <think> inside", (None, "b with <think> inside", True)),
    ],
)
def test_reasoning_is_split_from_the_answer(text: str, parts: tuple[str | None, str, bool]) -> None:
    assert split_reasoning(text) == parts
