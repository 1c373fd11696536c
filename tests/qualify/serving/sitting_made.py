"""A sitting without an engine: answers are given, and what is reported lies in its record."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crosschip.qualify.finding import ExamRecord
from crosschip.qualify.serving.answers import Answer
from crosschip.qualify.serving.client import EngineClient
from crosschip.qualify.serving.identity import EngineIdentity
from crosschip.qualify.serving.judge import Noise, limits_from
from crosschip.qualify.serving.prompts import Prompts
from crosschip.qualify.serving.sitting import COMPLETIONS, Sitting

NOWHERE = "http://127.0.0.1:9"  # nothing listens there


def identity(**more: Any) -> EngineIdentity:
    able: dict[str, Any] = dict.fromkeys(
        ("takes_ids", "scores_prompts", "gives_scores", "names_ids", "chats", "scores_chats"), True
    )
    known = {"url": NOWHERE, "model": "m", "engine": "made", "version": "", "max_length": 4096, "vocab_size": 300}
    return EngineIdentity(**{**known, **able, **more})


@dataclass
class GivenAnswers(Sitting):
    """Each request is answered by `give`, in their order."""

    give: Callable[[dict[str, Any], str], Answer] = field(default=lambda body, path: Answer())

    def ask(self, body: dict[str, Any], path: str = COMPLETIONS) -> Answer:
        answer = self.give(body, path)
        self.checked("answers")
        return answer


def sitting(directory: Path, give: Callable[[dict[str, Any], str], Answer], **more: Any) -> GivenAnswers:
    settings: dict[str, Any] = {
        "client": EngineClient(NOWHERE, silence_s=1.0, total_s=1.0),
        "identity": identity(),
        "prompts": Prompts("text", list(range(10, 60)), random.Random(0)),
        "tier": "smoke",
        "reproducers": directory,
        "limits": limits_from(Noise(0.0, 0.0, 0)),
        "record": ExamRecord("serving_test"),
        "until": time.monotonic() + 1e6,
    }
    return GivenAnswers(**{**settings, **more}, give=give)
