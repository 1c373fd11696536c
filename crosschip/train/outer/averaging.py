"""The sidecar's part of averaging each step: the mean gradient over the groups, weighted by trained tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence

from crosschip.train.outer.agreement import Header, check_headers, digest_of
from crosschip.train.outer.codec import CODECS, Codec
from crosschip.train.outer.exchange import ExchangeGroup, Mean, gather_numbers, weighted_mean
from crosschip.train.outer.membership import Membership
from crosschip.train.outer.memory import SharedMemory
from crosschip.train.outer.messages import Average, Averaged, Config

__all__ = ["Gathered", "average", "codec_for", "gather", "header_of"]


class Gathered:
    """What all groups said before the exchange: their headers and numbers, in the order of ranks."""

    def __init__(self, headers: Sequence[Header], numbers: Sequence[Sequence[float]], num_bytes: int) -> None:
        self.headers, self.numbers, self.num_bytes = headers, numbers, num_bytes

    @property
    def weights(self) -> list[float]:
        """Each group's tokens."""
        return [float(header.num_tokens) for header in self.headers]


def header_of(config: Config, seniority: int, step: int, num_tokens: int, num_numbers: int, checksum: int) -> Header:
    """This group's header."""
    rules = digest_of(f"{config.rules} {config.member.size}")
    return Header(rules, config.layout.num_elements, num_numbers, step, num_tokens, checksum, seniority)


def gather(group: ExchangeGroup, own: Header, numbers: Sequence[float]) -> Gathered:
    """Tell the others this group's header and numbers, and hear theirs.

    Raises:
        GroupsError: this group does not belong to the others.
        UnfitGroup: another one does not.
    """
    told, num_bytes = gather_numbers(group, own.numbers())
    headers = [Header.read(each) for each in told]
    check_headers(headers, group.rank)
    if not numbers:
        return Gathered(headers, [[] for _ in headers], num_bytes)
    all_numbers, more_bytes = gather_numbers(group, numbers)
    return Gathered(headers, all_numbers, num_bytes + more_bytes)


def codec_for(config: Config, group: ExchangeGroup) -> Codec:
    """The codec that the groups agreed on; a group that is alone sends nothing, so it loses nothing either."""
    return CODECS[config.rules.compression if group.size > 1 else "none"]


def average(
    membership: Membership, memory: SharedMemory, config: Config, group: ExchangeGroup, command: Average
) -> Averaged:
    """Average the gradients in the exchange part; a group that dies meanwhile means that nobody commits the step.

    Raises:
        GroupsError: the groups do not belong together.
    """
    started = time.monotonic()
    mean, gathered, trouble = None, None, ""
    try:
        num_numbers = len(command.numbers)
        own = header_of(config, membership.seniority, command.step, command.num_tokens, num_numbers, command.checksum)
        gathered = gather(group, own, command.numbers)
        if group.size > 1 and sum(gathered.weights) > 0:
            mean = weighted_mean(group, memory.exchange, gathered.weights, codec_for(config, group), memory.residual)
    except (RuntimeError, OSError) as error:
        trouble = f"{type(error).__name__}: {error}"
    committed = membership.commit(command.step, not trouble)
    if not committed or gathered is None:
        return Averaged(False, 0, (), 0, time.monotonic() - started, trouble or "another rank of this group failed")
    if mean is not None:
        keep(memory, mean)
    return Averaged(
        committed=True,
        num_tokens=sum(header.num_tokens for header in gathered.headers),
        numbers=tuple(sum(each) for each in zip(*gathered.numbers, strict=True)),
        num_bytes_sent=gathered.num_bytes + (mean.num_bytes_sent if mean else 0),
        seconds=time.monotonic() - started,
    )


def keep(memory: SharedMemory, mean: Mean) -> None:
    """Put a committed mean, and what its encoding lost, where they belong."""
    memory.exchange.copy_(mean.values)
    if mean.residual is not None:
        memory.residual.copy_(mean.residual)
