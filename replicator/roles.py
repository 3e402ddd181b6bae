"""Lineage, roles and epochs: who may write into whom.

Checked by the endpoint before a storage is touched, and again by each backend under the lock that its receive holds.
"""

from __future__ import annotations

from replicator.errors import NotAReplica, StaleEpoch
from replicator.model import Lineage, Role, VolumeId, VolumeInfo, VolumeState


def stale_epoch(volume: VolumeId, mine: Lineage, sender: Lineage) -> StaleEpoch:
    """The refusal of a sender that was superseded."""
    return StaleEpoch(
        f"volume {volume} is at epoch {mine.epoch}, the sender only at epoch {sender.epoch}: it was superseded",
        hint="the sender is no longer the primary; find the node that was promoted before you go on",
    )


def check_may_receive(volume: VolumeId, state: VolumeState | VolumeInfo | None, sender: Lineage) -> None:
    """Whether a volume may take data of ``sender``: nothing there yet, or a replica of the same lineage and epoch.

    :raises NotAReplica, StaleEpoch:
    """
    if state is None:
        return
    mine = state.lineage
    resolve = "`replicator resync` keeps what is there aside and makes it a replica"
    if mine is None:
        raise NotAReplica(f"volume {volume} exists on the target and is not a replica of ours", hint=resolve)
    if mine.uuid != sender.uuid:
        raise NotAReplica(f"volume {volume} is of another lineage ({mine.uuid}, not {sender.uuid})", hint=resolve)
    if mine.epoch > sender.epoch:
        raise stale_epoch(volume, mine, sender)
    if mine.role is not Role.REPLICA:
        raise NotAReplica(f"volume {volume} is a primary on the target (epoch {mine.epoch})", hint=resolve)
