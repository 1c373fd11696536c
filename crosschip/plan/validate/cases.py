"""From a published row to something that can be computed: model, chips, batch and what is known of the layout.

Whatever a row does not say is assumed here by one rule for all rows, and noted.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any

from crosschip.errors import CrosschipError
from crosschip.plan.architecture import Architecture
from crosschip.plan.counts import active_parameters, num_parameters
from crosschip.plan.hardware import Hardware, kind_named, kinds
from crosschip.plan.job import Job, ThinLink
from crosschip.plan.known_architectures import architecture_for, known_architecture
from crosschip.plan.step import Layout
from crosschip.plan.validate.batches import batch_words
from crosschip.plan.validate.conventions import is_known, is_of_recomputed_layers
from crosschip.plan.validate.numbers import MOST_COUNT
from crosschip.plan.validate.parallelism import LayoutWords, layout_words
from crosschip.plan.validate.rows import OUTCOMES, TIME_SHARE, Row

__all__ = ["CannotPredict", "Case", "case_of", "refuse_unpredictable"]

_DEFAULT_SEQ_LEN = 4096
_DEFAULT_BATCH_TOKENS = 4_194_304
_DEFAULT_CHIPS = 2048
_MICRO_BATCHES_PER_STAGE = 4
# SparseLoCo sends 64 of 4,096 numbers, each as 2 bits and its place as 12 (arXiv 2508.15706): 146 times less than fp32.
_SPARSE_BYTES = 64 / 4096 * 14 / 8
_MOST_OFF = 0.25  # of a likely shape's parameters from those of a row
_BEFORE_FUSED = 2206  # FlashAttention is arXiv 2205.14135: what was described before wrote its scores to memory
_ARXIV = r"arxiv(?:\.org/(?:abs|pdf)/|[: ]\s*)(\d{4})\.\d"
_SIZE_OF_NOTHING = (
    r"\b(?:DP|H?FSDP|[TMPCE]P|VPP?|virtual[- ]pipeline|micro[- ]?batch|MBS|H)[\s=:_-]*0+\b"  # `TP0`, `H=0`
)
_OF_A_CONVENTION = ("tflops_per_chip_reported", "mfu_pct_reported")
_PRECISIONS = ("bf16", "fp16", "fp8", "fp4")
GOODPUT = (
    0.9  # of a whole run's chip-hours that train: Llama 3 reports more than 90 % (arXiv 2407.21783, section 3.3.4)
)


class CannotPredict(CrosschipError):
    """A row that lacks what a prediction needs."""


@dataclass(frozen=True)
class Case:
    """A row, ready to be predicted.

    `fixed` are the fields of `Layout` that the row gives. `is_described`: it says its layout, batch, length and number
    of chips; what its paper says does not count. `batch_scale`: the row's batch over the one that is computed.
    """

    row: Row
    job: Job
    hardware: Hardware
    num_chips: int
    fixed: tuple[tuple[str, Any], ...]
    notes: tuple[str, ...]
    is_described: bool = True
    batch_scale: float = 1.0


def _architecture(row: Row, notes: list[str]) -> Architecture:
    if row.arch == "" and row.is_moe:
        assert row.params_active is not None
        assert row.params_total is not None
        active, total = row.params_active / 1e9, row.params_total / 1e9
        notes.append(f"arch not given: {active:g} of {total:g} B parameters active, so a mixture")
    known = known_architecture(row.model)
    if known is None and row.params_total is None:
        raise CannotPredict(f"no widths and no number of parameters for {row.model!r}", "fill params_total_b")
    found = architecture_for(row.model, row.params_total, row.params_active if row.is_moe else None)
    if found.assumed:
        if row.is_moe and row.params_active is None:
            raise CannotPredict(
                f"no widths and no number of active parameters for {row.model!r}", "fill params_active_b"
            )
        _check_size(row, found)
        notes.append(found.assumed)
    return found


def _check_size(row: Row, found: Architecture) -> None:
    """No usual shape is as small or as large as every number in the file, nor as sparse."""
    sizes = [("params_total_b", "", row.params_total, num_parameters(found))]
    if row.is_moe:
        sizes.append(("params_active_b", "active ", row.params_active, active_parameters(found)))
    for column, kind, wanted, reached in sizes:
        assert wanted is not None
        if abs(reached / wanted - 1) > _MOST_OFF:
            raise CannotPredict(
                f"no shape with {wanted / 1e9:g} B {kind}parameters for {row.model!r}: the nearest has "
                f"{reached / 1e9:.3g} B",
                f"mend {column}, or add the model's widths to crosschip/plan/data/architectures.toml",
            )


def _usual_batch(
    row: Row, architecture: Architecture, seq_len: int, num_chips: int, fixed: dict[str, Any], notes: list[str]
) -> int:
    """Sequences of a step, where the row has none: of a whole run what its paper says, else a usual number."""
    if row.kind == "full_run" and architecture.train_batch is not None:
        notes.append(f"batch not given: {architecture.train_batch} sequences as published for {architecture.name}")
        return architecture.train_batch
    wanted = _DEFAULT_BATCH_TOKENS / seq_len
    unit = max(1, num_chips // 8) if wanted < num_chips else num_chips
    batch = max(1, math.ceil(wanted / unit)) * unit
    if (stages := fixed.get("pipeline", 1)) > 1:  # nobody trains with a pipeline that is empty most of the time
        replicas = max(1, num_chips // (stages * fixed.get("tensor", 1) * fixed.get("context", 1)))
        batch = max(batch, _MICRO_BATCHES_PER_STAGE * stages * replicas)
    notes.append(f"batch not given: {batch} sequences assumed")
    return batch


def _is_fused(row: Row, architecture: Architecture) -> bool:
    """Whether attention's scores stay on the chip: not in a model's run from before, of whatever kind its row is."""
    if not architecture.fused_attention:
        return False
    years = [int(found) for found in re.findall(_ARXIV, row.source, re.I)]
    return not years or max(years) >= _BEFORE_FUSED


def _thin_link(
    row: Row, num_chips: int, hardware: Hardware, fixed: dict[str, Any], notes: list[str]
) -> ThinLink | None:
    """The link of groups that exchange every so many steps, each a node of the chips; None of a run on one cluster."""
    found = re.search(r"(?:diloco|loco).*?H\s*=\s*0*([1-9]\d*)", row.parallelism, re.I)
    if not found:
        if row.quantity == TIME_SHARE:
            raise CannotPredict(
                f"how often groups exchange is not in parallelism = {row.parallelism!r}", "write it as `DiLoCo H=100`"
            )
        return None
    nodes = max(1, num_chips // hardware.node_size)
    groups = nodes if num_chips % nodes == 0 else 1
    if row.quantity == TIME_SHARE and groups == 1:
        raise CannotPredict(
            f"{num_chips} chips are no groups of {hardware.node_size}", "mend n_chips: each group is a node here"
        )
    fixed["groups"] = groups
    notes.append("groups joined by the public internet: 0.5 Gbit/s and 50 ms assumed")
    int8 = "int8" in row.precision or "int8" in row.parallelism
    num_bytes = 1.0 if int8 else 2.0
    if "sparseloco" in row.parallelism.lower():
        # Each group keeps other numbers, so they are not summed on the way: it receives those of all others, where a
        # mean in a ring takes two passes of one group's.
        num_bytes = _SPARSE_BYTES * groups / 2
        notes.append(f"of each group {_SPARSE_BYTES:.2g} bytes a parameter, to all others")
    return ThinLink(0.5e9 / 8, sync_every=int(found.group(1)), bytes_per_parameter=num_bytes)


def refuse_unpredictable(row: Row) -> None:
    """Refuse what no prediction is made of, whatever its other cells say.

    Raises:
        CannotPredict: a cell cannot be read, the quantity is none of those known, or what it hangs on is not in a row.
    """
    if row.faults:
        raise CannotPredict(*row.faults[0])
    if row.quantity not in OUTCOMES:
        named = f"quantity {row.quantity!r} is not predicted" if row.quantity else "the row names no quantity"
        raise CannotPredict(named, f"name one of {', '.join(OUTCOMES)}")
    if row.quantity in ("chip_hours", "wall_days") and row.tokens is None:
        raise CannotPredict("no number of tokens", "fill tokens_t: how long a run takes hangs on it")
    if row.kind == "rl_run":
        raise CannotPredict(
            "a reinforcement-learning run's time hangs on its rollouts", "give rollout lengths to `plan`"
        )


def _hardware(row: Row, notes: list[str]) -> Hardware:
    hardware = kind_named(row.chip)
    if hardware is None:
        known = ", ".join(each.kind for _, each in kinds())
        raise CannotPredict(
            f"no figures for the chip {row.chip!r}", f"known are {known}; others go to plan/data/chips.toml"
        )
    if row.chip.lower() != hardware.kind.lower():
        notes.append(f"{row.chip!r} is taken for {hardware.kind}")
    return hardware


def _num_chips(row: Row, words: LayoutWords, fixed: dict[str, Any], notes: list[str]) -> int:
    """Chips of the row, else of its layout, or a usual number; of "about 6,000" as many as the layout can be built on,
    experts included."""
    num_chips = row.num_chips or words.num_chips or _DEFAULT_CHIPS
    if num_chips > MOST_COUNT:
        raise CannotPredict(f"{num_chips:.3g} chips in parallelism = {row.parallelism!r}", "mend the widths")
    if row.num_chips is None:
        whence = "assumed" if words.num_chips is None else "taken, the product of the layout's widths"
        notes.append(f"number of chips not given: {num_chips} {whence}")
    elif words.num_chips not in (None, num_chips):
        notes.append(f"the widths of {row.parallelism!r} are of {words.num_chips} chips: n_chips = {num_chips} counts")
    widths = Layout(**{name: fixed.get(name, 1) for name in ("tensor", "pipeline", "context", "expert")})
    unit = widths.pipeline * math.lcm(widths.tensor * widths.context, widths.expert_shards)
    if num_chips % unit:
        whole = max(1, num_chips // unit) * unit
        notes.append(f"{row.parallelism!r} does not divide {num_chips} chips: {whole} taken")
        num_chips = whole
    return num_chips


def _is_fp8(row: Row, architecture: Architecture, hardware: Hardware, notes: list[str]) -> bool:
    """Whether products run in fp8: by the row, else as a whole run's paper says, if the chip has a rate for it."""
    wanted = any(word in row.precision for word in ("fp8", "fp4"))
    if not row.precision and row.kind == "full_run" and architecture.train_fp8:
        wanted = True
        notes.append(f"precision not given: fp8 as published for {architecture.name}")
    if row.precision and not any(word in row.precision for word in _PRECISIONS):
        notes.append(f"precision {row.precision!r} is computed as bf16")
    if "fp4" in row.precision:
        notes.append("fp4 is computed as fp8: no rate of fp4 is known here")
    if wanted and hardware.fp8_flops is None:
        notes.append(f"{hardware.kind} has no rate for fp8: computed in bf16")
    return wanted and hardware.fp8_flops is not None


def _fix_what_goes_together(row: Row, is_fused: bool, fixed: dict[str, Any]) -> None:
    """Selective recomputation and sequence parallelism are no older than fused attention (arXiv 2205.05198); operations
    that are counted with the recomputed ones were recomputed."""
    if not is_fused or is_of_recomputed_layers(row.convention):
        fixed.setdefault("recompute", "full")
    says_so = re.search(r"sequence[- ]parallel|\bSP\b(?![\s=:_-]*\d)", row.parallelism, re.I) is not None
    fixed.setdefault("sequence_parallel", is_fused or says_so)


def case_of(row: Row) -> Case:
    """What a row says, with what it does not say assumed.

    Raises:
        CannotPredict: a cell cannot be read, the quantity is none of those known, or an input is missing that nothing
            can stand in for.
    """
    notes = list(row.readings)
    refuse_unpredictable(row)
    hardware, architecture = _hardware(row, notes), _architecture(row, notes)
    batch = batch_words(row.global_batch)
    notes += batch.notes
    seq_len = row.seq_len or batch.seq_len or architecture.train_seq_len or _DEFAULT_SEQ_LEN
    if row.seq_len is None:
        notes.append(f"sequence length not given: {seq_len} taken")
    is_run = row.kind == "full_run"
    if row.quantity in _OF_A_CONVENTION and not is_known(row.convention):
        notes.append(f"mfu_convention = {row.convention!r} is none that is known: attention's causal half is counted")
    if zero := re.search(_SIZE_OF_NOTHING, row.parallelism, re.I):
        raise CannotPredict(f"{zero.group()!r} in parallelism = {row.parallelism!r}", "sizes of a layout begin at 1")
    told = row.parallelism or (architecture.train_layout if is_run else "")
    words = layout_words(told, row.num_chips, architecture.num_layers)
    notes += words.notes
    fixed = dict(words.fixed)
    is_named = bool(row.parallelism) and words.is_named
    has_chips = row.num_chips is not None or words.num_chips is not None
    is_described = is_named and has_chips and batch.size is not None and row.seq_len is not None
    if is_run and not architecture.interleaved:
        fixed.setdefault("interleave", 1)
    num_chips = _num_chips(row, words, fixed, notes)
    link = _thin_link(row, num_chips, hardware, fixed, notes)
    is_fused = _is_fused(row, architecture)
    if batch.size is not None:
        batch_size = batch.sequences(seq_len)
    else:
        batch_size = _usual_batch(row, architecture, seq_len, num_chips, fixed, notes)
    job = Job(
        architecture, seq_len, batch_size,
        fp8=_is_fp8(row, architecture, hardware, notes), fused_attention=is_fused, tensor_overlap=words.tensor_overlap,
        zero_bubble=words.zero_bubble or (is_run and architecture.zero_bubble),
        imbalance=1.0 if row.balanced else Job.imbalance,
        gradient_bytes=2.0 if words.bf16_sums else Job.gradient_bytes, thin_link=link,
    )  # fmt: skip
    _fix_what_goes_together(row, is_fused, fixed)
    return Case(row, job, hardware, num_chips, tuple(sorted(fixed.items())), tuple(notes), is_described)


def with_batch(case: Case, batch_size: int) -> Case:
    """The same case with another batch, which the notes say; the time of a step is scaled back to the row's batch."""
    note = f"a batch of {case.job.batch_size} sequences does not divide: {batch_size} taken"
    scale = case.batch_scale * case.job.batch_size / batch_size
    if case.row.quantity == "step_time_s":
        note += f", and the step's time times {scale:.4g}"
    job = replace(case.job, batch_size=batch_size)
    return replace(case, job=job, notes=(*case.notes, note), batch_scale=scale)
