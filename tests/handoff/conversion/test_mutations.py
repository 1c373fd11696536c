"""Each single wrong operator of a layout is seen by the tensor manifest, over all operators of a tiny model.

A mutant that leaves every number where it was (two equal tensors exchanged) is none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from crosschip.golden.weights import TensorRecord, compare_weights, records_of, tensor_record
from crosschip.handoff.conversion.declared import checkpoint_layout, dtype_layout, quantised_layout
from crosschip.handoff.conversion.layout import Layout, run
from crosschip.handoff.conversion.operators import Operator, Tensors
from crosschip.model.quantised import Quantisation, scale_name
from crosschip.model.weights import exported_tensors, own_tensors
from tests.handoff.conversion.models import SQUARE, MemorySource
from tests.model.configs import random_model

Change = Callable[[torch.Tensor], torch.Tensor]


def halves_swapped(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.roll(tensor.shape[0] // 2, 0)


def rows_interleaved(tensor: torch.Tensor) -> torch.Tensor:
    half = tensor.shape[0] // 2
    return torch.cat([torch.stack([tensor[:half], tensor[half : 2 * half]], 1).flatten(0, 1), tensor[2 * half :]])


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.T.reshape(tensor.shape).contiguous() if tensor.dim() == 2 else tensor


def columns_rolled(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.roll(1, -1)


def half_negated(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor[: len(tensor) // 2], -tensor[len(tensor) // 2 :]])


ON_INPUTS: list[Change] = [halves_swapped, rows_interleaved, transposed, columns_rolled, half_negated]


def scales_dropped(scale: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(scale)


def other_dialect(scale: torch.Tensor) -> torch.Tensor:
    return scale / 2


def scales_inverted(scale: torch.Tensor) -> torch.Tensor:
    return 1 / scale


def scales_rolled(scale: torch.Tensor) -> torch.Tensor:
    return scale.roll(1, 0)


ON_SCALES: list[Change] = [scales_dropped, other_dialect, scales_inverted, scales_rolled]


@dataclass(frozen=True)
class Mutant:
    words: str
    made: Tensors


def outputs_exchanged(one: Operator, other: Operator, source: MemorySource) -> Tensors | None:
    """What two operators make with their targets exchanged: a tensor renamed into another layer."""
    if len(one.outputs) != len(other.outputs):
        return None
    made, others = run(one, source), run(other, source)
    pairs = list(zip(one.outputs, other.outputs, strict=True))
    if any(made[a].shape != others[b].shape or made[a].dtype != others[b].dtype for a, b in pairs):
        return None
    return {a: others[b] for a, b in pairs} | {b: made[a] for a, b in pairs}


def mutants(layout: Layout, source: MemorySource) -> Iterator[Mutant]:
    """Every layout in which one operator is wrong, as the tensors that come out otherwise than they should."""
    for number, operator in enumerate(layout.operators):
        where = operator.outputs[0]
        inputs = {name: source.read(name) for name in operator.inputs}
        for change in ON_INPUTS:
            changed = {name: change(tensor) for name, tensor in inputs.items()}
            if any(not torch.equal(changed[name], tensor) for name, tensor in inputs.items()):
                yield Mutant(f"{change.__name__} before {where}", operator.forward(changed))
        if len(operator.outputs) > 2:
            made = operator.forward(dict(inputs))
            rotated = [*operator.outputs[1:], operator.outputs[0]]
            yield Mutant(f"outputs of {where} rotated", {a: made[b] for a, b in zip(made, rotated, strict=True)})
        other = next(
            (each for each in layout.operators[number + 1 :] if outputs_exchanged(operator, each, source)), None
        )
        if other is not None:
            made = outputs_exchanged(operator, other, source)
            assert made is not None
            yield Mutant(f"{where} exchanged with {other.outputs[0]}", made)
        for scale in [name for name in operator.outputs if "_scale" in name]:
            for change in ON_SCALES:
                made = operator.forward(dict(inputs))
                changed_scale = change(made[scale])
                if not torch.equal(changed_scale, made[scale]):
                    yield Mutant(f"{change.__name__} of {where}", {**made, scale: changed_scale})
            without = {name: tensor for name, tensor in operator.forward(dict(inputs)).items() if name != scale}
            yield Mutant(f"no scale of {where}", without)


def unseen(
    layout: Layout, tensors: Tensors, recorded: dict[str, TensorRecord], directory: Path
) -> tuple[list[str], int]:
    """The mutants that the manifest takes for the recorded model, and how many there were."""
    source, missed, number = MemorySource(tensors), [], 0
    right = {name: each for made in layout.export(source) for name, each in made.items()}
    (directory / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}}))
    for mutant in mutants(layout, source):
        if all(name in mutant.made and torch.equal(bytes_of(mutant.made[name]), bytes_of(right[name]))
               for name in mutant.made) and "no scale" not in mutant.words:  # fmt: skip
            continue
        number += 1
        save_file({name: tensor.clone() for name, tensor in mutant.made.items()}, directory / "model.safetensors")
        expected = {name: recorded[name] for name in mutant.made if name in recorded}
        if not compare_weights(expected, records_of(directory)):
            missed.append(mutant.words)
    return missed, number


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return dict(exported_tensors(random_model(SQUARE)))


@pytest.fixture(scope="module")
def recorded(tensors: Tensors) -> dict[str, TensorRecord]:
    return {name: tensor_record(tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize("form", ["float32", "bfloat16", "fp8", "w8a8"])
def test_the_manifest_sees_every_single_wrong_operator(
    form: str, tensors: Tensors, recorded: dict[str, TensorRecord], tmp_path: Path
) -> None:
    source = MemorySource(tensors)
    if form in ("fp8", "w8a8"):
        layout = quantised_layout(source, Quantisation(form), torch.bfloat16)
    else:
        layout = dtype_layout(source, getattr(torch, form))
    missed, number = unseen(layout, tensors, recorded, tmp_path)
    print(f"{form}: {number} mutants, {len(missed)} not seen")
    assert number > 200
    assert missed == []


def test_the_manifest_sees_every_single_wrong_operator_of_the_checkpoint_layout(
    recorded: dict[str, TensorRecord], tmp_path: Path
) -> None:
    own = {name: tensor.clone() for name, tensor in own_tensors(random_model(SQUARE)).items()}
    missed, number = unseen(checkpoint_layout(SQUARE), own, recorded, tmp_path)
    print(f"checkpoint: {number} mutants, {len(missed)} not seen")
    assert number > 100
    assert missed == []


@pytest.mark.parametrize("form", ["fp8", "w8a8"])
def test_an_honest_quantised_model_is_the_recorded_one(
    form: str, tensors: Tensors, recorded: dict[str, TensorRecord], tmp_path: Path
) -> None:
    layout = quantised_layout(MemorySource(tensors), Quantisation(form), torch.bfloat16)
    made = {name: each for part in layout.export(MemorySource(tensors)) for name, each in part.items()}
    save_file({name: tensor.clone() for name, tensor in made.items()}, tmp_path / "model.safetensors")
    assert compare_weights(recorded, records_of(tmp_path)) == []


@pytest.mark.parametrize(
    ("how", "kind", "words"),
    [
        (halves_swapped, "rows permuted", "has the recorded rows in another order"),
        (columns_rolled, "columns permuted", "has the recorded columns in another order"),
        (transposed, "transposed", "is transposed"),
        (lambda tensor: tensor * 1.3, "scaled", "is the recorded tensor times 1."),
    ],
)
@pytest.mark.parametrize("form", ["fp8", "w8a8"])
def test_how_a_quantised_tensor_differs_is_said(
    form: str, how: Change, kind: str, words: str, recorded: dict[str, TensorRecord], tensors: Tensors, tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    source = MemorySource({name: how(tensors[name])})
    made = run(quantised_layout(source, Quantisation(form), torch.bfloat16).operators[0], source)
    save_file({each: tensor.clone() for each, tensor in made.items()}, tmp_path / "model.safetensors")
    [difference] = compare_weights({name: recorded[name]}, records_of(tmp_path))
    if form == "fp8" and kind in ("rows permuted", "transposed"):  # 64 norms of 64 numbers are too alike for it
        kind, words = "other", "holds other numbers"
    assert difference.kind == kind
    assert words in difference.words


def test_a_scale_that_is_left_over_is_surplus(tensors: Tensors, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    save_file({name: tensors[name], scale_name(name, torch.int8): torch.ones(64, 1)}, tmp_path / "model.safetensors")
    [difference] = compare_weights({name: tensor_record(tensors[name])}, records_of(tmp_path))
    assert (difference.kind, difference.tensor) == ("surplus", f"{name}_scale")


def test_a_record_of_an_older_bundle_is_compared_by_what_it_has(tensors: Tensors, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    document = tensor_record(tensors[name]).document()
    assert "rounding" not in document
    assert TensorRecord.from_document(json.loads(json.dumps(document))) == tensor_record(tensors[name])
    del document["projections"]
    older = {name: TensorRecord.from_document(document)}
    source = MemorySource({name: tensors[name]})
    operator = quantised_layout(source, Quantisation("w8a8"), torch.bfloat16).operators[0]
    save_file(run(operator, source), tmp_path / "model.safetensors")
    assert compare_weights(older, records_of(tmp_path)) == []
    save_file(operator.forward({name: halves_swapped(tensors[name])}), tmp_path / "model.safetensors")
    assert [each.kind for each in compare_weights(older, records_of(tmp_path))] == ["rows permuted"]


def test_what_was_recorded_in_fp16_is_itself_in_fp32_and_nothing_near_it_is(tensors: Tensors) -> None:
    half = tensors["model.layers.1.self_attn.o_proj.weight"].half()
    recorded = {"w": tensor_record(half)}
    assert compare_weights(recorded, {"w": tensor_record(half.float())}) == []
    near = half.float()
    near[0, 0] = near[0, 0].nextafter(torch.tensor(1.0))
    for other in (near, half.float() * 2, half.float().flip(0)):
        assert len(compare_weights(recorded, {"w": tensor_record(other)})) == 1
    assert "sha256_fp16" not in tensor_record(half.float()).document()
