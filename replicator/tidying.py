"""When volumes that do not change are pruned.

A run prunes what it brought something to. What stands still needs that only where an earlier attempt failed, or where
the policy is another one now; so it is looked at once in a while.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from datetime import tzinfo

from replicator import retention
from replicator.endpoint import PruneRequest
from replicator.model import VolumeState
from replicator.settling import Place

INTERVAL = 24 * 3600.0
"""Seconds."""


class Tidying:
    """Remembers when each volume was pruned last, for as long as the process lives. Thread-safe.

    :param zone: of the hours and days of a policy, for telling whether there is anything to prune; the node that has
        the storage decides by its own what goes
    """

    def __init__(self, zone: tzinfo, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._zone = zone
        self._clock = clock
        self._lock = threading.Lock()
        self._last: dict[tuple[Place, str], tuple[float, str]] = {}

    def done(self, place: Place, request: PruneRequest) -> None:
        """It is being pruned."""
        with self._lock:
            self._last[place, request.job] = (self._clock(), request.keep)

    def due(self, requests: Mapping[Place, PruneRequest]) -> frozenset[Place]:
        """Those that were not pruned by this policy lately; they count as looked at now."""
        now = self._clock()
        due = set()
        with self._lock:
            for place, request in requests.items():
                last, keep = self._last.get((place, request.job), (None, ""))
                if last is None or keep != request.keep or now - last >= INTERVAL:
                    due.add(place)
                    self._last[place, request.job] = (now, request.keep)
        return frozenset(due)

    def has_work(self, request: PruneRequest, state: VolumeState | None) -> bool:
        """Whether the policy would have something destroyed."""
        if state is None:
            return False
        policy = retention.parse(request.keep)
        protect = frozenset(request.protect)
        decisions = retention.apply(state.versions, policy, job=request.job, protect=protect, zone=self._zone)
        return any(not decision.keep for decision in decisions)
