"""The catalogue: faults that users of some chip have reported, or that a vendor documents, ready to be planted."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from crosschip.chips.faults.answers import KeysLostBeyond, TokenSuppressed, UnsteadyResults
from crosschip.chips.faults.arithmetic import Bias, Float64AsFloat32, Saturation
from crosschip.chips.faults.attention import MaskDropped, MaskIgnoredBeyond, UnequalHeadSizesRejected, UniformWeights
from crosschip.chips.faults.coarse import BatchDependentOrder, CoarseProducts
from crosschip.chips.faults.collectives import (
    BFloat16Partials,
    CoarseNearLimits,
    FactorReadAsZero,
    FlappingLink,
    RowDependentReduce,
    SkewRefused,
    SlowPair,
    TimeoutIgnored,
)
from crosschip.chips.faults.files import DialectSwapped, FieldDiffers, RowsPermuted, ScalesDropped, TensorMissing
from crosschip.chips.faults.missing import Float64Missing, OperatorMissing, SilentFallback
from crosschip.chips.faults.sharding import ShardingRuleMissing
from crosschip.chips.faults.stability import BitFlip, CrashOnLongPrompts, HangAfter, LeakPerCall

__all__ = ["CATALOGUE", "PLANTED_ELSEWHERE", "FaultRow"]


@dataclass(frozen=True)
class FaultRow:
    """One fault. `seen` is the thread or document that reports it.

    `caught_by` are the exams that have to name it, or, of a fault in a model's files, the gates of the handoff.
    """

    id: str
    title: str
    seen: str
    make: Callable[..., Any]
    caught_by: tuple[str, ...]

    @property
    def acts_on_files(self) -> bool:
        """Whether it is planted in a model directory, and not in a chip."""
        return hasattr(self.make, "files")

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters with their defaults."""
        return {name: each.default for name, each in inspect.signature(self.make).parameters.items()}


def _by_id(*rows: FaultRow) -> dict[str, FaultRow]:
    return {row.id: row for row in rows}


CATALOGUE: dict[str, FaultRow] = _by_id(
    FaultRow(
        "N1",
        "attention ignores the mask beyond a key position, without an error",
        "vllm-ascend#15503",
        MaskIgnoredBeyond,
        ("attention",),
    ),
    FaultRow(
        "N2",
        "attention returns the uniform average of the values",
        "vllm-ascend#13699",
        UniformWeights,
        ("operators", "attention"),
    ),
    FaultRow("N4", "a fused attention path drops the mask", "sglang PR#31948", MaskDropped, ("attention",)),
    FaultRow(
        "N8",
        "an all-reduce depends on the number of rows",
        "vllm-ascend#17169",
        RowDependentReduce,
        ("links",),
    ),
    FaultRow(
        "N9",
        "partial sums are stored in bf16 before the reduce",
        "RL-Kernel#313",
        BFloat16Partials,
        ("links",),
    ),
    FaultRow(
        "N11",
        "a small multiplicative bias in one operator; a long run's loss drifts by 1-2 %",
        "verl PR#332",
        Bias,
        ("operators", "rehearsal"),
    ),
    FaultRow(
        "N15",
        "a bf16 reduce-scatter is inaccurate near range limits",
        "tt-metal#36749",
        CoarseNearLimits,
        ("links",),
    ),
    FaultRow(
        "N16",
        "all gradients are zero with a custom divide factor",
        "pytorch PR#190747",
        FactorReadAsZero,
        ("links",),
    ),
    FaultRow(
        "N19",
        "overflow gives the largest number (65504 in fp16) and NaN gives 0, so watches for NaN are blind",
        "vendor documentation",
        Saturation,
        ("special_values",),
    ),
    FaultRow("N20", "float64 is silently computed as float32", "vendor documentation", Float64AsFloat32, ("software",)),
    FaultRow(
        "N21",
        "matrix products add up in bf16, or cut their factors to 10 bits of mantissa",
        "no single report",
        CoarseProducts,
        ("operators",),
    ),
    FaultRow(
        "N22",
        "a result depends on the batch size or on the position in the batch",
        "torchtitan's notes",
        BatchDependentOrder,
        ("determinism",),
    ),
    FaultRow(
        "I1",
        "a collective's time-out is not honoured: it dies after half an hour",
        "Ascend/pytorch#48",
        TimeoutIgnored,
        ("links",),
    ),
    FaultRow(
        "I4",
        "ranks that start apart fail to connect",
        "vllm-ascend#486",
        SkewRefused,
        ("links",),
    ),
    FaultRow(
        "I6",
        "a link flaps: bandwidth drops for seconds",
        "rccl#1423",
        FlappingLink,
        ("links",),
    ),
    FaultRow(
        "I13",
        "one pair of ranks has a bad cable",
        "no single report",
        SlowPair,
        ("links",),
    ),
    FaultRow(
        "S1",
        "attention over concurrent or long prompts takes the process down",
        "vllm-ascend#15903",
        CrashOnLongPrompts,
        ("stability",),
    ),
    FaultRow("S5", "each call keeps some host memory: 1-2 GB an hour", "vllm-ascend#2650", LeakPerCall, ("stability",)),
    FaultRow("S7", "an operator hangs, seen only half an hour later", "vllm-ascend#3413", HangAfter, ("stability",)),
    FaultRow(
        "S15",
        "one bit flips now and then in an activation, a gradient or a weight",
        "Llama 3 report",
        BitFlip,
        ("stability",),
    ),
    FaultRow(
        "W1",
        "an operator is missing and silently runs on the host, very slowly",
        "Ascend/pytorch#40",
        SilentFallback,
        ("software",),
    ),
    FaultRow("W3", "an operator is missing: a hard error", "vllm-omni PR#755", OperatorMissing, ("software",)),
    FaultRow(
        "W4",
        "no sharding rule for an operator under DTensor",
        "ms-swift#7871",
        ShardingRuleMissing,
        ("rehearsal",),
    ),
    FaultRow(
        "W5", "there is no float64: float64 RoPE tables fail", "diffusers PR#10123", Float64Missing, ("software",)
    ),
    FaultRow(
        "W13",
        "attention refuses heads of unequal size for keys and values, as latent attention has them",
        "vendor documentation",
        UnequalHeadSizesRejected,
        ("attention", "software"),
    ),
    FaultRow(
        "H1",
        "a conversion restacks the rows of a projection wrongly; checksums of the transfer match",
        "vime#274",
        RowsPermuted,
        ("tensor manifest", "golden replay"),
    ),
    FaultRow(
        "H6",
        "a converter leaves a tensor out, or never fills it",
        "DeepSeek-V3.2-Exp#59",
        TensorMissing,
        ("tensor manifest",),
    ),
    FaultRow(
        "H7",
        "the block scales of FP8 weights are dropped: random-looking logits",
        "Megatron-Bridge documentation",
        ScalesDropped,
        ("tensor manifest", "golden replay"),
    ),
    FaultRow(
        "H10",
        "bytes of e4m3fn are read as e4m3fnuz: every weight is half as large",
        "vllm PR#12134",
        DialectSwapped,
        ("tensor manifest", "golden replay"),
    ),
    FaultRow(
        "H13",
        "one field of the configuration differs: the eps of norms, the theta of RoPE, a scale",
        "verl NPU guide",
        FieldDiffers,
        ("configuration fields", "golden replay"),
    ),
    FaultRow(
        "V2",
        "output is corrupt beyond a position: keys from there on are lost",
        "vllm-ascend#14464",
        KeysLostBeyond,
        ("attention", "serving_ladder"),
    ),
    FaultRow(
        "V3",
        "a stop token is suppressed: answers loop and never end",
        "vllm-ascend#16116",
        TokenSuppressed,
        ("serving_reasoning",),
    ),
    FaultRow(
        "V13",
        "greedy answers differ from run to run",
        "xllm#814",
        UnsteadyResults,
        ("determinism", "serving_determinism"),
    ),
)

# Rows of the catalogue that something else plants, not the simulated chip: what happens, and what plants it.
PLANTED_ELSEWHERE: dict[str, tuple[str, str]] = {
    "N5": ("the gradient norm is NaN, then the loss exactly 0", "crosschip drill --faults nan-gradient"),
    "S6": ("a hang after each checkpoint", "crosschip drill --faults save-hang"),
    "S9": ("one dead rank blocks all others", "crosschip drill --faults kill,stop"),
    "S12": ("a silent wedge", "crosschip drill --faults collective-hang"),
    "S16": ("one slow node", "crosschip drill --faults slow"),
    "H2": (
        "a cached transposed copy stays old after a weight update",
        "tests/serve/engine/test_weights_update.py, into an engine whose weights are replaced",
    ),
    "H3": (
        "expert weights are transposed twice after a wake-up",
        "tests/serve/engine/test_weights_update.py, into an engine whose weights are replaced",
    ),
    "H17": ("a checkpoint saved before communication has ended", "crosschip drill --faults wrong-save"),
}
