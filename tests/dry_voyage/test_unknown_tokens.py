"""An engine that chooses tokens that the model does not have computes something else: its fault, not ours."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from crosschip.dry_voyage import voyage
from crosschip.errors import QualifyError
from crosschip.qualify.serving.client import EngineClient, EngineFault
from tests.qualify.serving.sitting_made import NOWHERE, identity

UNKNOWN = 99_999


class _Engine(EngineClient):
    num_tokens = 1

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        names = [f"token_id:{UNKNOWN}"] * self.num_tokens
        tops = [{name: -1.0} for name in names]
        scores = {"tokens": names, "token_logprobs": [-1.0] * len(names), "top_logprobs": tops}
        return {"choices": [{"text": "", "logprobs": scores, "finish_reason": "length"}]}


def known(ids: list[int]) -> list[float | None]:
    if UNKNOWN in ids:
        raise QualifyError(f"the token {UNKNOWN} is none of the 300", "give another directory")
    return [None, *[-1.0] * (len(ids) - 1)]


@pytest.mark.parametrize("num_tokens", [1, voyage._NUM_NEW])
def test_a_chosen_token_that_the_model_does_not_have_is_garbage(num_tokens: int) -> None:
    engine = _Engine(NOWHERE)
    engine.num_tokens = num_tokens
    able = replace(identity(), scores_prompts=False)
    with pytest.raises(EngineFault, match=f"garbage: the token {UNKNOWN} is none of the 300"):
        voyage._both_scores(engine, able, [1, 2, 3], known)
