"""What a clone began as, and whether its target has that, or gets it in the same run.

A job that selects a clone and what it is a clone of sends the latter first, with the very snapshot that the clone began
as (see ``SendPolicy.origins``). The clone is then sent as the difference to it, and stays a clone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from replicator.conflicts import Route
from replicator.model import Lineage, Role, VolumeId, VolumeInfo, VolumeState
from replicator.planning import CloneBase, Common, Plan, SendPolicy, plan

if TYPE_CHECKING:
    from replicator.replication import Pair


@dataclass(frozen=True, slots=True)
class OriginThere:
    """What the target has of what a source is a clone of.

    :ivar clone: the snapshot that it began as, where the target has it or is to get it first
    :ivar passed: it has a replica of that volume with newer snapshots, so that one cannot get there any more
    """

    clone: CloneBase | None = None
    passed: bool = False


def find_origin(
    pair: Pair, source: VolumeState, target: VolumeState | None, policy: SendPolicy, route: Route, *, first: bool
) -> OriginThere:
    """Look for what the source is a clone of, as long as the target has nothing of the clone itself.

    :param policy, route: of the job
    :param first: the job brings that to the same target, before the clone
    """
    if source.origin is None or (target is not None and target.snapshots):
        return OriginThere()
    volume, replica = source.origin.volume, pair.replica_of(source.origin.volume)
    from_, to = pair.source.state(volume), pair.target.state(replica)
    ours = next((v for v in from_.snapshots if v.name == source.origin.snapshot), None) if from_ is not None else None
    if from_ is None or ours is None:
        return OriginThere()
    related = to is not None and _is_replica(from_.lineage, to.lineage)
    theirs = next((v for v in to.snapshots if v.guid == ours.guid), None) if to is not None and related else None
    if theirs is not None:
        return OriginThere(CloneBase(volume, replica, Common(ours, theirs)))
    if not first:
        return OriginThere()
    wanted = replace(policy, origins=frozenset({ours.name}))
    bringing = plan(from_, to, wanted, replace(route, volume=volume))
    if not isinstance(bringing, Plan):  # a conflict: the clone does not wait for what people have to decide
        return OriginThere()
    arriving = bringing.brings(ours)
    if arriving is None:
        return OriginThere(passed=related)
    return OriginThere(CloneBase(volume, replica, Common(ours, arriving), coming=True))


def _is_replica(source: Lineage | None, target: Lineage | None) -> bool:
    if source is None or target is None:
        return False
    return (target.uuid, target.role) == (source.uuid, Role.REPLICA)


def origins_of(selected: Iterable[VolumeInfo]) -> Mapping[VolumeId, frozenset[str]]:
    """By volume, the names of its snapshots that other volumes of this selection began as."""
    found: dict[VolumeId, set[str]] = {}
    for volume in selected:
        if volume.origin is not None:
            found.setdefault(volume.origin.volume, set()).add(volume.origin.snapshot)
    return {volume: frozenset(names) for volume, names in found.items()}
