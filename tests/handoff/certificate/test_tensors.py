"""The manifest gate: each single wrong tensor is named, in every form, and honest files pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosschip.golden.bundle import Bundle
from crosschip.handoff.certificate.arrived import open_arrived
from crosschip.handoff.certificate.gate import Gate
from crosschip.handoff.certificate.tensors import differs_from_source, manifest_gate, rounding_bound
from crosschip.handoff.conversion.layout import TensorSource
from crosschip.handoff.conversion.sources import SafetensorsSource
from crosschip.handoff.source import open_source
from crosschip.handoff.targets import TARGETS
from crosschip.model.quantised import dequantise_blocks, dequantise_channels, quantise_blocks, quantise_channels
from tests.handoff.certificate.conftest import Tensors, change_tensors

O_PROJ, EXPERT = "model.layers.0.self_attn.o_proj.weight", "model.layers.1.mlp.experts.3.down_proj.weight"


def gate_of(bundle: Bundle, directory: Path, target: str, source: Path | None = None) -> Gate:
    at_hand = None if source is None else open_source(source).tensors
    return manifest_gate(bundle, open_arrived(directory).tensors, source=at_hand, quantised=TARGETS[target].quantised)[
        0
    ]


@pytest.mark.parametrize("target", ["hf", "fp8", "w8a8"])
def test_honest_files_pass(bundle: Bundle, exported: Callable[[str], Path], model_dir: Path, target: str) -> None:
    gate = gate_of(bundle, exported(target), target, model_dir)
    assert (gate.verdict, gate.subject) == ("PASS", None)
    measured = {measure.what: measure.value for measure in gate.measures}
    assert measured["tensors"] == len(bundle.weights)
    if target != "hf":
        assert 0.3 < float(measured["largest error over its rounding bound"]) <= 1, "the bound is no wider than it must"
    assert gate_of(bundle, exported(target), target).verdict == "PASS", "also where the source is not at hand"


def swap_rows(tensors: Tensors, name: str = O_PROJ) -> None:
    tensors[name][[2, 5]] = tensors[name][[5, 2]]


def scale(tensors: Tensors, name: str, factor: float) -> None:
    tensors[name] *= factor


def fill(tensors: Tensors, name: str) -> None:
    tensors[name].fill_(1.0)


def drop(tensors: Tensors, name: str) -> None:
    del tensors[name]


FAULTS: dict[str, tuple[Callable[[Tensors], None], str, str]] = {
    "rows": (swap_rows, O_PROJ, "rows in another order"),
    "transposed": (lambda t: t.update({EXPERT: t[EXPERT].T}), EXPERT, "transposed"),
    "missing": (lambda t: drop(t, "model.norm.weight"), "model.norm.weight", "missing"),
    "scaled": (lambda t: scale(t, O_PROJ, 1.01), O_PROJ, "times 1.01"),
    "surplus": (lambda t: t.update({"model.extra": torch.ones(2)}), "model.extra", "was not there"),
    "shape": (lambda t: t.update({O_PROJ: t[O_PROJ][:-1]}), O_PROJ, "shape"),
    "nan": (lambda t: scale(t, O_PROJ, torch.nan), O_PROJ, "other numbers"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_single_wrong_tensor_is_named(bundle: Bundle, copied: Callable[[str], Path], fault: str) -> None:
    how, name, words = FAULTS[fault]
    directory = copied("hf")
    change_tensors(directory, how)
    gate, differences = manifest_gate(bundle, SafetensorsSource(directory))  # as they lie: no reader refuses before
    assert [each.tensor for each in differences] == [name]
    assert gate.verdict == "FAIL"
    assert gate.subject == name
    assert words in gate.message


@pytest.mark.parametrize(
    ("target", "how", "words"),
    [
        ("w8a8", swap_rows, "rows in another order"),
        ("w8a8", lambda t: t[f"{O_PROJ}_scale"].fill_(1.0), f"{O_PROJ} "),
        ("w8a8", lambda t: t[O_PROJ].neg_(), "times -1"),
        ("fp8", lambda t: t[f"{O_PROJ}_scale_inv"].fill_(1.0), "times"),
        ("fp8", lambda t: t[f"{O_PROJ}_scale_inv"].mul_(2.0), "times 2"),
        ("fp8", lambda t: t[EXPERT].copy_(t[EXPERT].T.clone()), "is transposed"),
        ("fp8", lambda t: t["model.norm.weight"].mul_(1.5), "model.norm.weight holds other numbers"),
    ],
)
def test_a_wrong_quantised_tensor_is_named(
    bundle: Bundle,
    copied: Callable[[str], Path],
    model_dir: Path,
    target: str,
    how: Callable[[Tensors], None],
    words: str,
) -> None:
    directory = copied(target)
    change_tensors(directory, how)
    gate = gate_of(bundle, directory, target, model_dir)
    assert gate.verdict == "FAIL"
    assert words in gate.message


def test_a_dropped_scale_shows_without_the_source_and_a_permutation_is_not_covered(
    bundle: Bundle, copied: Callable[[str], Path]
) -> None:
    directory = copied("fp8")
    change_tensors(directory, lambda t: fill(t, f"{O_PROJ}_scale_inv"))
    gate = gate_of(bundle, directory, "fp8")
    assert (gate.verdict, gate.subject) == ("FAIL", O_PROJ)
    assert any("the order inside quantised tensors" in words for words in gate.not_covered)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 40), columns=st.integers(1, 40), spread=st.floats(0.0, 4.0))
def test_the_rounding_bound_holds_whatever_the_numbers(seed: int, rows: int, columns: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= torch.exp(spread * torch.randn(rows, columns, generator=generator))
    back = {
        "int8": dequantise_channels("w", *quantise_channels(weight)),
        "fp8": dequantise_blocks("w", *quantise_blocks(weight), (128, 128)),
    }
    for kind, found in back.items():
        assert bool(((found - weight).abs() <= rounding_bound(kind, weight)).all()), kind
        assert not bool(((found * 1.2 - weight).abs() <= rounding_bound(kind, weight)).all()), kind


def test_a_bundle_of_other_weights_is_told_apart(
    bundle: Bundle, copied: Callable[[str], Path], model_dir: Path
) -> None:
    assert differs_from_source(bundle, open_source(model_dir).tensors) is None
    directory = copied("hf")
    change_tensors(directory, swap_rows)
    assert str(differs_from_source(bundle, open_source(directory).tensors)).startswith(O_PROJ)


class Counted(str):
    """A name that counts how often it is looked up."""

    num_hashes = 0

    def __hash__(self) -> int:
        Counted.num_hashes += 1
        return super().__hash__()


class Named:
    """A source whose names are counted."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self._names = [Counted(name) for name in source.names()]
        self.shape, self.dtype, self.read = source.shape, source.dtype, source.read

    def names(self) -> list[Counted]:
        return self._names


def test_names_are_looked_up_a_few_times_each_however_many_there_are(
    bundle: Bundle, exported: Callable[[str], Path]
) -> None:
    source = Named(open_arrived(exported("hf")).tensors)
    assert manifest_gate(bundle, source)[0].verdict == "PASS"
    assert 0 < Counted.num_hashes < 20 * len(source.names())
