"""Prunes what a run has brought forward, and now and then what stands still.

A run prunes what it brought something to. What stands still needs that only where an earlier attempt failed, or where
the policy is another one now; so it is looked at once in a while.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from datetime import tzinfo

from replicator import logs, retention
from replicator.cancellation import Cancellation
from replicator.endpoint import Endpoint, PruneRequest
from replicator.errors import ReplicatorError
from replicator.model import VolumeId, VolumeState
from replicator.planning import Common, origin_guids
from replicator.settling import Place, places, states_of
from replicator.tasks import Task

LOG = logging.getLogger(__name__)

INTERVAL = 24 * 3600.0
"""Seconds."""


def source_request(task: Task, protect: Set[str], *, dry_run: bool = False) -> PruneRequest:
    """The request that prunes the volume that a task replicates.

    :param protect: guids; of all targets of the job that are known, for one request prunes for all of them
    """
    volume = task.pair.source_volume
    return PruneRequest(volume, task.job.name, task.keep_source, tuple(sorted(protect)), dry_run=dry_run)


def target_request(task: Task, protect: Set[str], *, dry_run: bool = False) -> PruneRequest:
    """The request that prunes one replica."""
    keep = task.keep_target
    return PruneRequest(task.pair.target_volume, task.job.name, keep, tuple(sorted(protect)), dry_run=dry_run)


class Pruner:
    """Prunes after runs. A failure is logged and tried again by a later run; it does not undo the run. Thread-safe.

    :param zone: of the hours and days of a policy, see :class:`Tidying`
    """

    def __init__(self, zone: tzinfo) -> None:
        self._tidying = Tidying(zone)

    def prune(self, endpoint: Endpoint, request: PruneRequest) -> None:
        """Prune one volume."""
        self._tidying.done((endpoint.node, request.volume), request)
        try:
            outcomes = endpoint.prune(request)
        except ReplicatorError as error:
            logs.event(LOG, logging.WARNING, "prune failed", volume=request.volume, node=endpoint.node, error=error)
            return
        for outcome in outcomes:
            if outcome.error:
                logs.event(
                    LOG,
                    logging.WARNING,
                    "snapshot could not be destroyed",
                    volume=request.volume,
                    node=endpoint.node,
                    snapshot=outcome.version.name,
                    error=outcome.error,
                )

    def tidy(self, settled: Sequence[tuple[Task, Common]], cancel: Cancellation) -> None:
        """Prune volumes that do not change, now and then: what could not be destroyed when they last did, or what a
        changed policy no longer keeps. Returns early where it is stopped, which undoes no run.

        :param settled: all tasks of these volumes, with what both sides have
        """
        needed: dict[VolumeId, set[str]] = {}
        for task, common in settled:
            needed.setdefault(task.pair.source_volume, set()).add(common.source.guid)
        requests: dict[Place, PruneRequest] = {}
        endpoints: dict[str, Endpoint] = {}
        for task, common in settled:
            pair = task.pair
            ours, theirs = places(pair)
            requests[theirs] = target_request(task, {common.target.guid})
            requests[ours] = source_request(task, needed[pair.source_volume])
            endpoints |= {pair.source.node: pair.source, pair.target.node: pair.target}
        due = self._tidying.due(requests)
        if not due:
            return
        tasks = [task for task, _ in settled if not due.isdisjoint(places(task.pair))]
        states = states_of([task.pair for task in tasks])
        for task in tasks:
            source = states.get(places(task.pair)[0])
            origins = origin_guids(source.state, task.policy) if source is not None and source.state else ()
            for place in places(task.pair) if origins else ():
                protect = {*requests[place].protect, *origins}
                requests[place] = replace(requests[place], protect=tuple(sorted(protect)))
        for place in sorted(due):
            if cancel.cancelled:
                return
            listing = states.get(place)
            if listing is not None and self._tidying.has_work(requests[place], listing.state):
                self.prune(endpoints[place[0]], requests[place])


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
