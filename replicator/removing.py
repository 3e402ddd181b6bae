"""Whether a replica may be removed: only as it was seen by whoever asks, and not what somebody else needs."""

from __future__ import annotations

from replicator.endpoint import RemoveRequest
from replicator.errors import NotAReplica, NotAuthorized, SnapshotHeld, VolumeChanged
from replicator.model import HoldTag, Role, VolumeId, VolumeState


def check_removable(request: RemoveRequest, state: VolumeState, node: str) -> None:
    """That this is what was asked for, and nobody else's.

    :param state: of the volume now
    :param node: that has it
    :raises NotAReplica, VolumeChanged, SnapshotHeld: see :meth:`replicator.endpoint.Endpoint.remove`
    """
    volume, lineage = request.volume, state.lineage
    if lineage is None or lineage.role is not Role.REPLICA or lineage != request.lineage:
        raise NotAReplica(
            f"volume {volume} of node {node} is not that replica (any more), so it is not removed",
            hint="`replicator status` shows what it is",
        )
    unknown = [version.name for version in state.versions if version.guid not in request.versions]
    if unknown or state.head_changed:
        what = f"a snapshot {unknown[0]}" if unknown else "live data that no snapshot has"
        raise VolumeChanged(f"{volume} of node {node} has {what} by now, so it is not removed", hint="look again")
    of_job = HoldTag(request.job, node, volume.storage)
    for version in state.versions:
        for tag in version.holds:
            if HoldTag.parse(tag) != of_job:
                raise SnapshotHeld(
                    f"snapshot {version.name} of {volume} on {node} is held by {tag}",
                    hint="wait until what holds it has released it",
                )


def keeps_a_minimum(volume: VolumeId, node: str, peer: str, keep: str) -> NotAuthorized:
    """The refusal of a node that keeps the least of what a peer has there."""
    return NotAuthorized(
        f"node {node} keeps the least of {keep} of the replicas of node {peer}, so {volume} is not removed",
        hint=f"remove it by hand on {node}, or take `keep` out of [peer.{peer}] there",
    )
