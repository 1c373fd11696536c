"""Each operator in both directions, on numbers and on meta tensors, and what does not fit it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosschip.errors import HandoffError
from crosschip.handoff.conversion.layout import Layout
from crosschip.handoff.conversion.operators import (
    Cast,
    Chain,
    Copy,
    Interleave,
    Inverse,
    Operator,
    Quantise,
    Rename,
    Reshape,
    Split,
    Stack,
    Tensors,
    Transpose,
)
from crosschip.model.quantised import Quantisation

SHAPES = {"a": (4, 6, 2), "b": (4, 6, 2), "m": (8, 6)}
OPERATORS: list[Operator] = [
    Rename("a", "x"),
    Transpose("a", "x", (2, 0, 1)),
    Reshape("a", "x", (4, 6, 2), (8, 3, 2)),
    Interleave("a", "x", parts=3, blocks=2, dim=1),
    Interleave("m", "x", parts=2, blocks=2, dim=0),
    Interleave("m", "x", parts=2, dim=-1),
    Stack(("a", "b"), "x", dim=1),
    Split("a", ("x", "y"), (2, 4), dim=1),
    Copy("a", ("x", "y")),
    Inverse(Stack(("x0", "x1", "x2", "x3"), "a")),
    Chain((Stack(("a", "b"), "s"), Transpose("s", "t", (1, 0, 2, 3)), Split("t", ("x", "y"), (1, 3)))),
    Chain((Inverse(Stack(tuple("0123"), "a")), *(Split(e, (f"x{e}", f"y{e}"), (2, 4)) for e in "0123"))),
]


def inputs(operator: Operator, seed: int, device: str = "cpu") -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(SHAPES[name], generator=generator).to(device) for name in operator.inputs}


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda each: type(each).__name__)
@given(seed=st.integers(0, 100))
@settings(deadline=None, max_examples=5)
def test_there_and_back_is_the_same_bit_for_bit(operator: Operator, seed: int) -> None:
    given_ = inputs(operator, seed)
    made = operator.forward(dict(given_))
    assert tuple(sorted(made)) == tuple(sorted(operator.outputs))
    back = operator.backward(dict(made))
    assert back.keys() == given_.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in given_.items())
    again = Inverse(operator).backward(back)
    assert all(torch.equal(again[name], tensor) for name, tensor in made.items())


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda each: type(each).__name__)
def test_meta_tensors_tell_the_shapes(operator: Operator) -> None:
    made = operator.forward(inputs(operator, 0))
    planned = operator.forward(inputs(operator, 0, "meta"))
    assert {name: tensor.shape for name, tensor in made.items()} == {n: t.shape for n, t in planned.items()}
    back = operator.backward(planned)
    assert {name: tuple(tensor.shape) for name, tensor in back.items()} == {n: SHAPES[n] for n in operator.inputs}


@pytest.mark.parametrize("kind", ["fp8", "w8a8"])
def test_codes_and_scales_go_back_and_forth_bit_for_bit(kind: str) -> None:
    operator = Quantise("m", "w", "s", Quantisation(kind, (4, 4)))
    stored = operator.forward({"m": torch.randn(10, 7)})
    again = operator.forward(operator.backward(dict(stored)))
    assert torch.equal(again["w"].view(torch.uint8), stored["w"].view(torch.uint8))
    assert torch.equal(again["s"], stored["s"])
    planned = operator.forward({"m": torch.empty(10, 7, device="meta")})
    facts = [(name, tensor.shape, tensor.dtype) for name, tensor in stored.items()]
    assert facts == [(name, tensor.shape, tensor.dtype) for name, tensor in planned.items()]
    assert operator.backward(planned)["m"].shape == (10, 7)


def test_rounding_comes_back_bit_for_bit_from_the_coarser_side() -> None:
    operator = Cast("a", "x", torch.bfloat16)
    rounded = operator.forward(inputs(operator, 0))["x"]
    assert torch.equal(operator.forward(operator.backward({"x": rounded}))["x"], rounded)


def test_interleaving_is_that_of_rotary_embeddings() -> None:
    head = torch.tensor([0, 1, 2, 10, 11, 12])
    made = Interleave("q", "k", parts=2, blocks=2).forward({"q": torch.cat([head, head + 100])})["k"]
    assert made.tolist() == [0, 10, 1, 11, 2, 12, 100, 110, 101, 111, 102, 112]


@pytest.mark.parametrize(
    ("operator", "tensors", "words"),
    [
        (Split("a", ("x", "y"), (2, 2)), {"a": torch.zeros(5)}, r"a has 5 along dimension 0, expected 2 \+ 2"),
        (Stack(("a", "b"), "x"), {"a": torch.zeros(2), "b": torch.zeros(3)}, r"b has shape \(3,\), a has \(2,\)"),
        (Inverse(Stack(("a", "b"), "x")), {"x": torch.zeros(3, 2)}, "x stacks 3 tensors, expected 2"),
        (Reshape("a", "x", (2, 2), (4,)), {"a": torch.zeros(4)}, r"a has shape \(4,\), expected \(2, 2\)"),
        (Interleave("a", "x", 2, 2), {"a": torch.zeros(6)}, "a has 6 along dimension 0"),
        (Inverse(Copy("a", ("x", "y"))), {"x": torch.zeros(2), "y": torch.ones(2)}, "y differs from x"),
        (Inverse(Split("a", ("x", "y"), (2, 2))), {"x": torch.zeros(2), "y": torch.ones(3)}, "y has 3 along"),
    ],
)
def test_what_does_not_fit_is_named(operator: Operator, tensors: Tensors, words: str) -> None:
    with pytest.raises(HandoffError, match=words):
        operator.forward(tensors)


def test_a_layout_that_takes_or_gives_a_tensor_twice_is_refused() -> None:
    with pytest.raises(HandoffError, match="a stands in the inputs of two operators"):
        Layout("l", (Rename("a", "x"), Rename("a", "y")))
    with pytest.raises(HandoffError, match="x stands in the outputs of two operators"):
        Layout("l", (Rename("a", "x"), Rename("b", "x")))
