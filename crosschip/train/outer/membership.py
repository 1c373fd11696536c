"""Membership, healing and commits of one rank, by torchft's managers and lighthouse. Lives in the sidecar only.

torchft's `Manager` asks for an accelerator at every turn and names its store by a number that a restarted lighthouse
gives out again; its servers, clients, process group and transport are used here without it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import socket
import threading
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
from torch._C._distributed_c10d import TCPStore
from torchft.checkpointing import HTTPTransport
from torchft.coordination import ManagerClient, ManagerServer
from torchft.process_group import ProcessGroupGloo

from crosschip.train.outer.errors import GroupsError
from crosschip.train.outer.exchange import ExchangeGroup
from crosschip.train.outer.lighthouse_watch import LighthouseWatch
from crosschip.train.outer.messages import Member
from crosschip.train.outer.network import interface_of, own_address_towards
from crosschip.train.outer.time_limits import TimeLimits

__all__ = ["Membership", "Quorum"]

_MANAGER_KEY = "manager"
_LOOK_EVERY_S = 0.2
_HEARTBEATS_SEEN = 10
_COME_S = 0.5
_ASK_AGAIN_S = 0.2


class Quorum:
    """Who takes part now: this group's rank among `size`, where the furthest stands, and the state to heal from."""

    def __init__(self, group: ExchangeGroup, max_step: int, state: dict[str, Any] | None) -> None:
        self.group = group
        self.max_step = max_step
        self.state = state


class Membership:
    """One rank's membership. Rank 0 of a group opens the group's store at once and its manager with the first quorum.

    With the manager the heartbeats begin, and who has a heartbeat is waited for: so not before the trainer is ready.
    """

    def __init__(self, member: Member, limits: TimeLimits, tell: Callable[[str], None]) -> None:
        self._member, self._limits, self._tell = member, limits, tell
        self._host = own_address_towards(member.lighthouse)
        self._store = self._open_store()
        self._server: ManagerServer | None = None
        self._client: ManagerClient | None = None
        self._connecting = threading.Lock()  # a question that is asked anew must not open a second manager
        self._transport = HTTPTransport(timedelta(seconds=limits.healing_s), num_chunks=0)
        interface = interface_of(self._host)
        if interface is not None:  # else gloo takes the one that the host's name resolves to, which may be another
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        self._process_group = ProcessGroupGloo(timedelta(seconds=limits.connecting_s))
        self._configured: tuple[object, ...] = ()
        self._failures = 0
        self._watch = LighthouseWatch(member.lighthouse, limits.connect_s, tell)
        self._times_lost = 0
        self.seniority = 0  # commits that this process has taken part in

    @property
    def store(self) -> str:
        """The address of the group's store, HOST:PORT."""
        return self._member.store or f"{self._host}:{self._store.port}"

    def _open_store(self) -> TCPStore:
        limit = timedelta(seconds=self._limits.healing_s)
        if self._member.store is None:
            return TCPStore(self._host, 0, is_master=True, wait_for_workers=False, timeout=limit)
        host, _, port = self._member.store.rpartition(":")
        return TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=limit)

    def _connected(self) -> ManagerClient:
        with self._connecting:
            if self._client is None:
                self._client = self._connect()
            return self._client

    def _connect(self) -> ManagerClient:
        limit = timedelta(seconds=self._limits.connect_s)
        if self._member.rank == 0:
            self._server = ManagerServer(
                replica_id=f"{self._member.group:06d}:{uuid.uuid4()}",  # sorted by number: ranks follow groups
                lighthouse_addr=self._member.lighthouse,
                hostname=self._host,
                bind="[::]:0",
                store_addr=self.store,
                world_size=self._member.size,
                heartbeat_interval=timedelta(seconds=self._limits.heartbeat_every_s),
                connect_timeout=limit,
                quorum_retries=0,
            )
            self._store.set(_MANAGER_KEY, self._server.address())
        return ManagerClient(self._store.get(_MANAGER_KEY).decode(), connect_timeout=limit)

    def quorum(self, step: int, donate: Callable[[], dict[str, Any]]) -> Quorum:
        """Meet the other groups; give those that are behind our state, or take theirs when we are.

        `step` is where this group stands, which may be below zero (`agreement.standing`).

        Raises:
            GroupsError: nobody answered for `quorum_patience_s`.
        """
        deadline = time.monotonic() + self._limits.quorum_patience_s
        while True:
            found = self._ask(step, deadline)
            quorum = None
            try:
                quorum, trouble = self._prepare(found, donate), ""
            except (RuntimeError, OSError, AssertionError) as error:  # another group died just now
                trouble = f"{type(error).__name__}: {error}"
                self._tell(f"quorum of {len(found.replica_ids)} fell apart: {trouble}")
            if self.agreed(found.max_step, not trouble) and quorum is not None:
                return quorum
            self.finish(committed=False)

    def _ask(self, step: int, deadline: float) -> Any:
        """The answer to one question to the lighthouse, asked anew when the lighthouse has been another one since."""
        while True:
            times_lost = self._watch.times_lost
            if times_lost != self._times_lost:
                self._times_lost = times_lost
                self._meet_new_lighthouse(deadline)
            answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
            threading.Thread(target=self._question, args=(step, answers), daemon=True).start()
            while times_lost == self._watch.times_lost:
                if time.monotonic() > deadline:
                    raise self._no_quorum("it did not form one")
                with contextlib.suppress(queue.Empty):
                    answer = answers.get(timeout=_LOOK_EVERY_S)
                    if not isinstance(answer, Exception):
                        return answer
                    self._tell(f"no quorum: {answer}")
                    time.sleep(_ASK_AGAIN_S)
                    break

    def _meet_new_lighthouse(self, deadline: float) -> None:
        """Wait for it, and until it knows who lives: else the first to ask would be a quorum alone.

        The failure that is counted makes it form a quorum with new connections for all.
        """
        while not self._watch.is_there.wait(_LOOK_EVERY_S):
            if time.monotonic() > deadline:
                raise self._no_quorum("it does not answer")
        self._configured = ()
        self._failures += 1
        time.sleep(_HEARTBEATS_SEEN * self._limits.heartbeat_every_s)

    def _question(self, step: int, answers: queue.SimpleQueue[Any]) -> None:
        try:
            answers.put(
                self._connected()._quorum(
                    group_rank=self._member.rank,
                    step=step,
                    checkpoint_metadata=self._state_address(),
                    shrink_only=False,
                    timeout=timedelta(seconds=self._limits.quorum_patience_s),
                    init_sync=False,  # equal seeds give equal weights; `check_headers` refuses others
                    commit_failures=self._failures,
                )
            )
        except (RuntimeError, TimeoutError) as error:
            answers.put(error)

    def _no_quorum(self, why: str) -> GroupsError:
        return GroupsError(
            f"no quorum of {self._member.min_groups} groups at the lighthouse {self._member.lighthouse} for "
            f"{self._limits.quorum_patience_s:.0f} s: {why}",
            "look whether the lighthouse and the other groups run, and whether this machine reaches them",
        )

    def _state_address(self) -> str:
        """Where our state can be fetched. The transport itself would give this host's name."""
        return f"http://{self._host}:{urlsplit(self._transport.metadata()).port}/checkpoint/"

    def _prepare(self, found: Any, donate: Callable[[], dict[str, Any]]) -> Quorum:
        key = (found.quorum_id, found.store_address, *found.replica_ids)
        if key != self._configured:
            self._configured = ()
            self._connect_to_all(found, key)
            self._configured = key
            self._tell(f"quorum {found.quorum_id}: {found.replica_world_size} groups, this is {found.replica_rank}")
        limit = timedelta(seconds=self._limits.healing_s)
        if found.recover_dst_replica_ranks:
            self._tell(f"giving our state to {found.recover_dst_replica_ranks}")
            self._transport.send_checkpoint(found.recover_dst_replica_ranks, found.max_step, donate(), limit)
        state = self._fetch(found, limit) if found.heal else None
        group = ExchangeGroup(
            self._process_group, found.replica_rank, found.replica_world_size, self._limits.exchange_s
        )
        return Quorum(group, found.max_step, state)

    def _connect_to_all(self, found: Any, key: tuple[object, ...]) -> None:
        """Open connections to all groups of a quorum.

        Raises:
            RuntimeError, OSError: one has died since it came, or does not answer for `connecting_s`.
        """
        path, group = self._meeting_place(found, key), self._process_group
        group.configure(path, str(self._member.group), found.replica_rank, found.replica_world_size)
        # The time to connect would be that of every operation as well.
        exchange = timedelta(seconds=self._limits.exchange_s)
        group.parent._get_backend(torch.device("cpu"))._set_default_timeout(exchange)

    def _meeting_place(self, found: Any, key: tuple[object, ...]) -> str:
        """Where in the first group's store the addresses of a quorum are written and read.

        The same quorum may come again, when a new lighthouse has counted to its number; then the old addresses are
        still there. So everybody counts itself in, and those of the second time go to another place.
        """
        names = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
        path = f"groups/{names}-{found.max_step}/{self._member.rank}"
        host, _, port = found.store_address.rpartition(":")
        # The store's own client asks again and again where nobody listens, as long as it may.
        socket.create_connection((host, int(port)), self._limits.connecting_s).close()
        limit = timedelta(seconds=self._limits.connecting_s)
        store = TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=limit)
        times = (store.add(f"{path}/count", 1) - 1) // found.replica_world_size
        return f"{found.store_address}/{path}/{times}"

    def _fetch(self, found: Any, limit: timedelta) -> dict[str, Any]:
        started = time.monotonic()
        connect = timedelta(seconds=self._limits.connect_s)
        donor = ManagerClient(found.recover_src_manager_address, connect_timeout=connect)
        where = donor._checkpoint_metadata(self._member.rank, timeout=limit)
        state = self._transport.recv_checkpoint(found.recover_src_replica_rank, where, found.max_step, limit)
        self._tell(f"took the state of {found.recover_src_replica_rank} in {time.monotonic() - started:.2f} s")
        return state

    def agreed(self, step: int, mine: bool) -> bool:
        """Whether every rank of this group says yes; a group of one asks nobody."""
        if self._member.size == 1:
            return mine
        limit = timedelta(seconds=self._limits.healing_s)
        return self._connected().should_commit(self._member.rank, step, mine, timeout=limit)

    def wait_for_more(self) -> None:
        """End a round of fewer groups than `min_groups`, and give others time to come."""
        self.finish(committed=True)
        time.sleep(_COME_S)

    def commit(self, step: int, mine: bool) -> bool:
        """Decide with the other ranks of this group whether a step counts, and end the round."""
        committed = self.agreed(step, mine)
        self.finish(committed)
        self.seniority += committed
        return committed

    def finish(self, committed: bool) -> None:
        """End the round. After one that failed the lighthouse forms a new quorum, with new connections for all."""
        self._failures = 0 if committed else self._failures + 1
        self._transport.disallow_checkpoint()
