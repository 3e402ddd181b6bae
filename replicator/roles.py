"""Lineage, roles and epochs: who may write into whom.

Checked by the endpoint before a storage is touched, and again by each backend under the lock that its receive holds.
"""

from __future__ import annotations

from collections.abc import Container

from replicator.errors import NotAReplica, StaleEpoch
from replicator.model import Lineage, Role, VolumeId, VolumeInfo, VolumeState


def stale_epoch(volume: VolumeId, mine: Lineage, sender: Lineage) -> StaleEpoch:
    """The refusal of a sender that was superseded."""
    return StaleEpoch(
        f"volume {volume} is at epoch {mine.epoch}, the sender only at epoch {sender.epoch}: it was superseded",
        hint="the sender is no longer the primary; find the node that was promoted before you go on",
    )


def is_beginning_of(state: VolumeState, guids: Container[str]) -> bool:
    """Whether a volume is but the half-received first copy of one of these versions, and not marked as a replica yet.

    A storage may make a volume first and mark it a moment later (zfs receive does), and the power may fail in between.
    What is in it came as that very version, and nothing else is.
    """
    resume = state.resume
    unmarked = state.lineage is None and not state.versions and not state.head_changed
    return unmarked and resume is not None and resume.base_guid is None and resume.to_guid in guids


def check_may_receive(
    volume: VolumeId, state: VolumeState | VolumeInfo | None, sender: Lineage, to_guid: str = ""
) -> None:
    """Whether a volume may take data of ``sender``: nothing there yet, or a replica of the same lineage and epoch.

    :param to_guid: the version that it is to have; see :func:`is_beginning_of`
    :raises NotAReplica, StaleEpoch:
    """
    if state is None or (isinstance(state, VolumeState) and is_beginning_of(state, (to_guid,))):
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
