"""The model as the truth: what it cannot know is told, not computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from crosschip.errors import QualifyError
from crosschip.model import save_model
from crosschip.qualify.serving.answers import Answer, Token
from crosschip.qualify.serving.ladder import examine_ladder
from crosschip.qualify.serving.reference import reference_scores
from tests.qualify.serving.sitting_made import identity, sitting
from tests.serve.conftest import make_model, tiny_config

VOCAB_SIZE = 300


@pytest.mark.parametrize("unknown", [VOCAB_SIZE, -1, 10**30])
def test_a_token_that_the_model_does_not_have_is_named(tmp_path: Path, unknown: int) -> None:
    save_model(make_model(tiny_config(VOCAB_SIZE), seed=1), tmp_path, torch.float32)
    scores = reference_scores(tmp_path)
    assert len(scores([1, 2, VOCAB_SIZE - 1])) == 3
    with pytest.raises(QualifyError, match=f"the token {unknown} is none of the {VOCAB_SIZE}") as error:
        scores([1, unknown])
    assert error.value.remedy == "give the directory that the engine serves"


def test_the_directory_of_another_model_is_no_failure_of_the_engine(tmp_path: Path) -> None:
    def answered(body: dict[str, Any], path: str) -> Answer:
        ids = [*body["prompt"], *[7] * body["max_tokens"]]
        return Answer(tokens=[Token(f"token_id:{each}", -1.0, {}) for each in ids])

    def unlike(ids: list[int]) -> list[float | None]:
        raise QualifyError("the token 9 is none of the 8 of the model in DIR", "give the directory that is served")

    made = sitting(tmp_path, answered, identity=identity(max_length=40), reference=unlike)
    examine_ladder(made)
    found = [each for each in made.record.findings if each.check == "reference"]
    assert [each.verdict for each in found] == ["INCONCLUSIVE"]
    assert "the directory holds another model than the engine serves" in found[0].message
    assert not [each for each in made.record.findings if each.verdict == "FAIL"]
