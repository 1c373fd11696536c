from __future__ import annotations

from crosschip.rewards import Attempt


def attempt(answer: str = "", expected: str = "", reasoning: str | None = "so", **changed: object) -> Attempt:
    """An attempt as it comes from a model that reasons and ends by itself."""
    text = answer if reasoning is None else f"<think>{reasoning}</think>{answer}"
    values = {
        "question": "?",
        "expected": expected,
        "text": text,
        "reasoning": reasoning,
        "answer": answer,
        "closed": True,
        "finished": True,
        "num_tokens": len(text),
    }
    return Attempt(**{**values, **changed})  # type: ignore[arg-type]
