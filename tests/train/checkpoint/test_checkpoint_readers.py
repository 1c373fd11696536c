"""Everything that reads a model directory reads a training checkpoint, and sees the same model as in an export."""

from pathlib import Path

import pytest
import torch
from checkpoint_parts import batch_of, state_of, trained

from crosschip.golden.weights import records_of
from crosschip.model import Decoder, generate, load_model, save_model
from crosschip.model.weights import has_weights, is_training_checkpoint
from crosschip.qualify.subjects.model_directory import load_model_directory
from crosschip.train.checkpoint import save_checkpoint


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def both(request, tmp_path: Path) -> tuple[Path, Path]:
    """The same weights as a checkpoint and as an export."""
    model, optimizer = trained(1, tie_word_embeddings=request.param)
    with torch.no_grad():
        for router in model.routers():
            router.e_score_correction_bias += torch.arange(6.0) / 100
    checkpoint = save_checkpoint(tmp_path, model, optimizer, state_of(1), keep=1)
    save_model(model, tmp_path / "export")
    return checkpoint, tmp_path / "export"


def test_the_model_answers_alike(both) -> None:
    models = [load_model(path) for path in both]
    ids = batch_of(1).input_ids_BT
    assert torch.equal(models[0](ids), models[1](ids))
    written = [generate(Decoder(model), [[1, 2, 3]], 5, set()) for model in models]
    assert written[0] == written[1]


def test_the_dtype_can_be_chosen_and_is_float32_otherwise(both) -> None:
    assert load_model(both[0]).lm_head.weight.dtype == torch.float32
    halved = load_model(both[0], dtype=torch.bfloat16)
    assert torch.equal(halved.lm_head.weight, load_model(both[1], dtype=torch.bfloat16).lm_head.weight)
    assert halved.routers()[0].e_score_correction_bias.dtype == torch.float32


def test_a_golden_bundle_records_the_same_weights(both) -> None:
    assert records_of(both[0]) == records_of(both[1])


def test_a_qualification_runs_the_weights_and_not_random_ones(both, tmp_path) -> None:
    assert [is_training_checkpoint(path) for path in both] == [True, False]
    for path in both:
        assert has_weights(path)
        subject = load_model_directory(path, "here")
        assert subject.weights == path
    assert not has_weights(tmp_path)
