"""What a job means now: the volumes that its source selects, and for each of them and each target one task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from replicator.endpoint import Endpoint
from replicator.errors import NoSuchVolume, ReplicatorError, UsageError
from replicator.model import Role, VolumeId, VolumeInfo, VolumeState, hold_tag, replica_volume
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

    :ivar volume: as the job's source has it, whichever way it goes now
    :ivar reversed: the roles were changed: a target of the job has the primary now
    :ivar beside: where that is another target than this one: the volume as the job's source has it, a replica as well;
        None: the job's source is what follows
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
    reversed: bool = False
    beside: VolumeId | None = None

    @property
    def volume(self) -> VolumeId:
        """The volume as the job's source has it."""
        if self.beside is not None:
            return self.beside
        return self.pair.target_volume if self.reversed else self.pair.source_volume

    @property
    def keep_source(self) -> str:
        """What is kept where the primary is now: a retention policy is that of a place, whatever its role."""
        return self.job.keep.target if self.reversed else self.job.keep.source

    @property
    def keep_target(self) -> str:
        """What is kept where the replica is now."""
        return self.job.keep.source if self.reversed and self.beside is None else self.job.keep.target

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
        return tuple(volume.id for volume in select(job.source.volumes, self._listed(job)))

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
        listed = self._listed(job)
        selected = select(job.source.volumes, listed)
        volumes = [v.id for v in selected if self._means(job, volume, v.id)]
        there = {v.id for v in selected}
        clones = {v.id: v.origin.volume for v in selected if v.origin is not None and v.origin.volume in there}
        begun = origins_of(selected)
        tasks = tuple(
            replace(self._task(job, v, t), origin=clones.get(v), origins=begun.get(v, frozenset()))
            for v in volumes
            for t in targets
        )
        tasks += self._former(job, volume, targets, listed)
        if volume is not None and not tasks:
            raise NoSuchVolume(
                f"job {job.name} replicates no volume {volume}", hint=f"`replicator plan {job.name}` lists its volumes"
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

    def _means(self, job: Job, text: str | None, volume: VolumeId) -> bool:
        return text is None or text in (str(volume), self._name_of(job, volume))

    def _former(
        self, job: Job, text: str | None, targets: Sequence[Target], listed: Iterable[VolumeInfo]
    ) -> tuple[Task, ...]:
        """Volumes that the job's source selects and that are replicas now, because the roles were changed: replicated
        from the target that has the primary. What holds their snapshots tells them from replicas of other jobs; those
        that are below a target's name are such replicas, and not even looked at."""
        source = self._network.endpoint(job.source.node)
        replicas = [
            volume.id
            for volume in listed
            if volume.lineage is not None
            and volume.lineage.role is Role.REPLICA
            and covers(job.source.volumes, volume.id.storage, volume.id.name)
            and self._means(job, text, volume.id)
            and volume.id.name.partition("/")[0] not in {target.node for target in job.targets}
        ]
        tags = {hold_tag(job.name, target.node, target.storage): target for target in job.targets}
        wanted = {str(target) for target in targets}
        found: list[Task] = []
        for listing in source.states(replicas) if replicas else ():
            if listing.state is None:
                continue
            held = {tag for version in listing.state.versions for tag in version.tags}
            of_it = [self._task(job, listing.volume, tags[tag]) for tag in sorted(held & tags.keys())]
            turned = self._beside([self._reversed_if_so(task, listing.state) for task in of_it])
            found += [task for task in turned if task.key.target in wanted]
        return tuple(found)

    @staticmethod
    def _beside(tasks: Sequence[Task]) -> Iterator[Task]:
        """The tasks of one volume: where one of its targets has the primary now, the others follow that one."""
        primary = next((task.pair for task in tasks if task.reversed), None)
        for task in tasks:
            if primary is None or task.reversed:
                yield task
                continue
            pair = replace(task.pair, source=primary.source, source_volume=primary.source_volume)
            yield replace(task, pair=pair, reversed=True, beside=task.pair.source_volume)

    def _reversed_if_so(self, task: Task, source: VolumeState) -> Task:
        """The same task from the target to the source, if the target has the primary."""
        pair = task.pair
        try:
            target = pair.target.state(pair.target_volume)
        except ReplicatorError:  # it is found out again by whatever comes next
            return task
        ours, theirs = source.lineage, target.lineage if target is not None else None
        if ours is None or theirs is None or (theirs.uuid, theirs.role) != (ours.uuid, Role.PRIMARY):
            return task
        turned = Pair(pair.target, pair.target_volume, pair.source, pair.source_volume, pair.tag)
        return replace(task, pair=turned, reversed=True)

    def anyhow(self, job: Job, text: str) -> tuple[Task, ...]:
        """The tasks of a volume as the job has it configured, whatever the roles of its copies are now."""
        volumes = [
            volume.id
            for volume in self._listed(job)
            if covers(job.source.volumes, volume.id.storage, volume.id.name) and self._means(job, text, volume.id)
        ]
        return tuple(self._task(job, volume, target) for volume in volumes for target in job.targets)

    def _listed(self, job: Job) -> list[VolumeInfo]:
        """All volumes of the storages that the job's source names."""
        source = self._network.endpoint(job.source.node)
        found: dict[VolumeId, VolumeInfo] = {}
        for storage in included_storages(job.source.volumes):
            found.update((volume.id, volume) for volume in source.volumes(storage))
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
