"""What may run at once: no replica twice, and no more transfers than this node and each peer are to carry."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from replicator.cancellation import Cancellation
from replicator.errors import DeadlineExceeded, VolumeBusy

DEFAULT_PATIENCE = 6 * 3600.0  # seconds; the transfers in front may each be hours long


@dataclass(eq=False)
class _Ticket:
    """Somebody who waits, or has been let in."""

    node: str
    pools: frozenset[str]
    admitted: bool = False
    changed: threading.Event = field(default_factory=threading.Event)


class Slots:
    """Bounds what runs at once. Thread-safe.

    Whoever came first is let in first, except that who waits for a busy peer or pool does not keep those for others
    waiting. Nobody is overtaken by a later one for what they wait for, so nobody waits for ever.

    :param total: transfers at once, all peers together
    :param per_node: transfers at once to or from one node
    :param per_pool: transfers at once that read or write one pool; None: as many as ``total``
    :param patience: seconds after which waiting for a place is given up
    """

    def __init__(
        self, total: int, per_node: int, per_pool: int | None = None, *, patience: float = DEFAULT_PATIENCE
    ) -> None:
        per_pool = total if per_pool is None else per_pool
        if total < 1 or per_node < 1 or per_pool < 1:
            raise ValueError("limits are at least 1")
        self._total = total
        self._per_node = per_node
        self._per_pool = per_pool
        self._patience = patience
        self._lock = threading.Lock()
        self._claimed: set[tuple[str, str]] = set()
        self._queue: list[_Ticket] = []
        self._running: Counter[str] = Counter()
        self._pools: Counter[str] = Counter()

    @property
    def running(self) -> int:
        """How many have a place now."""
        with self._lock:
            return self._running.total()

    @property
    def waiting(self) -> int:
        """How many wait for a place now."""
        with self._lock:
            return len(self._queue)

    @contextmanager
    def slot(
        self, volume: str, target: str, node: str, cancel: Cancellation, *, pools: Iterable[str] = ()
    ) -> Iterator[None]:
        """Have the right to move ``volume`` to ``target`` (through ``node``) while the block runs.

        :param pools: that are read or written
        :raises VolumeBusy: the same volume and target run or wait already
        :raises DeadlineExceeded: no place within the patience
        :raises ReplicatorError: the error of ``cancel``, once that is cancelled
        """
        pair = (volume, target)
        ticket = _Ticket(node, frozenset(pools))
        with self._lock:
            if pair in self._claimed:
                raise VolumeBusy(
                    f"replication of {volume} to {target} is already running",
                    hint="wait for it to end; `replicator status` shows how far it is",
                )
            self._claimed.add(pair)
            self._queue.append(ticket)
            self._admit()
        try:
            with cancel.unblock(ticket.changed.set):
                ticket.changed.wait(self._patience)
            cancel.check()
            if not self._leave_queue(ticket):
                raise DeadlineExceeded(
                    f"{volume} to {target} waited {self._patience:g} s for one of {self._total} transfers at once "
                    f"({self._per_node} per node, {self._per_pool} per pool)",
                    hint="raise [limits] transfers, transfers_per_target or transfers_per_pool, or run the jobs "
                    "less often",
                )
            yield
        finally:
            self._release(pair, ticket)

    def _leave_queue(self, ticket: _Ticket) -> bool:
        """Whether the ticket was admitted; if not, it is no longer waited for."""
        with self._lock:
            if not ticket.admitted:
                self._queue.remove(ticket)
            return ticket.admitted

    def _release(self, pair: tuple[str, str], ticket: _Ticket) -> None:
        with self._lock:
            self._claimed.discard(pair)
            if ticket.admitted:
                self._running[ticket.node] -= 1
                self._pools.subtract(ticket.pools)
            elif ticket in self._queue:
                self._queue.remove(ticket)
            self._admit()

    def _admit(self) -> None:
        """Let in everyone for whom there is a place, in the order they came. The lock is held."""
        waiting: list[_Ticket] = []
        taken: set[str] = set()  # what somebody before it has all but one thing of
        for ticket in self._queue:
            node, places = self._running[ticket.node] < self._per_node, {ticket.node, *ticket.pools}
            pools = all(self._pools[pool] < self._per_pool for pool in ticket.pools)
            if self._running.total() < self._total and node and pools and taken.isdisjoint(places):
                self._running[ticket.node] += 1
                self._pools.update(ticket.pools)
                ticket.admitted = True
                ticket.changed.set()
                continue
            waiting.append(ticket)
            if node and not pools:
                taken |= places
        self._queue = waiting
