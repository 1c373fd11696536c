"""One operator call of a chip, judged against fp64 on the CPU. Needs torch only: reproducers hold this file's text.

The inputs are what the chip had, so errors of earlier calls do not count. Honest error is taken to be the CPU's own in
the same dtype, at least the rounding of the result, and for sums what a chip that adds one term after the other loses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from crosschip.qualify.tracing.inputs import as_real, make_arguments, operator_named
from crosschip.qualify.tracing.ties import chooses_as_well

__all__ = ["ERROR_RATIO_LIMIT", "call_is_wrong", "deviation", "is_comparable", "results_of"]

Deviation = tuple[str, float, float]  # what is wrong, the number measured, its limit

# An honest chip of twice the usual rounding error must stay below: over many outputs its ratio is 2, at a single one
# it may err by 1.4 units in the last place where the usual error counts as a quarter of one.
ERROR_RATIO_LIMIT = 4.0
_MORE_FOR_FEW = 4.0  # over the root of the number of outputs
# Relative to the result: 32 units in the last place of fp32. Chips compose exp, division or roots of other operations
# and lose some; one call does not have the many honest implementations that would tell how much; no training notices.
_LEAST_HONEST = 2.0**-18
_BIAS_Z = 6.0
_LEAST_FOR_BIAS = 256  # outputs
_LEAST_BIAS = 1e-4  # relative: below it a systematic error is fp32's business, which the error ratio judges
_MAY_COPY = ("to", "reshape", "contiguous")  # composite operators, whole under inference mode
_UNINITIALISED = ("empty", "new_empty", "resize", "set_")


def is_comparable(op: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a call has one right result: it does not only make a view, and neither draws nor leaves values open."""
    name = op._schema.name.split("::")[1]
    if (op.is_view and name not in _MAY_COPY) or name.startswith(_UNINITIALISED):
        return False
    if torch.Tag.nondeterministic_seeded not in op.tags:
        return True
    return "attention" in name and not _named(op, args, kwargs).get("dropout_p", 1.0)


def results_of(op: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """Make a call; its results and what it has written into its arguments, flat."""
    returned = op(*args, **kwargs)
    written = []
    for place, argument in enumerate(op._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(args[place] if place < len(args) else kwargs.get(argument.name))
    found = [each for each in _flat(written) if isinstance(each, torch.Tensor)]
    fresh = [each for each in _flat([returned]) if not any(each is other for other in found)]
    return [each for each in fresh if each is not None] + found


def deviation(
    op: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any], got: Sequence[Any]
) -> Deviation | None:
    """What is wrong with the results `got` (on the CPU) of a call with these arguments on the CPU; None when nothing.

    Raises:
        Exception: the CPU cannot make this call: whatever torch raises then.
    """
    op, args, kwargs = _portable(op, args, kwargs)
    expected = results_of(op, _changed(args, torch.clone), _changed(kwargs, torch.clone))
    got = list(got)[: len(expected)]
    if all(_identical(mine, right) for mine, right in zip(got, expected, strict=True)):
        return None
    exact = _in_fp64(op, args, kwargs, expected)
    found = [
        _of_result(op, args, kwargs, place, mine, right, exact)
        for place, (mine, right) in enumerate(zip(got, expected, strict=True))
    ]
    return max((each for each in found if each), key=lambda each: each[1] / max(each[2], 1e-30), default=None)


def call_is_wrong(
    device: str, operator: str, args: list[Any], kwargs: dict[str, Any], seed: int
) -> tuple[bool, str, str]:
    """Make one traced call on a device and judge it."""
    op = operator_named(operator)
    on_device = make_arguments(args, kwargs, seed, device)
    got = [each.detach().cpu() if isinstance(each, torch.Tensor) else each for each in results_of(op, *on_device)]
    on_cpu = make_arguments(args, kwargs, seed, "cpu")
    found = deviation(op, *on_cpu, got)
    if found is None:
        return False, "as in fp64, up to rounding", "that"
    what, measured, limit = found
    return True, f"{what} of at most {limit:.3g}, compared with fp64 on the CPU", f"{measured:.4g}"


def _identical(got: Any, expected: Any) -> bool:
    """Equal in every bit that counts, so that nothing is left to judge; NaN equals nothing and is judged."""
    if not (isinstance(got, torch.Tensor) and isinstance(expected, torch.Tensor)):
        return bool(got == expected)
    return got.dtype == expected.dtype and bool(torch.equal(got, expected))


def _flat(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return [each for one in value for each in _flat(one)]
    return [value]


def _changed(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same arguments with each tensor changed; a tensor that is there twice stays one."""
    made: dict[int, torch.Tensor] = {}

    def walk(each: Any) -> Any:
        if isinstance(each, torch.Tensor):
            if id(each) not in made:
                made[id(each)] = change(each)
            return made[id(each)]
        if isinstance(each, list | tuple):
            return [walk(one) for one in each]
        return {name: walk(one) for name, one in each.items()} if isinstance(each, dict) else each

    return walk(value)


def _named(op: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name, those left out with their defaults."""
    given = {each.name: value for each, value in zip(op._schema.arguments, args, strict=False)} | kwargs
    return {each.name: given.get(each.name, each.default_value) for each in op._schema.arguments}


def _portable(
    op: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[torch._ops.OpOverload, Sequence[Any], dict[str, Any]]:
    """The call in a form that the CPU has: attention whichever kernel it was, softmax that widens its input."""
    name, named = op._schema.name.split("::")[1], _named(op, args, kwargs)
    if "attention" in name and {"query", "key", "value"} <= named.keys() and "grad" not in "".join(named):
        mask = named.get("attn_mask", named.get("attn_bias"))
        whole = torch.ops.aten.scaled_dot_product_attention.default
        causal = bool(named.get("is_causal", False))
        given = (named["query"], named["key"], named["value"], mask, 0.0, causal)
        return whole, given, {"scale": named.get("scale"), "enable_gqa": bool(named.get("enable_gqa", False))}
    if name in ("_softmax", "_log_softmax") and args[2]:
        return op, (args[0].float(), args[1], False), kwargs
    return op, args, kwargs


def _in_fp64(
    op: torch._ops.OpOverload,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    expected: list[Any],
    change: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
) -> list[Any]:
    """The results in fp64, inputs first changed; the CPU's own results where it has no such call in fp64."""

    def widened(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_complex():
            return change(tensor.to(torch.complex128))
        return change(tensor.double()) if tensor.is_floating_point() else tensor.clone()

    def wide(value: Any) -> Any:
        if isinstance(value, torch.dtype) and (value.is_floating_point or value.is_complex):
            return torch.complex128 if value.is_complex else torch.float64
        return value

    try:
        wide_args = [wide(each) for each in _changed(args, widened)]
        wide_kwargs = {name: wide(each) for name, each in _changed(kwargs, widened).items()}
        return results_of(op, wide_args, wide_kwargs)
    except Exception:  # no such kernel in fp64: then rounding alone tells how good the CPU's result is
        return expected


def _of_result(
    op: torch._ops.OpOverload,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    place: int,
    got: Any,
    expected: Any,
    exact: list[Any],
) -> Deviation | None:
    if not isinstance(expected, torch.Tensor):
        same = got == expected or (got != got and expected != expected)
        return None if same else ("error of a number", abs(float(got) - float(expected)), 0.0)
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return f"{got.dtype} of shape {list(got.shape)} instead of {expected.dtype}, {list(expected.shape)}", 1.0, 0.0
    if expected.is_complex():  # judged as pairs of real numbers
        got, expected = as_real(got), as_real(expected)
    if not expected.is_floating_point():
        share = float((got != expected).double().mean()) if expected.numel() else 0.0
        if share == 0.0 or chooses_as_well(op, args, kwargs, got, expected):
            return None
        return "share of wrong elements", share, 0.0
    regular = expected.isfinite()
    if not bool(torch.equal(got.isfinite(), regular)) or not _same_special(got, expected, regular):
        return "share of misplaced NaN and Inf", float((got.isfinite() != regular).double().mean()), 0.0
    wide = as_real(exact[place]).double()
    kept = regular & wide.isfinite()
    everything = bool(kept.all())

    def at_kept(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.double() if everything else tensor.double()[kept]

    def shaken() -> torch.Tensor:
        """What a sum one term after the other may lose: how far the exact result moves when the inputs do by a rounding
        of fp32, and, as for terms of one sign, a rounding of the result itself; each as often as `_terms` says.
        """
        generator = torch.Generator().manual_seed(0)

        def shake(tensor: torch.Tensor) -> torch.Tensor:
            noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            return tensor * (1.0 + (2.0 * noise - 1.0) * 2.0**-24)

        moved = at_kept(as_real(_in_fp64(op, args, kwargs, exact, shake)[place])) - at_kept(wide)
        return (moved.nan_to_num(0.0).abs() + 2.0**-24 * at_kept(wide).abs()) * _terms(args, expected)

    mine, right, truth = at_kept(got), at_kept(expected), at_kept(wide)
    if truth.numel() == 0:
        return None
    return _beyond_error(mine, right, truth, expected.dtype, shaken) or _beyond_bias(mine, right, truth, expected.dtype)


def _beyond_error(
    got: torch.Tensor,
    expected: torch.Tensor,
    exact: torch.Tensor,
    dtype: torch.dtype,
    shaken: Callable[[], torch.Tensor],
) -> Deviation | None:
    error = _rms(got - exact)
    rounding = max(_rms(exact.to(dtype).double() - exact), 0.25 * torch.finfo(dtype).eps * _rms(exact))
    honest = max(_rms(expected - exact), rounding, _LEAST_HONEST * _rms(exact), torch.finfo(dtype).tiny)
    limit = ERROR_RATIO_LIMIT + _MORE_FOR_FEW / exact.numel() ** 0.5
    if error <= limit * honest:
        return None
    honest = max(honest, _rms(shaken()))
    return ("error ratio", error / honest, limit) if error > limit * honest else None


def _beyond_bias(
    got: torch.Tensor, expected: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype
) -> Deviation | None:
    """The mean error in the direction of the result, relative to its size; zero-mean data hides the plain mean."""
    scale = float(exact.abs().mean())
    if exact.numel() < _LEAST_FOR_BIAS or scale == 0.0:
        return None
    signed = (got - exact) * exact.sign() / scale
    limit = 2.5 * abs(float(((expected - exact) * exact.sign()).mean())) / scale
    limit += max(torch.finfo(dtype).eps / 8.0, _LEAST_BIAS) + _BIAS_Z * float(signed.std()) / exact.numel() ** 0.5
    bias = abs(float(signed.mean()))
    return ("bias", bias, limit) if bias > limit else None


def _rms(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())


def _terms(args: Sequence[Any], result: torch.Tensor) -> float:
    """How many such errors add up in K terms, one after the other: sqrt(K / 6)."""
    sizes = [each.numel() for each in _flat(list(args)) if isinstance(each, torch.Tensor)]
    longest = max(
        (max(each.shape, default=1) for each in _flat(list(args)) if isinstance(each, torch.Tensor)), default=1
    )
    terms = max(max(sizes, default=1) / max(1, result.numel()), longest)
    return max(1.0, (terms / 6.0) ** 0.5)


def _same_special(got: torch.Tensor, expected: torch.Tensor, regular: torch.Tensor) -> bool:
    if bool(regular.all()):
        return True
    return bool(torch.equal(got[~regular].nan_to_num(0.0), expected[~regular].nan_to_num(0.0)))
