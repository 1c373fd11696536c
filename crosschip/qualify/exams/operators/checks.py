"""Checks of one operator call on one device. They need torch only: reproducers hold their text."""

from __future__ import annotations

from typing import Any

import torch

from crosschip.qualify.tracing.inputs import as_real, make_arguments, operator_named

__all__ = [
    "GRADIENT_OF",
    "differs",
    "errs",
    "errs_in_turn",
    "gradients",
    "is_biased",
    "is_misshapen",
    "outputs",
    "overwrites",
    "restless",
    "views_otherwise",
]


GRADIENT_OF = "gradient of "


def outputs(
    device: str, operator: str, args: list[Any], kwargs: dict[str, Any], seed: int, wide: bool = False
) -> list[Any]:
    """What a call returns and then what it has written, on the CPU; in fp64 from exactly upcast inputs if `wide`.

    Complex numbers are given as pairs of real ones, which are judged like others.
    `gradient of aten.silu.default` is an operator's gradient; its first argument is that of the output.
    """
    op = operator_named(operator.removeprefix(GRADIENT_OF))
    made_args, made_kwargs = make_arguments(args, kwargs, seed, device)
    if wide:
        made_args, made_kwargs = tuple(_widened(each) for each in made_args), _widened(made_kwargs)
        if "softmax" in operator and len(made_args) > 2 and made_args[2] is True:
            made_args = (*made_args[:2], False)
    if operator.startswith(GRADIENT_OF):
        return [each.cpu() for each in gradients(op, made_args[0], made_args[1:], made_kwargs)]
    found = [op(*made_args, **made_kwargs)]
    for place, argument in enumerate(op._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(made_args[place] if place < len(made_args) else made_kwargs.get(argument.name))
    return [as_real(each.detach().cpu()) for each in _tensors(found)]


def gradients(op: Any, grad: torch.Tensor, args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The gradients of an operator's first output for the floating-point tensors among its arguments."""
    leaves: list[torch.Tensor] = []

    def asked(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            leaves.append(value.detach().requires_grad_())
            return leaves[-1]
        if isinstance(value, (list, tuple)):
            return type(value)(asked(each) for each in value)
        return value

    with torch.enable_grad():
        result = op(*[asked(each) for each in args], **{name: asked(each) for name, each in kwargs.items()})
        first = result[0] if isinstance(result, (list, tuple)) else result
        found = torch.autograd.grad(first, leaves, grad, allow_unused=True)
    return [each.detach() for each in found if each is not None]


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [each for one in value for each in _tensors(one)] if isinstance(value, (list, tuple)) else []


def _widened(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        if value.is_complex():
            return value.to(torch.complex128)
        return value.double() if value.is_floating_point() else value
    if isinstance(value, torch.dtype):
        if value.is_complex:
            return torch.complex128
        return torch.float64 if value.is_floating_point else value
    if isinstance(value, dict):
        return {name: _widened(each) for name, each in value.items()}
    return type(value)(_widened(each) for each in value) if isinstance(value, (list, tuple)) else value


def differs(device: str, operator: str, args: list[Any], kwargs: dict[str, Any], seed: int) -> tuple[bool, str, str]:
    """Whether results that every device has exactly are other numbers than the CPU's."""
    got = outputs(device, operator, args, kwargs, seed)
    for mine, right in zip(got, outputs("cpu", operator, args, kwargs, seed), strict=True):
        if mine.shape != right.shape or mine.dtype != right.dtype:
            return True, f"{right.dtype} {list(right.shape)}", f"{mine.dtype} {list(mine.shape)}"
        unequal = ((mine != right) & ~((mine != mine) & (right != right))).flatten()
        if bool(unequal.any()):
            place = int(unequal.nonzero()[0])
            expected = f"{right.flatten()[place].item()} at place {place} of {right.numel()}"
            return True, expected, f"{mine.flatten()[place].item()}; {int(unequal.sum())} places differ"
    return False, "equal numbers", "equal numbers"


def errs(
    device: str, operator: str, args: list[Any], kwargs: dict[str, Any], seed: int, times: float
) -> tuple[bool, str, str]:
    """Whether a result is further from fp64 than `times` what honest calculation in its dtype is, in RMS or anywhere.

    Honest is taken to be the CPU's own error, at least the rounding of the fp64 result.
    """
    got = outputs(device, operator, args, kwargs, seed)
    own = outputs("cpu", operator, args, kwargs, seed)
    wide = outputs("cpu", operator, args, kwargs, seed, wide=True)
    worst = 0.0
    for mine, right, exact in zip(got, own, wide, strict=True):
        if not right.is_floating_point() or mine.numel() == 0:
            continue
        rounding = (exact.to(right.dtype).double() - exact).abs()
        kept = rounding.isfinite() & right.isfinite()
        honest = torch.maximum((right.double() - exact).abs(), rounding)[kept]
        error = (mine.double() - exact).abs().nan_to_num(nan=float("inf"))[kept]
        usual = float(honest.square().mean().sqrt())
        half_place = exact.abs()[kept] * torch.finfo(right.dtype).eps / 2
        ratio = float(error.square().mean().sqrt()) / max(usual, 1e-300)
        single = float((error / (half_place + usual + honest).clamp(min=1e-300)).max())
        worst = max(worst, ratio if error.any() else 0.0, single)
    return worst > times, f"at most {times:g} times the honest error", f"{worst:.4g} times"


def errs_in_turn(
    device: str, operator: str, args: list[Any], kwargs: dict[str, Any], seed: int, times: float, draws: int
) -> tuple[bool, str, str]:
    """The same for one set of inputs after the other, until a result is wrong: it may be that of an earlier call."""
    found = (False, "", "")
    for number in range(draws):
        found = errs(device, operator, args, kwargs, seed + number, times)
        if found[0]:
            return True, found[1], f"{found[2]} in call {number + 1}"
    return found


def is_biased(
    device: str, operator: str, args: list[Any], kwargs: dict[str, Any], seed: int, limit: float, draws: int
) -> tuple[bool, str, str]:
    """Whether errors have one sign: their mean over several seeds against the RMS of rounding to the result's dtype.

    Means are taken away from zero, upwards, and in proportion to the result; the CPU's own are subtracted.
    """
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    for number in range(draws):
        got = outputs(device, operator, args, kwargs, seed + number)
        own = outputs("cpu", operator, args, kwargs, seed + number)
        wide = outputs("cpu", operator, args, kwargs, seed + number, wide=True)
        for mine, right, exact in zip(got, own, wide, strict=True):
            if not right.is_floating_point() or mine.numel() == 0:
                continue
            kept = exact.isfinite() & right.isfinite() & mine.isfinite()
            exact, error = exact[kept], (mine.double() - right.double())[kept]
            rounding = (exact.to(right.dtype).double() - exact).square().mean().sqrt().clamp(min=1e-300)
            size = exact.square().mean().sqrt().clamp(min=1e-300)
            means = [(error * each).mean() / rounding for each in (exact.sign(), torch.ones_like(exact), exact / size)]
            sums += torch.stack(means)
            count += 1
    worst = float((sums / max(1, count)).abs().max())
    return worst > limit, f"a mean error of at most {limit:g} of the rounding's", f"{worst:.4g} of it"


def is_misshapen(
    device: str, operator: str, args: list[Any], kwargs: dict[str, Any], seed: int
) -> tuple[bool, str, str]:
    """Whether results have another number, dtype or shape than the CPU's."""
    got, right = (
        [(str(each.dtype), list(each.shape)) for each in outputs(where, operator, args, kwargs, seed)]
        for where in (device, "cpu")
    )
    return got != right, str(right), str(got)


def views_otherwise(
    device: str, operator: str, args: list[Any], kwargs: dict[str, Any], seed: int
) -> tuple[bool, str, str]:
    """Whether views have other strides than the CPU's."""
    op = operator_named(operator)
    if not op.is_view:  # a result of its own may be laid out otherwise
        return False, "a view", "no view"
    found = []
    for place in (device, "cpu"):
        made_args, made_kwargs = make_arguments(args, kwargs, seed, place)
        found.append([list(each.stride()) for each in _tensors([op(*made_args, **made_kwargs)])])
    return found[0] != found[1], f"strides {found[1]}", f"strides {found[0]}"


def overwrites(device: str, operator: str, args: list[Any], kwargs: dict[str, Any], seed: int) -> tuple[bool, str, str]:
    """Whether a call changes an argument that it must only read."""
    op = operator_named(operator)
    before, _ = make_arguments(args, kwargs, seed, "cpu")
    made_args, made_kwargs = make_arguments(args, kwargs, seed, device)
    op(*made_args, **made_kwargs)
    for place, argument in enumerate(op._schema.arguments[: len(made_args)]):
        if argument.alias_info is not None and argument.alias_info.is_write:
            continue
        for old, new in zip(_tensors([before[place]]), _tensors([made_args[place]]), strict=True):
            different = (old != new.cpu()) & ~((old != old) & (new.cpu() != new.cpu()))
            if bool(different.any()):
                return True, f"argument {argument.name} as before", f"{int(different.sum())} numbers of it differ"
    return False, "arguments as before", "arguments as before"


def restless(
    device: str, operator: str, args: list[Any], kwargs: dict[str, Any], seed: int, times: int
) -> tuple[bool, str, str]:
    """Whether the same call on the same inputs gives other bits, when it is repeated."""
    first = outputs(device, operator, args, kwargs, seed)
    for number in range(1, times):
        for a, b in zip(first, outputs(device, operator, args, kwargs, seed), strict=True):
            different = int(((a != b) & ~((a != a) & (b != b))).sum())
            if different:
                return (
                    True,
                    "equal bits each time",
                    f"repetition {number} differs in {different} of {a.numel()} numbers",
                )
    return False, "equal bits each time", "equal bits each time"
