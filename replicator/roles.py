"""Lineage, roles and epochs: who may write into whom.

Checked by the endpoint before a storage is touched, and again by each backend under the lock that its receive holds.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

from replicator.endpoint import RoleChange
from replicator.errors import ConflictError, NotAReplica, StaleEpoch, VolumeChanged
from replicator.model import (
    HoldTag,
    Lineage,
    Role,
    Version,
    VolumeId,
    VolumeInfo,
    VolumeState,
    is_rejoin_tag,
    role_tag_of,
)

EPOCH_STEP = 1_000_000
"""Epochs of one promotion after the other are in different millions; see :func:`next_epoch`."""
MAX_EPOCH = 2**63 - 1


def next_epoch(known: Iterable[int], draw: int) -> int:
    """The epoch of a promotion: in the next million after all that are known, at a place drawn at random.

    Two replicas that are cut off from each other may both be promoted by force. Neither can know the other's epoch,
    and they must not be the same: so the last six digits are drawn. The digits before them count promotions.

    :param draw: a random number of 0 to ``EPOCH_STEP`` - 1
    :raises ConflictError: there is none left (somebody has set an epoch by hand)
    """
    epoch = (max(known, default=0) // EPOCH_STEP + 1) * EPOCH_STEP + draw % EPOCH_STEP
    if epoch > MAX_EPOCH:
        raise ConflictError(
            f"there is no epoch after {max(known)}", kind="illegal_role", hint="correct the lineage of the copies"
        )
    return epoch


def newest_complete(state: VolumeState) -> Version | None:
    """The newest snapshot of a copy, without what was kept aside: what a promotion goes on from."""
    return next((v for v in reversed(state.snapshots) if not v.is_diverged), None)


def followers(state: VolumeState) -> frozenset[str]:
    """The nodes whose copies follow this one, or have yet to: it holds for them what they continue from."""
    held = {tag for version in state.versions for tag in version.tags}
    jobs = {tag.node for tag in map(HoldTag.parse, held) if tag is not None}
    return frozenset(jobs | {role_tag_of(tag) or "" for tag in held if is_rejoin_tag(tag)}) - {""}


def check_change(state: VolumeState, change: RoleChange) -> bool:
    """Whether a change is still to be made; False: it was made already.

    ===========================  ==========================================================================
    replica → primary            promotion: a newer epoch, and ``at`` is the newest snapshot
    primary → replica            demotion: the same epoch
    replica → replica            a newer epoch: promotions that were asked for under the old one come too late
    primary → primary            a newer epoch: the same for demotions
    the same → the same          nothing, but to finish what was cut off
    ===========================  ==========================================================================

    :raises ConflictError, VolumeChanged: see :meth:`replicator.endpoint.Endpoint.change_role`
    """
    now, expected, new = state.lineage, change.expected, change.lineage
    promotes = (expected.role, new.role) == (Role.REPLICA, Role.PRIMARY)
    demotes = (expected.role, new.role) == (Role.PRIMARY, Role.REPLICA)
    right_epoch = new.epoch == expected.epoch if demotes or expected == new else new.epoch > expected.epoch
    if expected.uuid != new.uuid or not right_epoch or (promotes and change.at is None):
        raise ConflictError(
            f"{change.volume} cannot become {told(new)} from {told(expected)}", kind="illegal_role", hint=""
        )
    if now == new:
        return False
    if now != expected:
        raise ConflictError(
            f"{change.volume} is {told(now) if now else 'no copy of ours'}, and not {told(expected)} as was expected",
            kind="role_changed",
            hint="somebody else changed its role meanwhile: look with `replicator status`, then run it again if needed",
        )
    if promotes:
        newest = newest_complete(state)
        if change.at is None or newest is None or newest.guid != change.at.guid:
            raise VolumeChanged(
                f"the newest snapshot of {change.volume} is {newest.name if newest else 'none'} by now",
                hint="run it again",
            )
        if state.head_changed:
            raise VolumeChanged(
                f"{change.volume} was written to although it is a replica",
                hint="run it again: that is kept aside first",
            )
    return True


def told(lineage: Lineage) -> str:
    """A role for people."""
    return f"a {lineage.role} of epoch {lineage.epoch}"


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
