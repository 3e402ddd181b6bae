"""Replicas whose source is gone. They are kept, and shown, until somebody decides."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from replicator.control import Orphan, OrphanReport
from replicator.endpoint import Endpoint, RemoveRequest
from replicator.errors import ReplicatorError
from replicator.model import DIVERGED_PREFIX, Role, VolumeId, VolumeInfo, replica_volume
from replicator.selection import covers
from replicator.setting_types import Target
from replicator.settings import Job


def find_orphans(
    job: Job, target: Target, present: frozenset[VolumeId], listed: Iterable[VolumeInfo]
) -> tuple[Orphan, ...]:
    """The replicas on a target that the job would keep up to date if their sources were there.

    :param present: the volumes that the job selects now
    :param listed: all volumes of the target's storage
    """
    same_path = job.replica_path == "same"
    place = "" if same_path else f"{job.source.node}/"
    expected = {replica_volume(job.source.node, volume, target.storage, same_path=same_path) for volume in present}
    found = []
    for replica in listed:
        name = replica.id.name
        mine = name.startswith(place) and replica.id not in expected and f"-{DIVERGED_PREFIX}" not in name
        if not mine or replica.lineage is None or replica.lineage.role is not Role.REPLICA:
            continue
        for storage in job.source.storages:
            volume = VolumeId(storage, name.removeprefix(place))
            if covers(job.source.volumes, storage, volume.name):
                found.append(Orphan(job.name, str(volume), str(target), str(replica.id)))
                break
    return tuple(found)


def examine(orphan: Orphan, source: Endpoint, target: Endpoint) -> OrphanReport:
    """What there is of an orphan now, and whether it can be removed. Raises nothing of the storages."""
    try:
        state = target.state(VolumeId.parse(orphan.replica))
        there = source.state(VolumeId.parse(orphan.volume)) is not None
    except ReplicatorError as error:
        return OrphanReport(orphan, None, None, (), f"it is not known what there is: {error}")
    if state is None:
        return OrphanReport(orphan, None, None, (), "it is gone")
    found = OrphanReport(orphan, state.lineage, state.size, state.versions)
    if there:  # two replicas, in the middle of a switchover: then this may be what one goes back to
        return replace(found, kept=f"there is a volume {orphan.volume} on {source.node}")
    if state.lineage is None or state.lineage.role is not Role.REPLICA:
        return replace(found, kept="it is no replica any more")
    if state.head_changed:
        return replace(found, kept="somebody wrote to it: it has live data that no snapshot has")
    return found


def remove(wanted: OrphanReport, source: Endpoint, target: Endpoint) -> OrphanReport:
    """Remove an orphan as it was looked at; what became of it. Raises nothing of the storages."""
    orphan = wanted.orphan
    found = examine(orphan, source, target)
    if found.kept or found.lineage is None:
        return found
    if found.lineage != wanted.lineage:
        return replace(found, kept="it is another replica than the one that was looked at")
    versions = tuple(version.guid for version in wanted.versions)
    try:
        target.remove(RemoveRequest(VolumeId.parse(orphan.replica), orphan.job, found.lineage, versions))
    except ReplicatorError as error:
        return replace(found, kept=str(error))
    return replace(found, gone=True)
