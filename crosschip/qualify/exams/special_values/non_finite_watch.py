"""What training watches for numbers that are not finite, on a device, and what small numbers and zeros keep there.

Needs torch only: reproducers hold these functions' source.
"""

from __future__ import annotations

import math

import torch

__all__ = ["WATCHES", "subnormals_are_kept", "watch_sees", "zeros_keep_their_sign"]

_ALWAYS = ("isfinite", "isnan", "maximum")
WATCHES = {
    "train": (*_ALWAYS, "loss", "gradient norm", "clipping", "foreach clipping", "refusal to clip"),
    "serve": _ALWAYS,
}


def watch_sees(device: str, dtype: str, watch: str, value: float) -> tuple[bool, str, str]:
    """Whether one way of watching sees one number that is not finite among three gradients or in the logits."""
    made = [torch.linspace(-1.0, 1.0, size).to(getattr(torch, dtype)) for size in (7, 300, 33)]
    made[1][123] = value
    seen = _seen([each.to(device) for each in made], watch, value)
    return not seen, f"{watch} shows {value} in {dtype}", "it does" if seen else "it does not"


def _seen(tensors: list[torch.Tensor], watch: str, value: float) -> bool:
    if watch == "isfinite":
        return not bool(torch.stack([each.isfinite().all() for each in tensors]).all())
    if watch == "isnan":
        return bool(tensors[1].isnan().any()) == math.isnan(value)
    if watch == "maximum":
        return not math.isfinite(float(tensors[1].abs().max()))
    if watch == "loss":
        logits = tensors[1].view(3, 100)
        targets = torch.tensor([5, 23, 7]).to(logits.device)
        return not math.isfinite(float(torch.nn.functional.cross_entropy(logits, targets)))
    parameters = [torch.nn.Parameter(torch.zeros_like(each)) for each in tensors]
    for parameter, gradient in zip(parameters, tensors, strict=True):
        parameter.grad = gradient
    if watch == "refusal to clip":
        try:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
        except RuntimeError as error:
            return "non-finite" in str(error)
        return False
    if watch == "gradient norm":
        return not math.isfinite(float(torch.nn.utils.get_total_norm(tensors)))
    foreach = watch == "foreach clipping"
    return not math.isfinite(float(torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=foreach)))


def subnormals_are_kept(device: str, dtype: str) -> tuple[bool, str, str]:
    """Halves the smallest normal number, and doubles a subnormal one: honest chips may take both for zero."""
    smallest = torch.finfo(getattr(torch, dtype)).tiny
    made = torch.tensor([smallest, smallest / 2], dtype=torch.float64).to(getattr(torch, dtype)).to(device)
    halved, doubled = float((made[:1] * 0.5).cpu()), float((made[1:] * 2.0).cpu())
    expected = f"{smallest} * 0.5 = {smallest / 2}, {smallest / 2} * 2 = {smallest}"
    return (halved, doubled) != (smallest / 2, smallest), expected, f"{halved}, {doubled}"


def zeros_keep_their_sign(device: str, dtype: str) -> tuple[bool, str, str]:
    """The sign of zero where IEEE 754 says what it is and 1/x shows it."""
    made = torch.tensor([0.0, -0.0, 1.0, -1.0]).to(getattr(torch, dtype)).to(device)
    zero, negative, one, minus = made.split(1)
    rows = {
        "-(0)": (-zero, "-0"),
        "-0 * 1": (negative * one, "-0"),
        "0 * -1": (zero * minus, "-0"),
        "-0 + -0": (negative + negative, "-0"),
        "|-0|": (negative.abs(), "0"),
        "1 - 1": (one - one, "0"),
        "-0 as float32": (negative.float(), "-0"),
    }
    for what, (result, expected) in rows.items():
        got = "-0" if math.copysign(1.0, float(result.cpu())) < 0 else "0"
        if float(result.cpu()) != 0.0 or got != expected:
            return True, f"{what} = {expected}", f"{got if float(result.cpu()) == 0.0 else float(result.cpu())}"
    return False, "zeros with their signs", "they have them"
