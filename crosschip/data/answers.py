"""Reading an answer: the reasoning apart from the final answer, and whether the final answer is right."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

__all__ = ["THINK_CLOSE", "THINK_OPEN", "check_answer", "final_answer", "split_reasoning"]

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"

_MAX_NUMBER_CHARACTERS = 200  # a longer run of digits is no answer, and Python refuses to convert some
_MAGNITUDE = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_EXPONENT = r"[eE][-+]?\d{1,3}(?!\w)"  # no longer one: a number is written out to be compared
# A minus sign belongs to the number unless something is subtracted from: `5-3`, `x-3`, `(2)-3`.
_NUMBER = re.compile(
    rf"(?<![\w.])(?P<sign>(?<![\w)\]}}])-)?[$€£]?(?:(?P<whole>\d+) (?=\d+/\d))?"
    rf"(?P<value>(?:{_MAGNITUDE})(?:{_EXPONENT})?)(?: ?/ ?(?P<below>-?\d+))?"
)
_VARIABLE = r"(?:[inpqu-z]|pi|[xyz]{2})(?![^\W_])"
# In prose a number between these is a part of what is to be computed: \sqrt{2}, x^2, 3\cdot 2, x/2; 2\pi, 2x, 2^x.
_FUNCTION = r"(?:sqrt|log|ln|lg|exp|(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?)"
_COMPUTED_BEFORE = re.compile(
    rf"(?:\\?{_FUNCTION}\s*(?:\[[^\]]*\])?|\\(?:pi|times|cdot|div|pm|mp)|[√π]|[\w)\]}}]\s*[*/+^_])\s*[{{(]?\s*-?$"
)
_COMPUTED_BEHIND = re.compile(
    rf"\s*(?:\\(?:{_FUNCTION}|pi|times|cdot|div|pm|mp)(?![a-zA-Z])|[√π^])|{_VARIABLE}|\*[\w(\\]"
    rf"|\s*[-+*/]\s*(?:{_VARIABLE}|\\)"
)
_FRACTION = re.compile(r"\\[dtc]?frac(?:\{([^{}]+)\}\{([^{}]+)\}|(\d)(\d))|([¼-¾⅐-⅞])")
_LATEX_WORDS = re.compile(r"\\(?:text[a-z]*|math(?:rm|bf|it)|mbox)\{([^{}]*)\}")
_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|\\[,!;: ])(?=\d{3}(?!\d))")  # 1{,}000 and 12\,345
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ(?![a-zA-Z])\s*\}?|°")
_FINAL = re.compile(r"(?:^|\n)#### ?([^\n]+)\s*$")  # the last line of an answer in GSM8K and in what copies it
# Behind a number: signs of money and per cent, and a unit in words, in which nothing is computed. What follows at once
# are letters of a product (5a), unless they are a common unit or of a script in which words do not stand apart.
_UNIT_AT_ONCE = r"(?:(?:[kcdm]m|[km]g|[cdm]l)(?![^\W_])|[\u2e80-\uffef]+)"
_UNIT_WORD = rf"(?![abc](?![^\W_])|{_VARIABLE})[^\W\d_]+(?:['’][^\W\d_]+)?"
_UNIT = re.compile(rf"{_UNIT_AT_ONCE}?\s*[.%$€£]*(?:(?:\s+|\s*/\s*){_UNIT_WORD}[.,]?)*[.%$€£\s]*")
# The square of a unit, in LaTeX's words or in plain ones of some letters: \text{ m}^2, 3 cm^2.
_UNIT_POWER = re.compile(
    rf"({_LATEX_WORDS.pattern}|\d(?:{_UNIT_AT_ONCE}|\s+{_UNIT_WORD}(?<=[^\W\d_]{{2}})))\^\{{?[23]\}}?(?!\d)"
)
_NAMED = re.compile(r"\A[^=<>≤≥≠]*(?:(?<!!)=|\\approx(?![a-zA-Z])|≈)")  # x = 5, 10 - 3 = 7
_BRACKETED = re.compile(r"\A(?:\(([^(),]*)\)|\{([^{},]*)\})\Z")  # (72), {72}; (3,4) and (1,234) are points
_LATEX_LAYOUT = re.compile(r"\\(?:left|right)(?![a-zA-Z])|\\[()\[\],;:! ]")
_LONE_BRACES = re.compile(r"\{([^\W_]+)\}")  # x^{2} is x^2
_LONE_WORD = re.compile(r"(?<!\S)\(([^\W_]+)\)(?!\S)")  # (B) is B
_HYPHEN = re.compile(r"(?<=[^\W\d_])-(?=[^\W\d_])")
_PLAIN_WORDS = re.compile(r"[^\W\d_]{2,}(?:[^\w+*/^=<>≤≥(){}\[\]\\]+[^\W\d_]{2,})*")
_TOKEN = re.compile(r"[^\W_]+|[-+*/^=<>≤≥(){}\[\]]")
_SET_IN = " \t\r\n*_`$"  # as in **72**
_AROUND = _SET_IN + ".,"
_ANSWER_IS = re.compile(r"answer(?: is|:)\s*(\S.*)$", re.IGNORECASE | re.MULTILINE)


def split_reasoning(text: str) -> tuple[str | None, str, bool]:
    """Split `<think>reasoning</think>answer` into (reasoning, answer, closed).

    Without tags the whole text is the answer. An opened and never closed tag means that the model ran out of tokens
    while thinking: all is reasoning, the answer is empty and `closed` is False. A text that starts inside the
    reasoning (the prompt held the opening tag) is split at the closing tag.
    """
    opened = text.lstrip().startswith(THINK_OPEN)
    body = text.lstrip()[len(THINK_OPEN) :] if opened else text
    reasoning, close, answer = body.partition(THINK_CLOSE)
    if close:
        return reasoning, answer, True
    if opened:
        return body, "", False
    return None, text, True


def final_answer(expected: str) -> str:
    """What a row's answer ends in behind `####`, where its last line is such a one; else the whole of it."""
    found = _FINAL.search(expected)
    return expected if found is None else found[1].strip()


def check_answer(answer_text: str, expected: str) -> bool:
    """Whether the final answer in `answer_text` is `expected`.

    The final answer is looked for after `</think>`; there, the last `\\boxed{}`, else what follows the last `####`,
    else the text itself. A number is compared as a number (72, 72.0, $72; 1,000 and 1000; 3/4 and 0.75; 72 apples): a
    box must be one number as a whole, `x =` before it or not; of another passage the last one counts. Anything else is
    compared as words, operators and brackets, without case and punctuation; where plain words are expected, hyphens
    within words do not count. Reasoning that was never closed holds no answer.
    """
    _, answer, closed = split_reasoning(answer_text)
    if not closed:
        return False
    boxed = _last_boxed(answer)
    passage = answer.rpartition("####")[2] if boxed is None else boxed
    wanted = _whole_number(expected)
    if wanted is not None:
        found = _last_number(passage) if boxed is None else _whole_number(_NAMED.sub("", boxed))
        return found == wanted
    candidates = [passage, *_ANSWER_IS.findall(passage)]
    is_plain = _PLAIN_WORDS.fullmatch(_bare(expected)) is not None
    right = _tokens(expected, is_plain)
    return right != [] and any(_tokens(candidate, is_plain) == right for candidate in candidates)


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed")
    for index in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[begin + 1 : index]
    return None


def _number_of(match: re.Match[str]) -> Fraction | None:
    if len(match[0]) > _MAX_NUMBER_CHARACTERS:
        return None
    below = int(match["below"] or 1)
    if below == 0:
        return None
    magnitude = Fraction(match["value"].replace(",", "")) / below
    if match["whole"]:
        magnitude += int(match["whole"])
    return -magnitude if match["sign"] else magnitude


def _plain(text: str) -> str:
    """Numbers and units in plain characters, however LaTeX writes them."""
    text = _UNIT_POWER.sub(r"\1", _THOUSANDS.sub("", text).replace("\u2013", "-").replace("\u2212", "-"))
    text = _LATEX_LAYOUT.sub(" ", _LATEX_WORDS.sub(r" \1 ", _DEGREES.sub(" ", text)))
    text = _FRACTION.sub(_plain_fraction, text.replace(r"\$", "$").replace(r"\%", "%"))
    return text.replace("-$", "$-").replace("$-", "-")


def _plain_fraction(match: re.Match[str]) -> str:
    """`3\\frac{1}{2}` and `3½` are the mixed number 3 1/2."""
    fraction = "/".join(unicodedata.normalize("NFKC", part).replace("\u2044", "/") for part in match.groups() if part)
    is_mixed = match.string[: match.start()].endswith(tuple("0123456789"))
    return f" {fraction}" if is_mixed else fraction


def _last_number(text: str) -> Fraction | None:
    """None as well where the last number is a part of an expression that would have to be computed."""
    text = _plain(text)
    last = next(reversed(list(_NUMBER.finditer(text))), None)
    if last is None or _COMPUTED_BEFORE.search(text, 0, last.start()) or _COMPUTED_BEHIND.match(text, last.end()):
        return None
    return _number_of(last)


def _whole_number(text: str) -> Fraction | None:
    """The number that `text` is as a whole, a unit behind it or not; None when it is anything else."""
    text = _BRACKETED.sub(r"\1\2", " ".join(_plain(text).split()).strip(_SET_IN)).strip()
    text = re.sub(r"\A(?:(-)|\+)\s*", r"\1", text)
    match = _NUMBER.match(text)
    return _number_of(match) if match and _UNIT.fullmatch(text, match.end()) else None


def _bare(text: str) -> str:
    """An answer without what it is set in."""
    plain = _LATEX_LAYOUT.sub(" ", _LATEX_WORDS.sub(r"\1", text)).replace("\u2212", "-").strip(_AROUND)
    choice = re.fullmatch(r"([^\W_]+)\)", plain)  # B) is B
    return choice[1] if choice else _LONE_WORD.sub(r"\1", _LONE_BRACES.sub(r" \1 ", plain))


def _tokens(text: str, is_plain: bool) -> list[str]:
    """Words, operators and brackets; of plain words the hyphens between them are none."""
    bare = _bare(text).casefold()
    return _TOKEN.findall(_HYPHEN.sub(" ", bare.strip("- ")) if is_plain else bare)
