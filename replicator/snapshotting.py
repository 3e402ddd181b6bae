"""Snapshots a job's volumes under one name, those that have changed, so that together they are of one instant."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime

from replicator import hooks, logs
from replicator.cancellation import Cancellation
from replicator.endpoint import Endpoint, SnapshotRequest
from replicator.errors import HookFailed, ReplicatorError
from replicator.model import Capability, Role, Version, VolumeId, snapshot_name
from replicator.planning import Common
from replicator.settings import Job
from replicator.settling import heads, heads_of, places, settled_in
from replicator.tasks import Network, Task
from replicator.tracker import ReplicaKey

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Snapshotted:
    """What came of snapshotting the volumes of a run.

    :ivar failed: volumes that have no new snapshot, though they need one, and why
    :ivar settled: tasks for which nothing is left to do, with the version that both sides have: it is the live data of
        the volume. A volume with such a task got no new snapshot.
    """

    failed: Mapping[VolumeId, ReplicatorError]
    settled: Mapping[ReplicaKey, Common]


class Snapshots:
    """Takes the snapshots of jobs.

    :param clock: of the names of snapshots
    :param event: told what is worth remembering: kind, subject, message
    """

    def __init__(self, network: Network, clock: Callable[[], datetime], event: Callable[[str, str, str], None]) -> None:
        self._network = network
        self._clock = clock
        self._event = event

    def take(
        self,
        job: Job,
        volumes: Sequence[VolumeId],
        cancel: Cancellation,
        primaries: Set[VolumeId] = frozenset(),
        *,
        at: Endpoint | None = None,
    ) -> dict[VolumeId, ReplicatorError]:
        """Snapshot the volumes under one name, between the job's hooks; which ones failed, and why.

        :param primaries: volumes that are known to be marked as such
        :param at: the node that has them now, where that is not the job's source: its hooks can do nothing there

        Raises nothing of the storages: one volume that fails does not keep the others from being protected.

        :raises HookFailed: then nothing that was snapshotted is sure to be consistent; not for ``before`` where the
            job takes crash-consistent snapshots then
        """
        source = at or self._network.endpoint(job.source.node)
        failed: dict[VolumeId, ReplicatorError] = {}
        ready: dict[str, list[VolumeId]] = {}
        for volume in volumes:
            try:
                if volume not in primaries and at is None:
                    source.ensure_primary(volume)
                ready.setdefault(volume.storage, []).append(volume)
            except ReplicatorError as error:
                failed[volume] = error
        if not ready:
            return failed
        name = snapshot_name(job.name, self._clock())
        requests = _requests(source, ready, name, failed)
        quiet = False
        try:
            with _quiesced(job, volumes) if at is None else nullcontext():
                quiet = True
                failed |= _take(source, requests, cancel)
        except HookFailed as error:
            if quiet or job.quiesce is None or job.quiesce.on_failure == "skip":
                raise
            # "after" has run by now, so nothing is half frozen.
            logs.event(LOG, "warning", "snapshots are only crash-consistent", job=job.name, error=error)
            self._event("snapshots are only crash-consistent", job.name, str(error))
            failed |= _take(source, requests, cancel)
        return failed

    def take_changed(self, job: Job, tasks: Sequence[Task], cancel: Cancellation) -> Snapshotted:
        """Snapshot what has changed, of the volumes of these tasks of the job. Raises nothing: see ``failed``.

        The snapshots of one run are those of one instant. So what was found unchanged before is looked at again once
        the others have theirs: if it is unchanged still, its newest snapshot is its data of that instant as well, and
        if not, all of them are taken again together. (That look finds everything that was written before the
        instant: see :meth:`~replicator.endpoint.Endpoint.heads`.)

        What was switched over is taken where it is now, apart from the others.
        """
        found = self._take_changed(job, [task for task in tasks if not task.reversed], cancel, None)
        turned = {task.pair.source.node: task.pair.source for task in tasks if task.reversed}
        for node, source in turned.items():
            there = [task for task in tasks if task.reversed and task.pair.source.node == node]
            other = self._take_changed(job, there, cancel, source)
            found = Snapshotted({**found.failed, **other.failed}, {**found.settled, **other.settled})
        return found

    def _take_changed(self, job: Job, tasks: Sequence[Task], cancel: Cancellation, at: Endpoint | None) -> Snapshotted:
        volumes = tuple(dict.fromkeys(task.pair.source_volume for task in tasks))
        settled, primaries = _look(tasks) if job.skips_unchanged else ({}, frozenset[VolumeId]())
        quiet = {task.pair.source_volume: settled[task.key].source for task in tasks if task.key in settled}
        changed = [volume for volume in volumes if volume not in quiet]
        try:
            failed = self.take(job, changed, cancel, primaries, at=at)
            if changed and not self._still_quiet(at or self._network.endpoint(job.source.node), quiet):
                settled = {}
                failed = self.take(job, volumes, cancel, primaries, at=at)
        except ReplicatorError as error:  # a hook, or it was stopped
            failed = dict.fromkeys(volumes, error)
        return Snapshotted(failed, settled)

    @staticmethod
    def _still_quiet(source: Endpoint, quiet: Mapping[VolumeId, Version]) -> bool:
        """Whether nobody has written to these volumes since they had their newest snapshots."""
        if not quiet:
            return True
        again = heads(source, tuple(quiet))
        return all(
            (head := again.get(volume)) is not None
            and not head.changed
            and head.newest is not None
            and head.newest.guid == newest.guid
            for volume, newest in quiet.items()
        )


def _look(tasks: Sequence[Task]) -> tuple[dict[ReplicaKey, Common], frozenset[VolumeId]]:
    """The tasks that are settled, and the volumes that are marked as primaries."""
    found = heads_of([task.pair for task in tasks])
    settled: dict[ReplicaKey, Common] = {}
    primaries: set[VolumeId] = set()
    for task in tasks:
        common = settled_in(found, task.pair, task.policy)
        if common is not None:
            settled[task.key] = common
        source = found.get(places(task.pair)[0])
        if source is not None and source.lineage is not None and source.lineage.role is Role.PRIMARY:
            primaries.add(task.pair.source_volume)
    return settled, frozenset(primaries)


def _quiesced(job: Job, volumes: Sequence[VolumeId]) -> AbstractContextManager[None]:
    quiesce = job.quiesce
    if quiesce is None:
        return nullcontext()
    return hooks.quiesced(
        quiesce.before, quiesce.after, quiesce.timeout, job=job.name, volumes=[str(v) for v in volumes]
    )


def _take(
    source: Endpoint, requests: Sequence[SnapshotRequest], cancel: Cancellation
) -> dict[VolumeId, ReplicatorError]:
    """Take snapshots; which volumes have none, and why. :raises Cancelled: it was stopped"""
    failed: dict[VolumeId, ReplicatorError] = {}
    for request in requests:
        cancel.check()
        try:
            taken = source.snapshot(request)
        except ReplicatorError as error:
            failed |= dict.fromkeys(request.volumes, error)
        else:
            failed |= {each.volume: each.error for each in taken if each.error is not None}
    return failed


def _requests(
    source: Endpoint, volumes: Mapping[str, Sequence[VolumeId]], name: str, failed: dict[VolumeId, ReplicatorError]
) -> list[SnapshotRequest]:
    """What can be of one instant together, whatever its storages, and the rest by itself.

    :param volumes: by storage
    :param failed: gets those of storages that are not there
    """
    together: list[VolumeId] = []
    alone: list[VolumeId] = []
    for storage, group in volumes.items():
        try:
            atomic = Capability.ATOMIC_GROUP in source.storage(storage).capabilities
        except ReplicatorError as error:
            failed |= dict.fromkeys(group, error)
        else:
            (together if atomic else alone).extend(group)
    groups = [(*together,)] if together else []
    return [SnapshotRequest(group, name) for group in (*groups, *((volume,) for volume in alone))]
