"""Rotary positions in a config.json, of transformers 4 or 5, and in llama.cpp's keys."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from crosschip.errors import HandoffError
from crosschip.handoff.gguf.metadata import Metadata, as_float32, fraction, whole

__all__ = ["ROPE_FIELDS", "Rope", "fields_of_rope", "rope_of"]

ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_parameters")  # of config.json, in the spellings of both transformers

_LLAMA_3_KNOWN = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
_YARN_KNOWN = {
    *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    *("truncate", "attention_factor", "partial_rotary_factor"),
}


@dataclass(frozen=True)
class Rope:
    """The base, the kind of scaling (`default` or `yarn`) and its parameters."""

    theta: float
    kind: str
    scaling: dict[str, Any] = field(default_factory=dict)

    def factors(self, width: int) -> torch.Tensor:
        """By what llama.cpp divides each of the width/2 frequencies of Llama 3's scaling: its `rope_freqs.weight`."""
        low, high = float(self.scaling["low_freq_factor"]), float(self.scaling["high_freq_factor"])
        factor, original = float(self.scaling["factor"]), float(self.scaling["original_max_position_embeddings"])
        exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
        turns = original / (2 * math.pi * self.theta**exponents)  # of each pair over the original context
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 / ((1 - smooth) / factor + smooth)).float()

    def metadata(self) -> Metadata:
        """The keys, without the architecture's name."""
        found: Metadata = {"rope.freq_base": as_float32(self.theta)}
        if self.kind == "yarn":
            found |= {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": as_float32(self.scaling["factor"]),
                "rope.scaling.original_context_length": int(self.scaling["original_max_position_embeddings"]),
                "rope.scaling.yarn_beta_fast": as_float32(self.scaling.get("beta_fast") or 32.0),
                "rope.scaling.yarn_beta_slow": as_float32(self.scaling.get("beta_slow") or 1.0),
            }
        return found

    def reasons_against(self) -> list[str]:
        """Every parameter that llama.cpp has no key for, in words."""
        if self.kind == "default":
            return []
        if self.kind == "llama3":
            wrong = sorted(set(self.scaling) ^ _LLAMA_3_KNOWN)
            return [f"rope_scaling.{name} is missing or not known here" for name in wrong]
        if self.kind != "yarn":
            return [f"rope_scaling.type = {self.kind!r}; default, yarn and llama3 are written here"]
        found = [
            f"rope_scaling.{name} = {value!r} is not known here"
            for name, value in self.scaling.items()
            if name not in _YARN_KNOWN
        ]
        if not self.scaling.get("truncate", True):
            found.append("rope_scaling.truncate = False; the bounds of the ramp are always whole numbers")
        if self.scaling.get("attention_factor") is not None:
            found.append(f"rope_scaling.attention_factor = {self.scaling['attention_factor']!r}; it is computed there")
        if self.scaling.get("partial_rotary_factor") not in (None, 1, 1.0):
            found.append(f"rope_scaling.partial_rotary_factor = {self.scaling['partial_rotary_factor']!r}")
        return found


def rope_of(config: dict[str, Any]) -> Rope:
    """Read `rope_theta` and `rope_scaling` (transformers 4) or `rope_parameters` (5).

    Raises:
        HandoffError: the fields contradict one another, or YaRN has no factor.
    """
    parameters, scaling = dict(config.get("rope_parameters") or {}), dict(config.get("rope_scaling") or {})
    thetas = {
        float(value) for value in (_pop_theta(parameters), _pop_theta(scaling), config.get("rope_theta")) if value
    }
    if len(thetas) > 1:
        raise HandoffError(f"config.json has several values of rope_theta: {sorted(thetas)}", "make them agree")
    chosen = scaling or parameters
    kinds = [chosen.pop(name, None) for name in ("rope_type", "type")]
    kind = next((str(each) for each in kinds if each), "default")
    theta = thetas.pop() if thetas else 10000.0
    if kind == "default":
        return Rope(theta, kind)
    longest = config.get("max_position_embeddings")
    if kind == "yarn":
        chosen.setdefault("original_max_position_embeddings", longest)
        if not chosen.get("factor"):
            raise HandoffError("rope_scaling of type yarn has no factor", "complete config.json")
    return Rope(theta, kind, chosen)


def _pop_theta(table: dict[str, Any]) -> float | None:
    value = table.pop("rope_theta", None)
    return None if value is None else float(value)


def fields_of_rope(own: Metadata, log_multiplier: bool = False) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` from keys without the architecture's name."""
    found: dict[str, Any] = {"rope_theta": fraction(own, "rope.freq_base"), "rope_scaling": None}
    if own.get("rope.scaling.type") == "yarn":
        scaling: dict[str, Any] = {
            "type": "yarn",
            "rope_type": "yarn",
            "factor": fraction(own, "rope.scaling.factor"),
            "original_max_position_embeddings": whole(own, "rope.scaling.original_context_length"),
            "beta_fast": fraction(own, "rope.scaling.yarn_beta_fast"),
            "beta_slow": fraction(own, "rope.scaling.yarn_beta_slow"),
        }
        if log_multiplier:
            tenth = fraction(own, "rope.scaling.yarn_log_multiplier")
            scaling |= dict.fromkeys(("mscale", "mscale_all_dim"), float(f"{10 * tenth:.7g}"))
        found["rope_scaling"] = scaling
    return found
