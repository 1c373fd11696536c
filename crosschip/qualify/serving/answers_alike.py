"""Whether two greedy answers to one request, whose tokens agree as far as both go, come to the same end. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from crosschip.qualify.serving.answers import Answer

__all__ = ["UnlikeEnd", "unlike_end"]


@dataclass(frozen=True)
class UnlikeEnd:
    """How an answer ends otherwise than another. `only_scores`: they are the same, and log-probs of one are left out.

    `margin` is how far the token that follows the shorter one, which came to its own end, and that token's rival are
    apart, in nats: the end may be that rival. None where the shorter one did not end by itself.
    """

    words: str
    measured: str
    limit: str
    only_scores: bool = False
    margin: float | None = None


def unlike_end(one: Answer, other: Answer) -> UnlikeEnd | None:
    """How `other` ends otherwise than `one`; None when they end alike. Their tokens agree as far as both go."""
    short, long = sorted((one, other), key=lambda each: len(each.tokens))
    ended = f"an answer ends after {len(short.tokens)} of {len(long.tokens)} tokens"
    is_shorter = len(short.tokens) < len(long.tokens)
    for name, expected, got in _said(one, other):
        if expected != got:
            words = ended if is_shorter else f"the same tokens come with another {name}"
            return UnlikeEnd(words, _shown(name, got), _shown(name, expected), margin=_margin(short, long))
    if is_shorter:
        words = f"the same text comes with the log-probs of {len(short.tokens)} of {len(long.tokens)} tokens"
        return UnlikeEnd(words, f"{len(other.tokens)} tokens", f"{len(one.tokens)} tokens", only_scores=True)
    return None


def _said(one: Answer, other: Answer) -> list[tuple[str, str | int | None, str | int | None]]:
    """What must be the same: its name, what was expected, what came. Usage is held against usage only."""
    used = [each.usage.get("completion_tokens") for each in (one, other)]
    return [
        ("text", one.reasoning + one.text, other.reasoning + other.text),
        *([("number of tokens in the usage", used[0], used[1])] if None not in used else []),
        ("finish reason", one.finish_reason, other.finish_reason),
    ]


def _shown(name: str, value: str | int | None) -> str:
    return f"{name} {value[-60:]!r}" if isinstance(value, str) else f"{name} {value}"


def _margin(short: Answer, long: Answer) -> float | None:
    """Engines that pass over `ignore_eos` may end at a near tie; which of the rivals the end is, they do not say."""
    if short.finish_reason != "stop" or len(short.tokens) == len(long.tokens):
        return None
    following = long.tokens[len(short.tokens)]
    rivals = [value for name, value in following.top.items() if name != following.name]
    return None if following.logprob is None or not rivals else abs(following.logprob - max(rivals))
