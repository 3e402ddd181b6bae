"""Replicas whose source is gone. They are kept, and shown, until somebody decides."""

from __future__ import annotations

from collections.abc import Iterable

from replicator.control import Orphan
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
