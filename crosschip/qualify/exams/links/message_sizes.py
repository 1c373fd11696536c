"""Which messages the subject would send between ranks, from its trace. Documents only: no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from crosschip.qualify.finding import Tier
from crosschip.qualify.tracing.trace import Trace, tensor_specs

__all__ = ["ITEM_BYTES", "Layout", "Message", "layout_of", "sizes_for"]

ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int64": 8}
_BUCKET_BYTES = 25 << 20  # torch's DistributedDataParallel fills buckets of 25 MiB
_CONTROL_BYTES = 1024  # counts of tokens, norms, flags: what latency rules
_LARGEST = {"smoke": 4 << 20, "standard": 64 << 20, "soak": 64 << 20}
_LEAST_SPREAD = 4  # between two sizes, so that each tells something new
_LEAST_LARGEST_BYTES = 1 << 20  # a bandwidth can be told only from messages that take longer than latency
_ROUTING = "aten.topk."
_PRODUCTS = ("aten.mm.", "aten.addmm.", "aten.linear.", "aten.bmm.")


@dataclass(frozen=True)
class Message:
    """A message of the subject: how large, and what it is."""

    num_bytes: int
    what: str


@dataclass(frozen=True)
class Layout:
    """What the subject sends: its messages, its width, its floating-point dtypes, whether it routes tokens."""

    messages: list[Message]
    width: int
    dtypes: list[str]
    routes_tokens: bool


def layout_of(trace: Trace) -> Layout:
    """The messages that data, expert and tensor parallelism of the traced step would send.

    A model in blocks is sharded block by block, as `train` does; another one sends its gradients in buckets.
    """
    parameters = _parameter_sizes(trace)
    hidden, width = _hidden(trace)
    compute = ITEM_BYTES.get(trace.compute_dtype, 4)
    messages = [Message(_CONTROL_BYTES, "counts and norms")]
    if parameters:
        total, ordered = 4 * sum(parameters), sorted(parameters)
        messages += [
            Message(4 * ordered[len(ordered) // 2], "the gradient of the median parameter, fp32"),
            Message(4 * ordered[-1], "the gradient of the largest parameter, fp32"),
        ]
        if trace.block_sizes:
            messages.append(Message(4 * max(trace.block_sizes), "a block's parameters, gathered or reduced, fp32"))
        else:
            messages.append(Message(min(_BUCKET_BYTES, total), "a bucket of gradients, fp32"))
    experts_per_token = _experts_per_token(trace)
    if hidden:
        messages.append(Message(compute * hidden, f"hidden x tokens of a step, {trace.compute_dtype}"))
        if experts_per_token > 1:
            what = f"hidden x tokens of a step to {experts_per_token} experts each, {trace.compute_dtype}"
            messages.append(Message(compute * hidden * experts_per_token, what))
    return Layout(messages, width, _dtypes(trace), experts_per_token > 0)


def sizes_for(layout: Layout, tier: Tier, most: int = 6) -> list[Message]:
    """At most `most` messages of different sizes, smallest first, with one large enough to tell a bandwidth."""
    largest = _LARGEST[tier]
    capped = [
        each if each.num_bytes <= largest else Message(largest, f"{each.what}, cut to {largest >> 20} MiB")
        for each in layout.messages
    ]
    if max(each.num_bytes for each in capped) < _LEAST_LARGEST_BYTES:
        capped.append(Message(_LEAST_LARGEST_BYTES, "larger than any of the subject's, for the bandwidth"))
    kept = _spread(sorted(capped, key=lambda each: each.num_bytes))
    if len(kept) < 3:
        middle = 8 * round(math.sqrt(kept[0].num_bytes * kept[-1].num_bytes) / 8)
        kept.insert(1, Message(middle, "between the others, for the fit"))
    return kept if len(kept) <= most else [*kept[: most - 1], kept[-1]]


def _spread(ordered: Sequence[Message]) -> list[Message]:
    """Without those too near to a smaller one; the largest stays in any case."""
    kept: list[Message] = []
    for each in ordered:
        if not kept or each.num_bytes >= _LEAST_SPREAD * kept[-1].num_bytes:
            kept.append(each)
    if kept[-1].num_bytes < ordered[-1].num_bytes:
        kept[-1 if len(kept) > 1 else len(kept) :] = [ordered[-1]]
    return kept


def _parameter_sizes(trace: Trace) -> list[int]:
    """Element counts of the tensors that the largest call of the optimizer takes as its first argument."""
    found: list[int] = []
    for call in trace.calls:
        if "optimizer" in call.phases and call.args:
            first = [_count(spec) for spec in tensor_specs(call.args[0])]
            if isinstance(call.args[0], list) and sum(first) > sum(found):
                found = first
    if found:
        return found
    singles = [call for call in trace.calls if "optimizer" in call.phases and "add" in call.operator]
    return [_count(spec) for call in singles for spec in list(tensor_specs(call.args))[:1] if spec["shape"]]


def _hidden(trace: Trace) -> tuple[int, int]:
    """Elements of the commonest product's left factor, tokens x width, and its width."""
    counts: dict[tuple[int, int], int] = {}
    for call in trace.calls:
        if call.operator.startswith(_PRODUCTS) and {"forward", "prefill"} & set(call.phases):
            specs = [spec for spec in tensor_specs(call.args) if len(spec["shape"]) >= 2]
            if len(specs) >= 2:
                key = _count(specs[-2]), int(specs[-2]["shape"][-1])
                counts[key] = counts.get(key, 0) + call.count
    if not counts:
        return 0, 256
    return max(counts, key=lambda key: (counts[key], key))


def _dtypes(trace: Trace) -> list[str]:
    """What a plan of that trace sends: gradients in fp32 and bf16, and what else the step computes in."""
    used = {spec["dtype"] for spec in _all_specs(trace)}
    return ["float32", "bfloat16", *(["float16"] if "float16" in used else [])]


def _all_specs(trace: Trace) -> Iterable[dict[str, Any]]:
    for call in trace.calls:
        yield from tensor_specs([call.args, call.kwargs])


def _experts_per_token(trace: Trace) -> int:
    """How many experts each token is sent to: what a top-k outside of sampling takes; 0 where there is none.

    A router that limits groups first takes the best of each group and then of the groups: the last call counts.
    """
    found = [call for call in trace.calls if call.operator.startswith(_ROUTING) and set(call.phases) != {"sampling"}]
    if not found:
        return 0
    args, kwargs = found[-1].args, found[-1].kwargs
    return int(args[1] if len(args) > 1 else kwargs.get("k", 1))


def _count(spec: dict[str, Any]) -> int:
    return math.prod(spec["shape"])
