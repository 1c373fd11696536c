"""How a row's `mfu_convention` counts the operations of a token."""

from __future__ import annotations

import re

from crosschip.plan.architecture import Architecture
from crosschip.plan.counts import active_parameters, reported_flops_per_token, train_flops_per_token

__all__ = ["counted_flops_per_token", "counts_recomputed", "is_known", "is_of_recomputed_layers"]

# PaLM's count (arXiv 2204.02311, appendix B), Megatron's (arXiv 2104.04473) and that of MosaicML's tables.
_WHOLE_SQUARES = ("palm", "12lhqt", "megatron", "6n + attention", "non-causal", "full attention")
_SIX_N_D = re.compile(r"(?<!\d)6\s*[*x·]?\s*n\s*[*x·]?\s*d\b(?!\s*\+)")
_HFU = re.compile(r"hfu\b(?!\s*[=:]?\s*\d)")  # `HFU 57.8` behind another count tells a second figure
_CAUSAL = re.compile(r"\bmfu\b|causal|model[- ]flops?")


def counted_flops_per_token(convention: str, architecture: Architecture, seq_len: int) -> float:
    """Operations of a token, forward and backward: attention's causal half, unless the convention names whole squares,
    or `6ND` (six for each parameter that a token meets, and no attention).
    """
    if _SIX_N_D.search(convention):
        return 6.0 * active_parameters(architecture)
    whole = any(word in convention for word in _WHOLE_SQUARES)
    return (reported_flops_per_token if whole else train_flops_per_token)(architecture, seq_len)


def is_of_recomputed_layers(convention: str) -> bool:
    """Whether the convention says that whole layers were recomputed."""
    return "incl. recompute" in convention


def counts_recomputed(convention: str) -> bool:
    """Whether recomputed operations count, where the layout recomputes: HFU counts what the chip did."""
    return is_of_recomputed_layers(convention) or _HFU.match(convention) is not None


def is_known(convention: str) -> bool:
    """Whether a word of the convention is known here; nothing is the usual count."""
    known = counts_recomputed(convention) or _SIX_N_D.search(convention) or _CAUSAL.search(convention)
    return not convention or bool(known) or any(word in convention for word in _WHOLE_SQUARES)
