"""Whose turn it is: a task has a replica to itself while it works on it, and no more of them work at once than may."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol

from replicator.cancellation import Cancellation
from replicator.errors import VolumeBusy
from replicator.settling import places
from replicator.tasks import Network, Task
from replicator.tracker import Tracker

PATIENCE = 3600.0
"""Seconds that a resync or a verification waits for a run of the same replica to end."""
BUSY_PAUSE = 0.2


class Slots(Protocol):
    """Bounds what runs at once (see ``scheduler.limits``)."""

    def slot(
        self, volume: str, target: str, node: str, cancel: Cancellation, *, pools: Iterable[str] = ()
    ) -> AbstractContextManager[None]:
        """Have the right to move ``volume`` to ``target`` (through ``node``) while the block runs.

        :param pools: that it reads or writes, as :meth:`~replicator.tasks.Network.pool` calls them

        Waits for the limits of this node and of the peer. :raises VolumeBusy: that volume and target run already
        """


class Turns:
    """Gives tasks their turns, and shows them as running. Thread-safe."""

    def __init__(self, network: Network, slots: Slots, tracker: Tracker) -> None:
        self._network = network
        self._slots = slots
        self._tracker = tracker

    @contextmanager
    def take(self, task: Task, cancel: Cancellation) -> Iterator[None]:
        """Have a replica to oneself, within the limits, while the block runs.

        :raises VolumeBusy: somebody else works on it
        """
        with self._slot(task, cancel), self._tracker.running(task.key):
            yield

    @contextmanager
    def exclusive(self, task: Task, cancel: Cancellation) -> Iterator[None]:
        """:meth:`take` it as soon as a run under way has ended.

        :raises VolumeBusy: that took longer than ``PATIENCE``
        """
        deadline = time.monotonic() + PATIENCE
        with ExitStack() as stack:
            while True:
                cancel.check()
                try:
                    stack.enter_context(self._slot(task, cancel))
                except VolumeBusy:
                    if time.monotonic() > deadline:
                        raise
                    cancel.wait(BUSY_PAUSE)
                else:
                    break
            with self._tracker.running(task.key):
                yield

    def taken(self, task: Task) -> bool:
        """Whether somebody works on it now."""
        return self._tracker.get(task.key).progress is not None

    def _slot(self, task: Task, cancel: Cancellation) -> AbstractContextManager[None]:
        pools = {
            pool for node, volume in places(task.pair) if (pool := self._network.pool(node, volume.storage)) is not None
        }
        return self._slots.slot(task.key.volume, task.key.target, task.peer, cancel, pools=pools)
