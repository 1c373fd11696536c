"""How text is cut into words before merges: the rules of a `tokenizer.json`, and llama.cpp's name for them."""

from __future__ import annotations

from typing import Any

from crosschip.errors import HandoffError

__all__ = ["pre_tokenizer_name"]

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA_3 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN_2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
_GPT_2 = "GPT-2's own words"  # the byte-level step cuts them itself
_DIGITS = "digits one by one"

# The rules in their order, and whether a word that is a token is taken without merges. Names are those of llama.cpp's
# src/llama-vocab.cpp, where several stand for the same rules.
_NAMES: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT_2,), False): "gpt-2",
    ((_DIGITS, _GPT_2), False): "smollm",
    ((_LLAMA_3,), True): "llama-bpe",
    ((_QWEN_2,), False): "qwen2",
    (_DEEPSEEK_V3, False): "deepseek-v3",
}


def pre_tokenizer_name(tokenizer: dict[str, Any], place: str) -> str:
    """llama.cpp's name for the rules of a `tokenizer.json`.

    Raises:
        HandoffError: no name stands for them; the message shows the rules.
    """
    rules: list[str] = []
    is_byte_level = False
    for step in _steps(tokenizer.get("pre_tokenizer")):
        rule = _rule(step)
        if step.get("type") == "ByteLevel":
            is_byte_level = True
        if rule is None:
            _refuse(place, [*rules, f"{step}"])
        elif rule:
            rules.append(rule)
    ignores_merges = bool(tokenizer["model"].get("ignore_merges"))
    name = _NAMES.get((tuple(rules), ignores_merges))
    if name is None or not is_byte_level:
        _refuse(place, [*rules, *(["ignore_merges"] if ignores_merges else [])])
    assert name is not None
    return name


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    return list(pre_tokenizer["pretokenizers"]) if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]


def _rule(step: dict[str, Any]) -> str | None:
    """The step as one of the rules above; empty for one that cuts nothing, None for one that llama.cpp has not."""
    kind = step.get("type")
    if kind == "ByteLevel":
        if step.get("add_prefix_space"):
            return None
        return _GPT_2 if step.get("use_regex", True) else ""
    if kind == "Digits":
        return _DIGITS if step.get("individual_digits") else None
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return str((step.get("pattern") or {}).get("Regex"))
    return None


def _refuse(place: str, rules: list[str]) -> None:
    raise HandoffError(
        f"{place} cuts text into words by rules that llama.cpp has no name for: {'; '.join(rules) or 'none'}",
        "use a tokenizer with the rules of GPT-2, Llama 3, Qwen 2 or DeepSeek-V3, or the target hf",
    )
