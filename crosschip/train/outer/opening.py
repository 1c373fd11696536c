"""Starting what connects a rank to the other groups, from the recipe and a choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from crosschip.recipe import GroupSettings
from crosschip.thin_links import BYTES_PER_ELEMENT, Choice, Link
from crosschip.train.outer.diloco import DiLoCo, Rhythm
from crosschip.train.outer.errors import GroupsError
from crosschip.train.outer.every_step import EveryStep
from crosschip.train.outer.handle import SidecarHandle, TrainingTensors
from crosschip.train.outer.link_watch import OuterLinkWatch
from crosschip.train.outer.memory import Layout
from crosschip.train.outer.messages import Config, Member, Rules
from crosschip.train.outer.placement import split_into_fragments
from crosschip.train.outer.time_limits import TimeLimits, limits_for
from crosschip.train.outer.training_state import FlatParameters, TrainingState

__all__ = ["open_groups"]

ShareStore = Callable[[str | None], str]


def open_groups(
    settings: GroupSettings,
    choice: Choice,
    member: Member,
    state: TrainingState,
    batch_size: int,
    log: Path,
    link: Link | None = None,
    recipe_digest: str = "",
    share_store: ShareStore | None = None,
    still_waiting: Callable[[], None] = lambda: None,
) -> EveryStep | DiLoCo:
    """Start this rank's sidecar. DiLoCo's `join` is left to the caller, as a checkpoint may be loaded before it.

    `log` is the sidecar's. In a group of several ranks `share_store` hands a text from rank 0 to the others: called
    with the text on rank 0 and with None elsewhere, it gives the text everywhere. `recipe_digest` must be the same in
    all groups. `still_waiting`: see `SidecarHandle`.

    Raises:
        GroupsError: torchft is missing, the lighthouse's address is none, or more fragments than parameters.
    """
    flat = state.flat()
    rules = _rules(settings, choice, flat, recipe_digest)
    layout = Layout(flat.num_elements, state.num_bytes, has_outer_state=choice.mode == "diloco")
    limits = _limits(choice, flat, link)

    def start(donate: TrainingTensors) -> SidecarHandle:
        if member.size == 1:
            return SidecarHandle(Config(member, rules, layout, limits), donate, log, still_waiting)
        assert share_store is not None, "ranks of one group need share_store"
        if member.rank == 0:
            handle = SidecarHandle(Config(member, rules, layout, limits), donate, log, still_waiting)
            share_store(handle.store)
            return handle
        store = share_store(None)
        return SidecarHandle(Config(replace(member, store=store), rules, layout, limits), donate, log, still_waiting)

    if choice.mode == "every-step":
        return EveryStep(start, flat, state)
    interval = choice.sync_every // choice.fragments
    rhythm = Rhythm(interval, choice.overlap_steps, settings.own_share, batch_size)
    watch = None if link is None else OuterLinkWatch(settings, link, flat.num_elements * member.size, member.size)
    return DiLoCo(start, flat, state, rhythm, watch)


def _rules(settings: GroupSettings, choice: Choice, flat: FlatParameters, recipe_digest: str) -> Rules:
    agreed = f"{recipe_digest} {choice.mode} {choice.sync_every} {choice.overlap_steps} {settings.own_share}"
    if choice.mode == "every-step":
        return Rules(choice.compression, settings=agreed)
    try:
        fragments = split_into_fragments(flat.sizes, choice.fragments)
    except ValueError as error:
        raise GroupsError(str(error), "lower groups.fragments") from None
    return Rules(
        choice.compression, tuple(fragments), settings.outer_learning_rate, settings.outer_momentum, settings=agreed
    )


def _limits(choice: Choice, flat: FlatParameters, link: Link | None) -> TimeLimits:
    num_bytes = 2 * flat.num_elements * BYTES_PER_ELEMENT[choice.compression]
    return limits_for(num_bytes, link.bandwidth_bytes_s if link else None, link.latency_s if link else 0.0)
