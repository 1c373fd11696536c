"""How many chips a load of requests takes: prefill and decode on instances of their own, each against its promise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from crosschip.plan.failures.problem import PlanError, at_least, positive
from crosschip.plan.serving.model import ServedModel, ServingChip

__all__ = ["Decode", "Load", "Prefill", "ServingPlan", "plan_serving", "wait_quantile"]

_INSTANCE_CHIPS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_LARGEST_BATCH = 4096
_MOST_INSTANCES = 1_000_000


@dataclass(frozen=True)
class Load:
    """Requests that come at random: how many a second, how long, and what was promised.

    `first_token_s` holds for 95 of 100 requests, `token_s` is the time between an answer's tokens at most. Instances
    are filled to `filled` at most, the rest takes the peaks.
    """

    requests_per_s: float
    prompt_tokens: float
    answer_tokens: float
    first_token_s: float = 2.0
    token_s: float = 0.05
    filled: float = 0.8

    def __post_init__(self) -> None:
        for name in ("requests_per_s", "prompt_tokens", "answer_tokens", "first_token_s", "token_s", "filled"):
            positive(name, getattr(self, name))
        if self.filled > 1.0:
            raise PlanError(f"filled is {self.filled}", "give a share of at most 1")

    @property
    def mean_context(self) -> float:
        """Tokens in a sequence's cache, averaged over the writing of its answer."""
        return self.prompt_tokens + self.answer_tokens / 2


@dataclass(frozen=True)
class Prefill:
    """The prompts' side: `service_s` for one prompt, `first_token_s` with the wait, at P95."""

    chips_per_instance: int
    num_instances: int
    service_s: float
    first_token_s: float
    busy: float

    @property
    def num_chips(self) -> int:
        """Chips of all instances."""
        return self.chips_per_instance * self.num_instances


@dataclass(frozen=True)
class Decode:
    """The answers' side: `batch` sequences an instance, `token_s` from token to token, bound by `bound_by`."""

    chips_per_instance: int
    num_instances: int
    batch: int
    token_s: float
    tokens_per_s: float  # of one instance, when full
    bound_by: str

    @property
    def num_chips(self) -> int:
        """Chips of all instances."""
        return self.chips_per_instance * self.num_instances


@dataclass(frozen=True)
class ServingPlan:
    """Both sides, and what the load means for them. `answer_s` is a whole answer's time at P95 of the first token."""

    chip: str
    load: Load
    prefill: Prefill
    decode: Decode

    @property
    def num_chips(self) -> int:
        """Chips of both sides."""
        return self.prefill.num_chips + self.decode.num_chips

    @property
    def answer_s(self) -> float:
        """Seconds from a request to the end of its answer."""
        return self.prefill.first_token_s + self.load.answer_tokens * self.decode.token_s

    @property
    def answer_tokens_per_s(self) -> float:
        """Tokens written a second by all, at the load that was given."""
        return self.load.requests_per_s * self.load.answer_tokens


def plan_serving(
    model: ServedModel, chip: ServingChip, load: Load, instance_chips: Sequence[int] = _INSTANCE_CHIPS
) -> ServingPlan:
    """The cheapest plan in chips over the sizes of an instance.

    Raises:
        PlanError: the model fits on no instance, no instance keeps the promise, or the load takes too many of them.
    """
    fitting = [num for num in instance_chips if chip.cache_bytes(model, num) > 0]
    if not fitting:
        raise PlanError(
            f"{model.weight_bytes / 1e9:,.0f} GB of weights do not fit on {max(instance_chips)} x {chip.name} "
            f"({chip.memory_gb:g} GB each)",
            "serve in fewer bits, or give larger instances",
        )
    prefills = [found for num in fitting if (found := _prefill(model, chip, load, num))]
    if not prefills:
        raise _no_prefill(chip, load, min(_prompt_s(model, chip, load, num) for num in fitting))
    decodes = [each for num in fitting if (each := _decode(model, chip, load, num))]
    if not decodes:
        fastest = min(_token_s(model, chip, load, num, 1) for num in fitting)
        raise PlanError(
            f"one sequence alone takes {fastest:.3g} s a token on {chip.name}, {load.token_s:g} s are promised, or "
            f"the cache of one sequence of {load.prompt_tokens + load.answer_tokens:g} tokens does not fit",
            "promise more time a token, serve in fewer bits, or shorten the answers",
        )
    return ServingPlan(
        chip.name,
        load,
        min(prefills, key=lambda each: (each.num_chips, each.first_token_s)),
        min(decodes, key=lambda each: (each.num_chips, each.token_s)),
    )


def _no_prefill(chip: ServingChip, load: Load, alone_s: float) -> PlanError:
    """Why no number of instances keeps the promise, where a prompt takes `alone_s` at best."""
    if alone_s <= load.first_token_s:
        return PlanError(
            f"{load.requests_per_s:g} requests a second with {load.first_token_s:g} s to the first token take more "
            f"than {_MOST_INSTANCES:,} instances of {chip.name}",
            "plan for fewer requests a second, or promise more time",
        )
    return PlanError(
        f"a prompt of {load.prompt_tokens:g} tokens takes {alone_s:.3g} s on {chip.name} without any wait, "
        f"{load.first_token_s:g} s to the first token are promised",
        "promise more, or shorten the prompts",
    )


def _prompt_s(model: ServedModel, chip: ServingChip, load: Load, num_chips: int) -> float:
    flops = model.prompt_flops(load.prompt_tokens, load.prompt_tokens / 2)  # causal: half the prompt on average
    return chip.pass_s(flops, model.bytes_read(load.prompt_tokens), num_chips)


def _prefill(model: ServedModel, chip: ServingChip, load: Load, num_chips: int) -> Prefill | None:
    """The fewest instances of this size that keep the first token's promise, or None."""
    service_s = _prompt_s(model, chip, load, num_chips)
    if service_s > load.first_token_s:
        return None
    work = load.requests_per_s * service_s  # instances that would always be busy

    def first_token_s(instances: int) -> float:
        return service_s + wait_quantile(instances, work, service_s, 0.95)

    if work / load.filled > _MOST_INSTANCES:
        return None
    least = max(1, math.ceil(work / load.filled))
    high = least
    while first_token_s(high) > load.first_token_s:
        high *= 2
        if high > _MOST_INSTANCES:
            return None
    low = least - 1 if high == least else high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if first_token_s(middle) <= load.first_token_s else (middle, high)
    return Prefill(num_chips, high, service_s, first_token_s(high), work / high)


def wait_quantile(servers: int, work: float, service_s: float, share: float) -> float:
    """The wait that `share` of the requests stay below, in seconds: Erlang C, halved for a fixed time of service.

    Of a queue M/M/c the wait beyond t has the probability C exp(-(c - a) t / service), with `work` a in servers; with a
    fixed time of service the wait is about half of that (Cosmetatos), exactly so for one server's mean.
    """
    at_least("servers", servers, 1)
    if work >= servers:
        return math.inf
    blocked = 1.0  # Erlang B by its recursion, sound for thousands of servers
    for number in range(1, servers + 1):
        blocked = work * blocked / (number + work * blocked)
    waiting = blocked / (1.0 - work / servers * (1.0 - blocked))
    if waiting <= 1.0 - share:
        return 0.0
    return math.log(waiting / (1.0 - share)) * service_s / (servers - work) / 2


def _token_s(model: ServedModel, chip: ServingChip, load: Load, num_chips: int, batch: int) -> float:
    num_bytes = model.bytes_read(batch) + batch * load.mean_context * model.cache_bytes_per_token
    return chip.pass_s(model.flops(batch, load.mean_context), num_bytes, num_chips)


def _decode(model: ServedModel, chip: ServingChip, load: Load, num_chips: int) -> Decode | None:
    """The largest batch of this size of instance that keeps the promise and fits, or None."""
    whole = (load.prompt_tokens + load.answer_tokens) * model.cache_bytes_per_token  # a sequence at its longest
    room = _LARGEST_BATCH if whole == 0 else int(min(_LARGEST_BATCH, chip.cache_bytes(model, num_chips) / whole))
    if room < 1 or _token_s(model, chip, load, num_chips, 1) > load.token_s:
        return None
    low, high = 1, room + 1
    while high - low > 1:  # the time of a pass grows with the batch
        middle = (low + high) // 2
        low, high = (middle, high) if _token_s(model, chip, load, num_chips, middle) <= load.token_s else (low, middle)
    token_s = _token_s(model, chip, load, num_chips, low)
    flops_s = chip.pass_s(model.flops(low, load.mean_context), 0.0, num_chips)
    bound = (
        "the promised time" if low < room else "the largest batch" if room == _LARGEST_BATCH else "room for the cache"
    )
    bound += ", products" if flops_s >= token_s else ", memory bandwidth"
    # By Little's law so many sequences are under way at once; none waits for a place if the instances are not full.
    under_way = load.requests_per_s * load.answer_tokens * token_s
    instances = max(1, math.ceil(under_way / (low * load.filled)))
    return Decode(num_chips, instances, low, token_s, low / token_s, bound)
