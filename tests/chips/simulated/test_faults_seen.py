"""A planted fault sees the calls that a chip's kernels would see, and what it gives is what the chip gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from crosschip.chips.simulated import plant
from tests.chips.simulated.planted import Broken, Changed, Watching


def calls_of(function: Callable[[], Any]) -> list[str]:
    watching = Watching()
    plant([watching])
    function()
    plant([])
    return watching.calls


X = torch.ones(2, 4, device="cpu")


def on_chip(values: torch.Tensor) -> torch.Tensor:
    return values.to("sim")


def doubled(result: Any) -> Any:
    return result * 2


def test_a_fault_in_a_product_is_seen_by_a_linear_layer() -> None:
    linear = torch.nn.Linear(4, 3, bias=False).to("sim")
    right = linear(on_chip(X))
    plant([Changed("aten.mm", doubled)])
    assert torch.equal(linear(on_chip(X)), right * 2)
    with torch.inference_mode():
        assert torch.equal(linear(on_chip(X)), right.detach() * 2)
    with torch.no_grad():
        assert torch.equal(F.linear(on_chip(X), linear.weight), right.detach() * 2)
    plant([])
    assert torch.equal(linear(on_chip(X)), right)


def test_a_fault_in_a_product_is_seen_by_the_backward_pass() -> None:
    def gradient() -> torch.Tensor:
        linear.zero_grad()
        linear(on_chip(X)).sum().backward()
        assert linear.weight.grad is not None
        return linear.weight.grad.clone()

    linear = torch.nn.Linear(4, 3).to("sim")  # forward is addmm, backward is mm
    right = gradient()
    fault = Changed("aten.mm", doubled)
    plant([fault])
    assert torch.equal(gradient(), right * 2)
    assert fault.num_changed == 1


@pytest.mark.parametrize("foreach", [False, True])
def test_a_fault_in_the_optimizers_arithmetic_is_seen(foreach: bool) -> None:
    def trained() -> torch.Tensor:
        parameter = torch.nn.Parameter(torch.ones(3, device="sim"))
        parameter.grad = torch.ones(3, device="sim")
        torch.optim.SGD([parameter], lr=0.5, foreach=foreach).step()
        return parameter.detach()

    right = trained()
    fault = Changed("aten.add_", lambda result: result + 1)
    plant([fault])
    assert torch.equal(trained(), right + 1)
    assert fault.num_changed == 1


def test_a_call_over_a_list_is_seen_whole_and_one_by_one() -> None:
    values = [torch.ones(2, device="sim"), torch.ones(3, device="sim")]
    calls = calls_of(lambda: torch._foreach_mul_(values, 2.0))
    assert calls == ["aten._foreach_mul_.Scalar", "aten.mul_.Scalar", "aten.mul_.Scalar"] or calls == [
        "aten._foreach_mul_.Scalar",
        "aten.mul_.Tensor",
        "aten.mul_.Tensor",
    ]


@pytest.mark.parametrize(
    ("function", "call"),
    [
        (lambda x: x + x, "aten.add.Tensor"),
        (lambda x: x @ x, "aten.mm.default"),
        (lambda x: x.softmax(-1), "aten._softmax.default"),
        (lambda x: F.layer_norm(x, (4,)), "aten.native_layer_norm.default"),
        (lambda x: F.embedding(torch.zeros(2, dtype=torch.int64, device="sim"), x), "aten.embedding.default"),
        (lambda x: F.gelu(x), "aten.gelu.default"),
        (lambda x: x.sum(), "aten.sum.default"),
        (lambda x: x.clone(), "aten.clone.default"),
        (lambda x: x.to(torch.bfloat16), "aten._to_copy.default"),
        (lambda x: x.to(torch.bfloat16), "aten.copy_.default"),  # a part of it
        (lambda x: torch.zeros_like(x), "aten.zeros_like.default"),
        (lambda x: x.new_full((2,), 3.0), "aten.new_full.default"),
        (lambda x: x.mul_(2), "aten.mul_.Tensor"),
        (lambda x: torch.cat([x, x]), "aten.cat.default"),
        (lambda x: torch.add(x, x, out=x), "aten.add.out"),
        (lambda x: x.view(-1), "aten.view.default"),
        (lambda x: x[0], "aten.select.int"),
        (lambda x: x[1:], "aten.slice.Tensor"),
        (lambda x: x.t(), "aten.t.default"),
        (lambda x: x.split([1, 3]), "aten.split_with_sizes.default"),
        (lambda x: x.as_strided((2,), (1,)), "aten.as_strided.default"),
        (lambda x: F.cross_entropy(x, x.argmax(-1)), "aten.nll_loss_forward.default"),
        (
            lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]),
            "aten.scaled_dot_product_attention.default",
        ),
    ],
)
@pytest.mark.parametrize("inference", [False, True])
def test_calls_bear_the_names_that_a_trace_shows(function: Any, call: str, inference: bool) -> None:
    with torch.inference_mode(inference):
        x = torch.ones(4, 4, device="sim")
        assert call in calls_of(lambda: function(x))


def test_a_view_that_a_fault_copies_shares_no_memory_any_more() -> None:
    x = torch.ones(2, 3, device="sim")
    plant([Changed("aten.transpose", lambda result: result.contiguous())])
    copied = x.transpose(0, 1)
    plant([])
    copied.zero_()
    assert copied.stride() == (2, 1)
    assert x.tolist() == [[1.0] * 3] * 2


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_views_under_a_fault_are_those_of_the_cpu(needs_gradient: bool) -> None:
    def views(x: torch.Tensor) -> list[torch.Tensor]:
        parts = [*x.split(2), *x.unbind(0), *x.chunk(2, 1)]
        return [*parts, x[1:2], x[0], x.unsqueeze(0), x.expand(5, 3, 4), x.permute(1, 0), x.diagonal(), x.squeeze()]

    plant([Changed("aten.mm", lambda result: result)])
    x = torch.arange(12.0, device="sim").view(3, 4).requires_grad_(needs_gradient)
    for mine, honest in zip(views(x), views(x.detach().cpu().requires_grad_(needs_gradient)), strict=True):
        assert mine.tolist() == honest.tolist()
        assert mine.stride() == honest.stride()
        assert mine.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_what_a_fault_returns_for_a_cast_is_the_cast() -> None:
    x = torch.tensor([1.0, 2.0], device="sim")
    plant([Changed("aten._to_copy", lambda result: result * 2), Changed("aten.copy_", lambda result: result + 1)])
    assert x.to(torch.float64).tolist() == [4.0, 6.0]
    assert x.cpu().tolist() == [1.0, 2.0]


def test_attention_and_its_gradient_are_one_call_each() -> None:
    query = torch.randn(1, 1, 4, 4, device="sim", requires_grad=True)
    calls = calls_of(lambda: F.scaled_dot_product_attention(query, query, query).sum().backward())
    assert calls.count("aten.scaled_dot_product_attention.default") == 1
    assert calls.count("crosschip_sim.attention_backward.default") == 1
    assert not [call for call in calls if "softmax" in call]


def test_attention_with_dropout_is_taken_apart() -> None:
    query = torch.randn(1, 1, 4, 4, device="sim")
    calls = calls_of(lambda: F.scaled_dot_product_attention(query, query, query, dropout_p=0.5))
    assert calls.count("aten.bmm.default") == 2
    assert "aten.scaled_dot_product_attention.default" not in calls


def test_what_a_fault_returns_is_written_into_the_argument_of_a_call_in_place() -> None:
    x = torch.ones(3, device="sim")
    view = x[:2]
    plant([Changed("aten.add_", lambda result: result.clone() * 10)])
    returned = x.add_(1)
    assert returned is x
    assert x.tolist() == [20.0, 20.0, 20.0]
    assert view.tolist() == [20.0, 20.0]


def test_also_when_it_shares_the_arguments_memory() -> None:
    x = torch.arange(4.0, device="sim").view(2, 2)
    plant([Changed("aten.add_", lambda result: result.t())])
    x.add_(1)
    assert x.tolist() == [[1.0, 3.0], [2.0, 4.0]]


def test_and_into_out_with_its_shape() -> None:
    out = torch.empty(0, device="sim")
    plant([Changed("aten.add.out", lambda result: result[:2] * 10)])
    returned = torch.add(torch.ones(3, device="sim"), 1, out=out)
    assert returned is out
    assert out.tolist() == [20.0, 20.0]


def test_and_for_several_results() -> None:
    values, indices = torch.empty(0, device="sim"), torch.empty(0, dtype=torch.int64, device="sim")
    plant([Changed("aten.sort", lambda result: (result[0] + 100, result[1].flip(0)))])
    torch.sort(torch.tensor([3.0, 1.0, 2.0], device="sim"), out=(values, indices))
    assert values.tolist() == [101.0, 102.0, 103.0]
    assert indices.tolist() == [0, 2, 1]


@pytest.mark.parametrize(
    "change",
    [
        lambda result: result.double(),
        lambda result: result[:1],
        lambda result: result.t().contiguous().t(),
        lambda result: result.to(torch.int32).unsqueeze(0),
    ],
)
def test_a_result_of_another_kind_is_seen_as_such(change: Any) -> None:
    x = torch.ones(2, 3, device="sim")
    wanted = change(x.cpu() + x.cpu())
    plant([Changed("aten.add", change)])
    made = x + x
    assert (made.dtype, made.shape, made.stride()) == (wanted.dtype, wanted.shape, wanted.stride())
    assert torch.equal(made.cpu(), wanted)


def test_a_fault_that_gives_an_argument_back_gives_new_memory() -> None:
    class Lazy:
        name = "lazy"

        def operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Any) -> Any:
            return args[0] if str(op).startswith("aten.relu.") else compute(*args, **kwargs)

    plant([Lazy()])
    x = torch.tensor([-1.0, 1.0], device="sim", requires_grad=True)
    made = x.relu()
    assert made.data_ptr() != x.data_ptr()
    made.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0]


def test_a_fault_that_gives_the_same_tensor_each_time_gives_new_memory() -> None:
    stale = torch.ones(2)
    plant([Changed("aten.relu.", lambda result: stale)])
    first, second = torch.zeros(2, device="sim").relu(), torch.zeros(2, device="sim").relu()
    second.add_(1)
    assert first.tolist() == [1.0, 1.0]
    assert second.tolist() == [2.0, 2.0]


def test_a_fault_may_write_into_arguments() -> None:
    class Flipping:
        name = "flipping"

        def operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Any) -> Any:
            if str(op) == "aten.mm.default":
                args[1][0, 0] = 5.0
            return compute(*args, **kwargs)

    weight = torch.zeros(2, 2, device="sim")
    plant([Flipping()])
    made = torch.ones(1, 2, device="sim") @ weight
    assert made.tolist() == [[5.0, 0.0]]
    assert weight[0, 0].item() == 5.0


def test_a_fault_may_compute_twice_or_with_other_arguments() -> None:
    class Coarse:
        name = "coarse"

        def operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Any) -> Any:
            if str(op) != "aten.mul.Tensor":
                return compute(*args, **kwargs)
            compute(*args, **kwargs)
            return compute(args[0].round(), *args[1:], **kwargs)

    plant([Coarse()])
    assert (torch.tensor([1.4], device="sim") * 3).item() == 3.0


def test_a_missing_operator_raises_where_it_is_called() -> None:
    plant([Broken("aten.mm")])
    with pytest.raises(NotImplementedError, match=r"aten\.mm\.default is not there"):
        torch.ones(2, 2, device="sim") @ torch.ones(2, 2, device="sim")
    x = torch.ones(1, 4, device="sim", requires_grad=True)
    linear = torch.nn.Linear(4, 2).to("sim")
    loss = linear(x).sum()
    with pytest.raises(NotImplementedError, match=r"aten\.mm\.default is not there"):
        loss.backward()


def test_faults_lie_around_each_other_the_first_outermost() -> None:
    plant([Changed("aten.neg", lambda result: result + 1), Changed("aten.neg", lambda result: result * 10)])
    assert (-torch.ones(1, device="sim")).item() == -9.0


def test_faults_do_not_act_on_the_host_or_on_copies_between() -> None:
    plant([Changed("aten.", lambda result: result * 0)])
    assert (torch.ones(2) + 1).tolist() == [2.0, 2.0]
    assert torch.ones(2).to("sim").cpu().tolist() == [1.0, 1.0]


def test_a_fault_sees_its_own_dtype_under_the_hosts_autocast() -> None:
    plant([Changed("aten.mm", lambda result: result + (torch.ones(1, 1) @ torch.ones(1, 1)).sum())])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (torch.ones(1, 1, device="sim") @ torch.ones(1, 1, device="sim")).dtype == torch.float32


def test_a_fault_with_too_few_results_is_told() -> None:
    plant([Changed("aten.sort", lambda result: (result[0],))])
    values, indices = torch.empty(0, device="sim"), torch.empty(0, dtype=torch.int64, device="sim")
    with pytest.raises(TypeError, match="gives 2 results; a planted fault returned 1"):
        torch.sort(torch.ones(2, device="sim"), out=(values, indices))
