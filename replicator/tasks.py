"""What a job means now: the volumes that its source selects, and for each of them and each target one task."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from replicator.endpoint import Endpoint
from replicator.errors import NoSuchVolume, ReplicatorError, UsageError
from replicator.model import VolumeId, VolumeInfo, hold_tag, replica_volume
from replicator.origins import origins_of
from replicator.planning import SendPolicy
from replicator.replication import Limits, Options, Pacer, Pair
from replicator.reporting import Reporter
from replicator.selection import covers, included_storages, select
from replicator.setting_types import Target
from replicator.settings import Job
from replicator.tracker import ReplicaKey


class Network(Protocol):
    """This node and the ways to the others."""

    @property
    def node(self) -> str:
        """This node's name."""

    def endpoint(self, node: str, job: Job | None = None) -> Endpoint:
        """A node's endpoint, this one's included, as ``job`` wants it; connections are made when it is used."""

    def pool(self, node: str, storage: str) -> str | None:
        """The pool of this node that a storage is in: what is in one pool shares its disks. None: of another node."""


@dataclass(frozen=True, slots=True)
class Task:
    """One volume of a job and one of its targets.

    :ivar peer: the other node, or this one where both sides are here
    :ivar origin: the volume that it is a clone of, if the job has that, too: that one goes first, so that the clone can
        be sent as the difference
    :ivar origins: names of its snapshots that other volumes of the job began as
    """

    job: Job
    key: ReplicaKey
    pair: Pair
    peer: str
    origin: VolumeId | None = None
    origins: frozenset[str] = frozenset()

    @property
    def policy(self) -> SendPolicy:
        """Which snapshots are sent."""
        return SendPolicy(self.job.intermediates, self.job.name, self.job.foreign_snapshots, self.origins)

    def options(self, limits: Limits | None = None, pacers: tuple[Pacer, ...] = ()) -> Options:
        """How the job wants it; what bounds a transfer is nothing to a plan."""
        return Options(self.policy, limits=limits or Limits(), pacers=pacers, origin_first=self.origin is not None)


class Tasks:
    """Finds the tasks of jobs. Asks the sources each time."""

    def __init__(self, network: Network, reporter: Reporter) -> None:
        self._network = network
        self._reporter = reporter

    def volumes(self, job: Job) -> tuple[VolumeId, ...]:
        """The volumes that the job's source selects now."""
        return tuple(volume.id for volume in self._selected(job))

    def of(self, job: Job, volume: str | None = None, target: str | None = None) -> tuple[Task, ...]:
        """The tasks of a job, narrowed to one volume and one target where given: volume by volume. Where it is not
        narrowed, replicas that the job no longer has are forgotten.

        :raises UsageError: the job has no such target
        :raises NoSuchVolume: the job selects no such volume
        """
        targets = [t for t in job.targets if target is None or str(t) == self._full(target)]
        if not targets:
            known = ", ".join(str(t) for t in job.targets)
            raise UsageError(f"job {job.name} has no target {target}", hint=f"its targets are: {known}")
        selected = self._selected(job)
        volumes = [v.id for v in selected if volume is None or volume in (str(v.id), self._name_of(job, v.id))]
        if volume is not None and not volumes:
            raise NoSuchVolume(
                f"job {job.name} replicates no volume {volume}", hint=f"`replicator plan {job.name}` lists its volumes"
            )
        there = {v.id for v in selected}
        clones = {v.id: v.origin.volume for v in selected if v.origin is not None and v.origin.volume in there}
        begun = origins_of(selected)
        tasks = tuple(
            replace(self._task(job, v, t), origin=clones.get(v), origins=begun.get(v, frozenset()))
            for v in volumes
            for t in targets
        )
        if volume is None and target is None:
            self._reporter.replicated(job.name, frozenset(task.key for task in tasks))
        return tasks

    def copies(self, job: Job, volume: str) -> tuple[tuple[Endpoint, VolumeId], ...]:
        """Where a job has a volume of that name: its source, then its targets. Nobody is asked: they need not be there,
        and it is for when they are not that replicas are made."""
        try:
            source = VolumeId.parse(volume.removeprefix(f"{job.source.node}/"))
        except ReplicatorError:
            return ()
        if source.storage not in job.source.storages or not covers(job.source.volumes, source.storage, source.name):
            return ()
        pairs = [self._task(job, source, target).pair for target in job.targets]
        return ((pairs[0].source, source), *((pair.target, pair.target_volume) for pair in pairs)) if pairs else ()

    def _selected(self, job: Job) -> list[VolumeInfo]:
        source = self._network.endpoint(job.source.node)
        found: dict[VolumeId, VolumeInfo] = {}
        for storage in included_storages(job.source.volumes):
            found.update((volume.id, volume) for volume in select(job.source.volumes, source.volumes(storage)))
        return [found[volume] for volume in sorted(found)]

    def _name_of(self, job: Job, volume: VolumeId) -> str:
        """A volume as people name it: with its node before it when it is pulled from there."""
        return str(volume) if job.source.node == self._network.node else f"{job.source.node}/{volume}"

    def _task(self, job: Job, volume: VolumeId, target: Target) -> Task:
        pair = Pair(
            self._network.endpoint(job.source.node, job),
            volume,
            self._network.endpoint(target.node, job),
            replica_volume(job.source.node, volume, target.storage, same_path=job.replica_path == "same"),
            hold_tag(job.name, target.node, target.storage),
        )
        peer = target.node if job.source.node == self._network.node else job.source.node
        return Task(job, ReplicaKey(job.name, self._name_of(job, volume), str(target)), pair, peer)

    def _full(self, target: str) -> str:
        return target if ":" in target else f"{self._network.node}:{target}"
